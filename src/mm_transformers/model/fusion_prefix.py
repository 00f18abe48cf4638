"""Tokens of the other modalities before the tokens of the text, as in LLaVA: the text encoder reads both."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .encoders import max_text_positions
from .fusion_base import Fusion, FusionOutput, Stream, register_fusion
from .fusion_layers import concatenate


@register_fusion
class PrefixFusion(Fusion):
    """
    Projects the tokens of all streams to the input embeddings of the text encoder, and puts them before the text.

    This is LLaVA (https://arxiv.org/abs/2304.08485); together with the projection of each encoder, the projection is
    the MLP of two layers of LLaVA-1.5 (https://arxiv.org/abs/2310.03744). A new model does not answer as its text
    encoder does if a row has a picture, since there is no gate. `num_fusion_layers` and `num_fusion_attention_heads`
    have no effect.

    Args:
        text_hidden_size: the width of the input embeddings.
    """

    kind: ClassVar[str] = "prefix"
    mixes_text: ClassVar[bool] = False
    is_read_by_text: ClassVar[bool] = True

    def __init__(self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.config, self.stream_names = config, list(stream_names)
        self.activation = ACT2FN["gelu"]
        self.linear = nn.Linear(config.fusion_hidden_size, text_hidden_size)

    def forward(self, streams: list[Stream]) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The tokens before each text, (batch, length, text_hidden_size), and their mask (batch, length) bool."""
        states, mask = concatenate(streams)
        return self.linear(self.activation(states)), mask


# A hook belongs to a module, which several threads may run at once; each has its own prefix.
_running: ContextVar[Optional["PrefixRun"]] = ContextVar("_running_prefix", default=None)


@torch.compiler.disable
def _current() -> Optional["PrefixRun"]:
    # Not traced, or compiled code would keep the value of its first call.
    return _running.get()


def _show_vectors(module: nn.Module, inputs: Any, output: Any) -> Any:
    run = _current()
    return None if run is None else run.embedded(output)


def let_read_prefix(text_encoder: PreTrainedModel) -> None:
    """
    Makes a place for prefixes in the input embeddings of a text encoder.

    The hook stays: code that is compiled without it would not look for it later.
    """
    embeddings = text_encoder.get_input_embeddings()
    if _show_vectors not in embeddings._forward_hooks.values():
        embeddings.register_forward_hook(_show_vectors)


def _later_scale(text_encoder: PreTrainedModel) -> float:
    """The factor by which a text encoder scales its embeddings."""
    embeddings = text_encoder.get_input_embeddings()
    owner = next((module for module in text_encoder.modules() if embeddings in module.children()), None)
    # Of Marian, of Granite and of RecurrentGemma.
    found = [getattr(owner, name, None) for name in ("embed_scale", "embedding_multiplier", "normalizer")]
    return next((float(scale) for scale in found if scale is not None), 1.0)


class PrefixRun:
    """
    One use of a text encoder that reads a prefix.

    The text encoder gets token ids, and the vectors of the prefix replace the outputs of its embeddings. So it scales
    the embeddings of texts as ever, and options of `generate` see the text.

    No token of the prefix or the text is after padding, so rows without a prefix have the positions of plain texts.

    Args:
        model: the [`MMTransformerModel`].
        streams: the modalities of the rows beside the text.
        num_rows: the number of rows.
    """

    def __init__(
        self, model: Any, streams: list[Stream], num_rows: int, outputs_wanted: Optional[dict[str, Any]] = None
    ) -> None:
        self.model, self.streams = model, streams
        self.num_before = 0  # tokens before the texts
        # Where each token of the prefix, and then of the text, is among those that were read, (batch, tokens).
        self.places: Optional[torch.Tensor] = None
        # The vectors that replace the first embeddings, (batch, tokens, width), and their places.
        self.vectors: Optional[torch.Tensor] = None
        self.is_vector: Optional[torch.Tensor] = None
        self.was_read = False

    def inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, num_packed: int = 0, to_the_right: bool = True
    ) -> dict[str, torch.Tensor]:
        """
        What the text encoder reads.

        Args:
            ids, mask (batch, length): of the texts; -1 at the learned vector of a missing text.
            num_packed: the number of places, from the left, between which no padding stays; by default all.
            to_the_right: whether their padding goes to the left end.
        """
        if not self.streams:
            return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        before, shown = self.model.fusion(self.streams)
        self.num_before, mask = before.shape[1], mask.bool()
        null_text, is_null = getattr(self.model, "null_text", None), ids == -1
        own = before.new_zeros(*ids.shape, before.shape[2])
        if null_text is not None:
            own = torch.where(is_null[..., None], null_text.weight.to(own.dtype), own)
        vectors = torch.cat([before, own], 1) / _later_scale(self.model.text_encoder)
        # An id of the text, so that options of `generate` see no other token; not that of padding, whose places some
        # encoders do not count.
        blank = 1 if self.model.config.text_config.pad_token_id == 0 else 0
        ids = ids.masked_fill(is_null, blank)
        first = ids.gather(1, mask.to(torch.int8).argmax(1, keepdim=True))
        ids, is_vector = torch.cat([first.expand(-1, self.num_before), ids], 1), torch.cat([shown, is_null], 1)
        mask = torch.cat([shown, mask], 1)
        most = self._most_places(mask)
        packed = mask[:, : self.num_before + (num_packed or is_null.shape[1])]
        order = (packed if to_the_right else ~packed).to(torch.int8).argsort(dim=1, stable=True)
        rest = torch.arange(packed.shape[1], mask.shape[1], device=mask.device).expand(len(mask), -1)
        order = torch.cat([order, rest], 1)
        self.places = order.argsort(1)
        end = mask.shape[1] if most is None or to_the_right else most  # the rest is padding in all rows
        order = order[:, :end]
        self.vectors = vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[2]))
        self.is_vector = is_vector.gather(1, order)
        return {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order).to(torch.int64)}

    def text_states(self, states: torch.Tensor) -> torch.Tensor:
        """The states of the texts, (batch, length, width), of all states."""
        if self.places is None:
            return states
        places = self.places[:, self.num_before :].clamp(max=states.shape[1] - 1)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    @contextmanager
    def shown_to(self, text_model: PreTrainedModel) -> Iterator[None]:
        """Within the block, and this thread, the text encoder reads the prefix in place of some embeddings."""
        let_read_prefix(text_model)  # perhaps its embeddings were replaced
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
        if self.streams and not self.was_read and not torch.compiler.is_compiling():
            raise ValueError(
                f"fusion_type='prefix': the text encoder ({text_model.config.model_type!r}) does not call its input "
                "embeddings, so it cannot read a prefix: use another fusion_type."
            )

    def embedded(self, states: torch.Tensor) -> torch.Tensor:
        """
        The embeddings (rows or a multiple of them, length, width), with the vectors in their places.

        After the first tokens, a language model with a cache reads new tokens alone.
        """
        self.was_read = True
        if self.vectors is None or self.is_vector is None or states.shape[1] < self.vectors.shape[1]:
            return states
        copies, length = states.shape[0] // self.vectors.shape[0], self.vectors.shape[1]
        vectors = self.vectors.repeat_interleave(copies, 0).to(states)
        is_vector = self.is_vector.repeat_interleave(copies, 0).to(states.device)
        return torch.cat([torch.where(is_vector[..., None], vectors, states[:, :length]), states[:, length:]], 1)

    def output(self, states: torch.Tensor) -> FusionOutput:
        """The output for these states of the texts."""
        return FusionOutput(states)

    def _most_places(self, mask: torch.Tensor) -> Optional[int]:
        """The longest row, if there are more places than positions of the text encoder; otherwise `None`."""
        positions = max_text_positions(self.model.config.text_config)
        # The width comes first, since counting waits for a GPU.
        if positions is None or torch.compiler.is_compiling() or mask.shape[1] <= positions:
            return None
        longest = int(mask.sum(1).max())
        if longest > positions:
            raise ValueError(
                f"Prefix and text have up to {longest} tokens, but the text encoder has {positions} positions: use "
                "fewer tokens per picture by vision_token_reduction, or shorten the text by "
                "processor(..., max_length=...)."
            )
        return longest
