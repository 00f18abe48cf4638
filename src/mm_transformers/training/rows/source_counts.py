"""Counts the training rows of each data set of a mixture."""

from typing import Any

import torch
from accelerate import Accelerator

from ...data.sources import ROWS_PER_SOURCE


class RowCounts:
    """
    Counts the training rows of each data set of a mixture.

    Args:
        sources: the names of the data sets of the mixture; empty without a mixture.
    """

    def __init__(self, sources: list[str]):
        self.sources = sources
        self.reset()

    def reset(self) -> None:
        self._rows: Any = 0

    def take_rows(self, batches: list[dict[str, Any]]) -> None:
        """Removes the counts of the collator from the batches; they are no input of the model."""
        for batch in batches:
            if ROWS_PER_SOURCE in batch:
                self._rows = self._rows + batch.pop(ROWS_PER_SOURCE)

    def rows_since_last(self, accelerator: Accelerator) -> dict[str, int]:
        """The number of rows of each data set in all processes since the last call."""
        if not torch.is_tensor(self._rows):
            return {}
        rows = accelerator.reduce(self._rows, reduction="sum").tolist()
        self._rows = 0
        return {f"rows_{name}": count for name, count in zip(self.sources, rows, strict=True)}
