"""What training has seen: rows of each data set of a mixture, labels of each task."""

from typing import Any

import torch
from transformers.utils import logging

from ..data.sources import ROWS_PER_SOURCE


logger = logging.get_logger(__name__)


class TrainingCounts:
    """
    Args:
        tasks: the names of the tasks.
        sources: the names of the data sets of the mixture; none if there is no mixture.
    """

    def __init__(self, tasks: list[str], sources: list[str]):
        self.tasks, self.sources = tasks, sources
        self.reset()

    def reset(self) -> None:
        self._rows: Any = 0
        self._labels: Any = None

    def take_rows(self, batches: list[dict[str, Any]]) -> None:
        """Takes out of the batches what the collator has counted; models know nothing of it."""
        for batch in batches:
            if ROWS_PER_SOURCE in batch:
                self._rows = self._rows + batch.pop(ROWS_PER_SOURCE)

    def add_labels(self, counts: torch.Tensor) -> None:
        """The labels of an optimiser step, (num_tasks,), the same on all processes."""
        self._labels = counts if self._labels is None else self._labels + counts

    def rows_since_last(self, accelerator: Any) -> dict[str, int]:
        """How many rows of each data set all processes have seen since the last call."""
        if not torch.is_tensor(self._rows):
            return {}
        rows = accelerator.reduce(self._rows, reduction="sum").tolist()
        self._rows = 0
        return {f"rows_{name}": count for name, count in zip(self.sources, rows, strict=True)}

    def warn_of_unlabelled(self) -> None:
        if self._labels is not None:
            for task, count in zip(self.tasks, self._labels.tolist(), strict=True):
                if count == 0:
                    logger.warning(
                        f"No row that was trained on had a label of task {task!r}, so its head has learned nothing."
                    )
