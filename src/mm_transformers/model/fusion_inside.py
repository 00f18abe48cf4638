"""Fusion layers inside a decoder-only language model, before every n-th of its layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from .decoder_layers import running
from .fusion_base import Fusion, FusionOutput, Stream, computed_dtype, fusion_class, with_change
from .padding import leading_padding, roll_rows
from .row_streams import RowStreams


class InsideFusion(nn.Module):
    """
    One fusion for each place inside a language model (Flamingo, https://arxiv.org/abs/2204.14198).

    A place is before every n-th decoder layer, with n = `config.fusion_layers_every`. Each has a fusion of
    `config.fusion_type` with parameters of its own.

    Args:
        config: of the model.
        stream_names: the modalities beside the text.
        text_hidden_size: the width of the language model.
        num_places: the number of places.
    """

    def __init__(
        self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int, num_places: int
    ) -> None:
        super().__init__()
        options = config.fusion_kwargs
        kind = fusion_class(config.fusion_type, options)
        self.places = nn.ModuleList(kind(config, stream_names, text_hidden_size, **options) for _ in range(num_places))

    @property
    def kind_of_places(self) -> type[Fusion]:
        """The class of the fusions."""
        return cast(type[Fusion], type(self.places[0]))

    def forward(
        self, place: int, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], **options: Any
    ) -> FusionOutput:
        """The fused states at a place; the other arguments and the output are those of [`Fusion`]."""
        fusion = self.places[place]
        # Some language models keep these states in float32.
        given = text_states.to(computed_dtype(fusion) or text_states.dtype)
        output = fusion(given, text_mask, streams, **options)
        return output._replace(hidden_states=with_change(text_states, given, output.hidden_states))


class InsideRun(RowStreams):
    """
    One use of a language model whose layers read the other modalities of its rows.

    Args:
        model: the [`MMTransformerModel`].
        streams, num_rows: see [`RowStreams`].
        outputs_wanted: `output_attentions` and `output_hidden_states` of the fusions.
    """

    def __init__(
        self, model: Any, streams: list[Stream], num_rows: int, outputs_wanted: Optional[dict[str, Any]] = None
    ) -> None:
        super().__init__(streams, num_rows)
        self.model, self.outputs_wanted = model, outputs_wanted or {}
        self.outputs: list[FusionOutput] = []

    def inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, num_packed: int = 0, to_the_right: bool = True
    ) -> dict[str, torch.Tensor]:
        """What the language model reads: the texts as they are; [`EncoderFeatures`] moves the padding to the right."""
        self.mask = mask if to_the_right else roll_rows(mask, leading_padding(mask))
        return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}

    def text_states(self, states: torch.Tensor) -> torch.Tensor:
        """The states of the texts, of all states."""
        return states

    def fuse(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """The states at a place, after the fusion there."""
        streams = self.for_states(states)
        if not streams:
            return states
        found = self.model.fusion(place, states, self.mask_for(states), streams, **self.outputs_wanted)
        if any(value not in (None, False) for value in self.outputs_wanted.values()):
            self.outputs.append(found)
        return found.hidden_states

    @contextmanager
    def shown_to(self, text_model: nn.Module) -> Iterator[None]:
        """Within the block, the layers of the language model read the streams; of this thread only."""
        with running(self):
            yield

    def output(self, states: torch.Tensor) -> FusionOutput:
        """The output for these last states, with what was recorded at all places."""
        recorded = [found.all_hidden_states for found in self.outputs]
        shown = [states for states in recorded if states is not None]
        return FusionOutput(
            states,
            tuple(state for states in shown for state in states) if shown else None,
            tuple(layer for found in self.outputs for layer in found.layers),
        )
