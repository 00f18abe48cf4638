"""Text tokens attend to the tokens of the other streams."""

from typing import ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import is_flash_attention_requested

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import FusionAttention, FusionMLP, Gate, KeyMask, PackedQueries, key_mask, stream_mask


class CrossAttentionLayer(GradientCheckpointingLayer):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width = config.fusion_hidden_size
        self.attention_norm = nn.LayerNorm(width)
        self.cross_attention = FusionAttention(config)
        self.attention_gate = Gate()
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FusionMLP(config)
        self.mlp_gate = Gate()

    def forward(
        self, text_states: torch.Tensor, mask: KeyMask, streams: list[Stream], *tokens: torch.Tensor
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        # The tokens are a separate argument because checkpointing passes gradients to tensors only.
        streams = [stream._replace(tokens=given) for stream, given in zip(streams, tokens, strict=True)]
        attended, weights = self.cross_attention(self.attention_norm(text_states), streams, mask)
        text_states = text_states + self.attention_gate(attended)
        text_states = text_states + self.mlp_gate(self.mlp(self.mlp_norm(text_states)))
        return text_states, weights


@register_fusion
class CrossAttentionFusion(Fusion):
    """
    Gated cross-attention and gated feed-forward layers on the text tokens (Flamingo, https://arxiv.org/abs/2204.14198).

    The text tokens attend to the tokens of all streams. This is the cheapest of the token-level kinds.
    """

    kind: ClassVar[str] = "cross_attention"
    mixes_text: ClassVar[bool] = False

    def __init__(self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int) -> None:
        super().__init__(config, stream_names, text_hidden_size)
        self.layers = nn.ModuleList(CrossAttentionLayer(config) for _ in range(config.num_fusion_layers))

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        if self._can_pack(text_states, record):
            present = torch.stack([stream.present for stream in streams]).any(0)
            rows, shown = present.nonzero()[:, 0], PackedQueries.of(text_mask & present[:, None])
            if len(shown.places) > 0:
                # Neither padding nor rows without other modalities are computed.
                streams = [_simplified(stream.of_rows(rows)) for stream in streams]
                fused = self._layers(shown.pack(text_states), streams, record, PackedQueries.of(text_mask[rows]))
                return shown.put_into(text_states, fused)
        return self._layers(text_states, streams, record)

    def _layers(
        self,
        text_states: torch.Tensor,
        streams: list[Stream],
        record: FusionRecord,
        packing: Optional[PackedQueries] = None,
    ) -> torch.Tensor:
        rows = text_states if packing is None else text_states.new_empty(packing.num_rows, packing.length, 1)
        mask = key_mask(self.config, rows, stream_mask(streams))._replace(packed_queries=packing)
        # Values that differ between rows are computed once, not in every layer.
        streams = [Stream(s.name, s.hidden_states) if s.differs_by_row else s for s in streams]
        tokens = [stream.tokens for stream in streams]
        for layer in self.layers:
            text_states, weights = layer(text_states, mask, streams, *tokens)
            record.add(text_states, (["text"], [stream.name for stream in streams], weights))
        return text_states

    def _can_pack(self, text_states: torch.Tensor, record: FusionRecord) -> bool:
        """
        Whether padding can be left out of the computation.

        In training, the states of padding are never used; otherwise they are equal in every implementation. On a GPU,
        the number of tokens would need a synchronisation.
        """
        shows = record.keep_attentions or record.keep_hidden_states
        on_cpu = text_states.device.type == "cpu" and not torch.compiler.is_compiling()
        return self.training and on_cpu and not shows and not is_flash_attention_requested(self.config)


def _simplified(stream: Stream) -> Stream:
    """
    The same stream with fewer tensors, after reading their values.

    It has no index if each row has its own item, in order, and no mask if every place holds a token.
    """
    if stream.item_index is None or stream.differs_by_row:
        return stream
    is_full = stream.is_full or (stream.token_mask is None and bool((stream.item_index >= 0).all()))
    own = torch.arange(len(stream.tokens), device=stream.tokens.device)[:, None]
    index = None if torch.equal(stream.item_index, own) else stream.item_index
    return stream._replace(item_index=index, is_full=is_full)
