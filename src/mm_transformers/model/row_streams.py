"""The other modalities of rows, for a language model that runs several copies of each row."""

from contextlib import AbstractContextManager
from typing import Any, Optional, Protocol

import torch

from .fusion_base import Stream


class TextRun(Protocol):
    """One use of a text encoder that reads other modalities: behind its states, inside, or as a prefix."""

    num_before: int  # tokens before the texts

    def inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, num_packed: int = 0, to_the_right: bool = True
    ) -> dict[str, torch.Tensor]:
        """
        What the text encoder reads.

        Args:
            ids, mask (batch, length): of the texts.
            num_packed: the number of places, from the left, between which no padding stays; by default all. Only where
                tokens stand before the texts; elsewhere no padding stands between tokens.
            to_the_right: whether their padding goes to the left end.
        """

    def shown_to(self, text_model: Any) -> AbstractContextManager[None]:
        """Within the block the text encoder reads the other modalities."""


class RowStreams:
    """
    The streams of rows, repeated for beams and for several answers to a row, which stand side by side.

    Args:
        streams: the modalities of the rows beside the text.
        num_rows: the number of rows.
    """

    num_before = 0  # tokens before the texts

    def __init__(self, streams: list[Stream], num_rows: int) -> None:
        self.streams, self.num_rows = streams, num_rows
        self.mask: Optional[torch.Tensor] = None  # of the tokens; all by default

    def for_states(self, states: torch.Tensor) -> list[Stream]:
        """The streams of the rows of these states, (rows or a multiple of them, length, width)."""
        copies = states.shape[0] // self.num_rows
        if copies > 1:
            rows = torch.arange(self.num_rows, device=states.device).repeat_interleave(copies)
            self.streams, self.num_rows = [stream.of_rows(rows) for stream in self.streams], states.shape[0]
        return self.streams

    def mask_for(self, states: torch.Tensor) -> torch.Tensor:
        """The mask of these states, (batch, length) bool; all, while the model writes one token of each row or beam."""
        if self.mask is None or self.mask.shape != states.shape[:2]:
            return states.new_ones(states.shape[:2], dtype=torch.bool)
        return self.mask


def other_streams(encoded: dict[str, Any]) -> list[Stream]:
    """The streams of all modalities beside the text."""
    return [stream for name, stream in encoded.items() if name != "text"]
