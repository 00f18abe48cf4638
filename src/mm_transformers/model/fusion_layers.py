"""The building blocks of fusion kinds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .fusion_base import Stream


class Gate(nn.Module):
    """
    Multiplies by tanh(alpha), with a learned scalar alpha that starts at 0 (Flamingo,
    https://arxiv.org/abs/2204.14198).

    So a gated branch adds nothing at the start of training. alpha stays float32: bfloat16 would lose its first small
    steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate_alpha = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.gate_alpha.tanh().to(hidden_states.dtype)


class PackedKeys(NamedTuple):
    """
    The visible keys of all rows, packed for FlashAttention (https://arxiv.org/abs/2307.08691).

    FlashAttention takes sequences of different lengths end to end. transformers packs by a mask only if queries and
    keys are the same tokens. In a cross-attention it would drop queries by the mask of keys.

    Args:
        places (num_seen,): the indices of the visible keys among all keys.
        lengths: the arguments with the bounds of each row.
    """

    places: torch.Tensor
    lengths: dict[str, torch.Tensor | int]

    @classmethod
    def of(cls, mask: torch.Tensor, num_queries: int) -> "PackedKeys":
        """`mask` (batch, num_keys) bool: True where a key may be seen, at least once in each row."""
        batch, num_keys = mask.shape
        ends = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        lengths: dict[str, torch.Tensor | int] = {
            "cu_seq_lens_q": torch.arange(batch + 1, device=mask.device, dtype=torch.int32) * num_queries,
            "cu_seq_lens_k": ends.to(torch.int32),
            "max_length_q": num_queries,
            "max_length_k": num_keys,  # a bound, so that nothing waits for the GPU
        }
        return cls(mask.flatten().nonzero()[:, 0], lengths)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, num_keys, width) -> (1, num_seen, width)"""
        return states.flatten(0, 1).index_select(0, self.places)[None]


class PackedQueries(NamedTuple):
    """
    The tokens of some rows end to end, without padding.

    So layers that treat every token on its own do not compute padding.

    Args:
        places (num_tokens,): the indices of the tokens among all places of the rows.
        num_rows, length: of the rows.
    """

    places: torch.Tensor
    num_rows: int
    length: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> "PackedQueries":
        """`mask` (num_rows, length) bool: True where there is a token."""
        return cls(mask.flatten().nonzero()[:, 0], *mask.shape)

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(num_rows, length, width) -> (1, num_tokens, width)"""
        return states.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(1, num_tokens, width) -> (num_rows, length, width), 0 at the padding"""
        return self.put_into(packed.new_zeros(self.num_rows, self.length, packed.shape[-1]), packed)

    def put_into(self, states: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """`states` (num_rows, length, width) with the packed ones (1, num_tokens, width) in their places."""
        return states.flatten(0, 1).index_copy(0, self.places, packed[0]).view_as(states)


class KeyMask(NamedTuple):
    """
    The keys that are visible to a query.

    Args:
        attention_mask: the mask for the attention implementation. It never hides all the keys of a row, because
            implementations then return different values (0, the mean of the values, or NaN).
        present (batch, 1, 1) bool: False for the rows whose keys are all hidden; their attention output is set to 0.
            `None` if there are no such rows.
        packed: replaces `attention_mask` for FlashAttention.
        packed_queries: if queries and attention output are (1, num_tokens, width), without padding.
    """

    attention_mask: Optional[torch.Tensor]
    present: Optional[torch.Tensor]
    packed: Optional[PackedKeys] = None
    packed_queries: Optional[PackedQueries] = None


def key_mask(config: PreTrainedConfig, queries: torch.Tensor, mask: Optional[torch.Tensor]) -> KeyMask:
    """
    Args:
        queries (batch, num_queries, width): the states that attend.
        mask (batch, num_keys) bool: True where a key may be seen; `None` if all may.
    """
    if mask is None:
        return KeyMask(None, None)
    present = mask.any(-1, keepdim=True)
    if is_flash_attention_requested(config):
        is_first = torch.arange(mask.shape[1], device=mask.device) == 0
        return KeyMask(None, present[..., None], PackedKeys.of(mask | ~present & is_first, queries.shape[1]))
    keys = queries[:, :1, :1].expand(-1, mask.shape[1], -1)  # only their shape is used
    attention_mask = create_bidirectional_mask(
        config=config, inputs_embeds=queries, attention_mask=mask | ~present, encoder_hidden_states=keys
    )
    return KeyMask(attention_mask, present[..., None])


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    scaling: float,
    dropout: float = 0.0,
    present: Optional[torch.Tensor] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if present is not None:
        # Before the weighting of values, so that returned attentions are part of the graph of the output.
        weights = weights * present
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights


# Of this thread: id of an attention -> its keys and values.
_kept: ContextVar[Optional[dict[int, tuple[torch.Tensor, torch.Tensor]]]] = ContextVar("_kept", default=None)


@contextmanager
def kept_keys() -> Iterator[None]:
    """
    Within the block, each attention of a fusion projects its keys once, and keeps them.

    For a language model that writes token by token: its texts grow, and the other modalities stay.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class FusionAttention(nn.Module):
    """Multi-head attention (https://arxiv.org/abs/1706.03762) of queries to keys, through any implementation that
    transformers has. (batch, num_queries, width), (batch, num_keys, width) -> (batch, num_queries, width). The keys may
    be streams, which are put side by side."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        width = config.fusion_hidden_size
        self.head_dim = width // config.num_fusion_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.fusion_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor | list[Stream], mask: KeyMask
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        packing = mask.packed_queries

        def of_keys(layer: nn.Linear) -> torch.Tensor:
            if isinstance(keys, torch.Tensor):
                states = layer(keys)
            else:
                # An item that several rows share is projected once.
                states = torch.cat([stream.each(layer) for stream in keys], dim=1)
            return states if mask.packed is None else mask.packed.pack(states)

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # Rows without keys; other implementations return no attentions.
        absent = mask.present is not None
        options: dict[str, Any] = {} if mask.packed is None else mask.packed.lengths
        if absent and attention is eager_attention_forward:
            options = {"present": mask.present[:, None]}
        query = self.q_proj(queries)
        kept = None if torch.compiler.is_compiling() else _kept.get()
        known = None if kept is None else kept.get(id(self))
        if known is None or known[0].shape[0] != (queries.shape[0] if mask.packed is None else 1):
            known = heads(of_keys(self.k_proj)), heads(of_keys(self.v_proj))
            if kept is not None:
                kept[id(self)] = known
        output, weights = attention(
            self,
            heads(query if packing is None else packing.unpack(query)),
            *known,
            mask.attention_mask,
            is_causal=False,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            **options,
        )
        output = output.flatten(-2)
        output = self.out_proj(output.reshape(queries.shape) if packing is None else packing.pack(output))
        return output * mask.present if absent else output, weights


class FusionMLP(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width = config.fusion_hidden_size
        self.fc1 = nn.Linear(width, 4 * width)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.fusion_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.activation(self.fc1(hidden_states))))


class Latents(nn.Module):
    """(num_latents, width) learned vectors, the same for every row at the start."""

    def __init__(self, num_latents: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_latents, width))

    def init_own_parameters(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, batch: int) -> torch.Tensor:
        return self.weight.expand(batch, -1, -1)


class StreamProjection(nn.Module):
    """
    Projects the tokens of an encoder to the width of the fusion, by layer norm and a linear layer.

    The bias of the linear layer is also the embedding of the modality. (..., encoder width) -> (...,
    fusion_hidden_size).
    """

    def __init__(self, config: PreTrainedConfig, input_size: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(input_size)
        self.linear = nn.Linear(input_size, config.fusion_hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm, linear = self.layer_norm, self.linear
        # A frozen encoder may have another precision.
        hidden_states = hidden_states.to(norm.weight.dtype)
        if hidden_states.requires_grad or not torch.is_grad_enabled() or type(linear) is not nn.Linear:
            return linear(norm(hidden_states))
        # The same with the scale and shift of the norm put into the linear layer, so that no gradient of every token
        # has to be computed for them.
        normed = nn.functional.layer_norm(hidden_states, norm.normalized_shape, eps=norm.eps)
        return nn.functional.linear(normed, linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias)


def stream_mask(streams: list[Stream]) -> Optional[torch.Tensor]:
    """Their masks side by side, (batch, sum of lengths) bool; `None` if no token is known to be masked."""
    return None if all(s.is_full for s in streams) else torch.cat([s.mask for s in streams], dim=1)


def concatenate(streams: list[Stream]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of all streams side by side, and their mask."""
    return torch.cat([s.hidden_states for s in streams], dim=1), torch.cat([s.mask for s in streams], dim=1)


def masked_mean(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the unmasked tokens, 0 if there are none. (batch, length, width) -> (batch, width)."""
    weights = mask[..., None].to(hidden_states.dtype)
    return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)


def last_unmasked(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last of the unmasked tokens, 0 if there are none. (batch, length, width) -> (batch, width)."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).amax(1)
    found = hidden_states.gather(1, last[:, None, None].expand(-1, 1, hidden_states.shape[-1]))[:, 0]
    return torch.where(mask.any(1, keepdim=True), found, 0)


# The values of `config.text_pooling`: how one vector is made of the tokens of a text.
TEXT_POOLINGS = {"mean": masked_mean, "last": last_unmasked}
