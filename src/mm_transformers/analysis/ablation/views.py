"""The same rows, encoded once, as they would be without a modality, or with that of another row."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ...model.fusion_base import Stream
from ...model.modeling_outputs import MMTransformerModelOutput


class EncodedRows:
    """
    Some rows after the encoders, before the fusion: all views of them need the fusion and the heads only.

    Args:
        model ([`MMTransformerModel`]): Has encoded them, in evaluation mode.
        outputs: what it gave.
    """

    def __init__(self, model: Any, outputs: MMTransformerModelOutput):
        self.model, self.outputs = model, outputs
        encoded: Any = outputs.encoded
        self.encoded: dict[str, Stream] = encoded
        self.num_rows = encoded["text"].mask.shape[0]

    def with_only(self, modalities: frozenset[str]) -> MMTransformerModelOutput:
        """As if the rows had nothing but these; of none, the model answers from what it has learned to expect."""
        if set(self.encoded) <= modalities:
            return self.outputs
        kept = {name: stream for name, stream in self.encoded.items() if name in modalities and name != "text"}
        text = self.encoded["text"] if "text" in modalities else self._no_text()
        return self.model.fuse({"text": text, **kept})

    def with_others(self, modality: str, rows: np.ndarray) -> MMTransformerModelOutput:
        """Each row with what another has of this modality: that of `rows`, (num_rows,)."""
        return self.with_pairs({modality: torch.from_numpy(rows)})

    def with_pairs(self, rows: dict[str, torch.Tensor]) -> MMTransformerModelOutput:
        """
        Args:
            rows: modality -> (new number of rows,) int64, whose it is; those that are not named stay as they are.
        """
        device = self.outputs.attention_mask.device
        return self.model.fuse(
            {
                name: stream.of_rows(rows[name].to(device)) if name in rows else stream
                for name, stream in self.encoded.items()
            }
        )

    def present(self, modality: str) -> np.ndarray:
        """(num_rows,) bool: which rows have it."""
        if modality not in self.encoded:
            return np.zeros(self.num_rows, dtype=bool)
        return self.encoded[modality].present.cpu().numpy()

    def _no_text(self) -> Stream:
        vector = self.model.null_text.weight.to(self.encoded["text"].tokens.dtype)
        return Stream("text", vector.expand(self.num_rows, 1, -1))


def exchanged(present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    For each row the row whose modality it gets: one cycle through those that have it, so that none keeps its own
    (but where it is the only one); rows without it stay without.
    """
    cycle = rng.permutation(np.flatnonzero(present))
    rows = np.arange(len(present))
    rows[cycle] = np.roll(cycle, 1)
    return rows


def pairs(num_rows: int, chunk: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All (i, j) with i, j < num_rows, a number of them at a time."""
    first, second = torch.meshgrid(torch.arange(num_rows), torch.arange(num_rows), indexing="ij")
    yield from zip(first.flatten().split(chunk), second.flatten().split(chunk), strict=True)


def shown_name(modality: str) -> str:
    return {"vision": "image", "audio": "sound"}.get(modality, modality)


def shown_names(modalities: Sequence[str]) -> str:
    return ", ".join(map(shown_name, modalities))
