"""Tokens of the other modalities before the tokens of the text, as in LLaVA: the text encoder reads both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
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


class PrefixRun:
    """
    One use of a text encoder that reads a prefix.

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
        texts = self.model.text_encoder.get_input_embeddings()(ids.clamp(min=0))
        null_text = getattr(self.model, "null_text", None)
        if null_text is not None:
            texts = torch.where((ids == -1)[..., None], null_text.weight.to(texts.dtype), texts)
        before, shown = self.model.fusion(self.streams)
        states, mask = torch.cat([before.to(texts.dtype), texts], 1), torch.cat([shown, mask.bool()], 1)
        self.num_before = before.shape[1]
        most = self._most_places(mask)
        packed = mask[:, : self.num_before + (num_packed or ids.shape[1])]
        order = (packed if to_the_right else ~packed).to(torch.int8).argsort(dim=1, stable=True)
        rest = torch.arange(packed.shape[1], mask.shape[1], device=mask.device).expand(len(mask), -1)
        order = torch.cat([order, rest], 1)
        self.places = order.argsort(1)
        states = states.gather(1, order[..., None].expand_as(states))
        mask = mask.gather(1, order).to(torch.int64)
        if most is not None and not to_the_right:
            states, mask = states[:, :most], mask[:, :most]  # the rest is padding in all rows
        return {"inputs_embeds": states, "attention_mask": mask}

    def text_states(self, states: torch.Tensor) -> torch.Tensor:
        """The states of the texts, (batch, length, width), of all states."""
        if self.places is None:
            return states
        places = self.places[:, self.num_before :].clamp(max=states.shape[1] - 1)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    @contextmanager
    def shown_to(self, text_model: nn.Module) -> Iterator[None]:
        """Nothing changes inside of the text encoder."""
        yield

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
