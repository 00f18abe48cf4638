"""Mismatched pairs for the evaluation of tasks that judge pairs: the same whatever the batches and processes are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction

from ..data.feature_reading import KINDS
from ..model.pairs import Pairs


# How often a row is drawn anew before all rows are looked through.
_TRIES = 20


def draw_mismatches(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """
    Draws, for each row that is a pair, another pair whose item does not belong to its text, and one whose text does not
    belong to its item; all that qualify are equally likely.

    Args:
        labels (rows, 4): those of a [`Matching`] task for the whole evaluation set.

    Returns:
        (rows, 2) int64: numbers of rows; -1 where there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.nonzero(labels[:, 0] == 1)[:, 0]
    ids = labels[pairs, 1:]
    known = Pairs.of(ids)
    drawn = torch.full((len(labels), 2), -1)
    for side in (0, 1):

        def may(rows: torch.Tensor, others: torch.Tensor, side: int = side) -> torch.Tensor:
            text, item = (rows, others) if side == 0 else (others, rows)
            return ~known.hold(ids[text, 0], ids[item, 1])

        chosen, open_rows = torch.full((len(pairs),), -1), torch.arange(len(pairs))
        for _ in range(_TRIES if len(pairs) else 0):
            others = torch.randint(len(pairs), (len(open_rows),), generator=generator)
            good = may(open_rows, others)
            chosen[open_rows[good]] = others[good]
            open_rows = open_rows[~good]
        everybody = torch.arange(len(pairs))
        for row in open_rows:
            candidates = everybody[may(row.expand(len(pairs)), everybody)]
            if len(candidates):
                chosen[row] = candidates[torch.randint(len(candidates), (1,), generator=generator)]
        found = chosen >= 0
        drawn[pairs[found], side] = pairs[chosen[found]]
    return drawn


class MismatchedRows(Dataset):
    """
    Rows with some cells of other rows, without labels.

    Args:
        rows: of a data set, as the collator takes them.
        numbers: the rows.
        others: for each of them, whose cells it gets.
        columns: the columns that it gets from there.
        kept: the columns that it keeps; what is neither is left out.
    """

    def __init__(self, rows: Any, numbers: Sequence[int], others: Sequence[int], columns: list[str], kept: list[str]):
        self.rows, self.numbers, self.others, self.columns, self.kept = rows, numbers, others, columns, kept

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        own = self.rows.__getitems__([self.numbers[index] for index in indices])
        theirs = self.rows.__getitems__([self.others[index] for index in indices])
        return [
            {c: mine[c] for c in self.kept if c in mine} | {c: other[c] for c in self.columns if c in other}
            for mine, other in zip(own, theirs, strict=True)
        ]


class Unlabelled:
    """
    A collator whose batches have no labels.

    Args:
        collator ([`MMDataCollator`]): The collator.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        del batch["labels"]
        return batch


class WithMismatches:
    """
    A `compute_metrics` that first judges mismatched pairs for the tasks that need them. The pairs are drawn from the
    whole evaluation set, so metrics depend neither on the batch size nor on the number of processes.

    Args:
        tasks: the tasks that need mismatched pairs.
        rows: of the evaluation set, in its order, as the collator takes them.
        collator ([`MMDataCollator`]): Knows the columns.
        answer: gives the logits of a data set of rows, a dict from task to array.
        own: the `compute_metrics` that follows.
    """

    def __init__(
        self,
        tasks: list[Any],
        rows: Any,
        collator: Any,
        answer: Callable[[Dataset], dict[str, np.ndarray]],
        own: Callable[[EvalPrediction], dict[str, float]],
    ):
        self.tasks, self.rows, self.collator, self.answer, self.own = tasks, rows, collator, answer, own

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        text, media = self.collator.text_column, self.collator.media
        for task in self.tasks:
            logits, labels = prediction.predictions[task.name], prediction.label_ids[task.name]
            drawn = draw_mismatches(torch.as_tensor(labels)).numpy()
            items = [media[kind].column for kind in KINDS[task.modality] if kind in media]
            everything = [text, *(column.column for column in media.values())]
            logits[:, 1:] = np.nan  # other rows of the same batch
            for side, columns in enumerate((items, [text])):
                numbers = np.flatnonzero(drawn[:, side] >= 0)
                if len(numbers):
                    kept = [column for column in everything if column not in columns]
                    rows = MismatchedRows(self.rows, numbers.tolist(), drawn[numbers, side].tolist(), columns, kept)
                    logits[numbers, 1 + side] = self.answer(rows)[task.name][:, 0]
        return self.own(prediction)
