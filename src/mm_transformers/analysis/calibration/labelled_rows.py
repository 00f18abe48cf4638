"""The labelled rows of a task, of which each counts once."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from .hidden_parts import stacked_labels, stacked_logits


class LabelledRows(NamedTuple):
    """
    Labelled rows of one task.

    Args:
        logits, labels (rows, ...): those of the task.
        numbers (rows,): the number of each row. A row with hidden parts keeps its number.
        natural (rows,) bool: whether the row is as it is, without hidden parts.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor
    natural: torch.Tensor

    def chosen(self, rows: torch.Tensor) -> "LabelledRows":
        """Some of the rows, by a bool or by numbers."""
        return LabelledRows(*(value[rows] for value in self))


def distinct_rows(groups: Iterable[LabelledRows]) -> tuple[LabelledRows, list[int]]:
    """
    One copy of each row of some groups: the row as it is, or else one with hidden parts.

    Returns:
        The rows, in the order of their numbers, and their places among all rows, one group after the other.
    """
    parts = list(groups)
    logits, labels = (stack([part[i] for part in parts]) for i, stack in enumerate((stacked_logits, stacked_labels)))
    together = LabelledRows(logits, labels, *(torch.cat([part[i] for part in parts]) for i in (2, 3)))
    natural_first = torch.argsort((~together.natural).int(), stable=True)
    _, first = np.unique(together.numbers[natural_first].numpy(), return_index=True)
    places = natural_first[torch.from_numpy(first)]
    return together.chosen(places), places.tolist()


def has_outcome(labels: torch.Tensor) -> torch.Tensor:
    """
    Which rows have a label with which an answer can be compared, (rows,) bool.

    Rows with only some values of a vector have none; rows with some labelled words have one.
    """
    if labels.is_floating_point():
        return ~labels.isnan().flatten(1).any(1) if labels.ndim > 1 else ~labels.isnan()
    return (labels != -100).flatten(1).any(1) if labels.ndim > 1 else labels != -100
