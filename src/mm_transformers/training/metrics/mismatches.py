"""Mismatched pairs for the evaluation of tasks that judge pairs, independent of batches and processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction
from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.sources import is_iterable
from ...model.modalities import modalities_of
from ...model.pairs import Pairs, PairTask


logger = logging.get_logger(__name__)

# The number of draws for a row before a search through all rows.
_TRIES = 20
# The number of texts or items whose non-matching rows are cached.
_KEPT = 1000


def draw_mismatches(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """
    Draws mismatched pairs for each row with a pair: its text with another item, and its item with another text.

    All rows that qualify are equally likely.

    Args:
        labels (rows, 4): those of a [`Matching`] task for the whole evaluation set.

    Returns:
        (rows, 2) int64: row numbers; -1 if no row qualifies.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.nonzero(labels[:, 0] == 1)[:, 0]
    ids = labels[pairs, 1:]
    known = Pairs.of(ids)
    drawn = torch.full((len(labels), 2), -1)
    for side, others in ((0, known.items), (1, known.texts)):
        own = ids[:, side].contiguous()

        def may(these: torch.Tensor, those: torch.Tensor, side: int = side) -> torch.Tensor:
            return ~(known.hold(these, those) if side == 0 else known.hold(those, these))

        chosen, open_rows = torch.full((len(pairs),), -1), torch.arange(len(pairs))
        for _ in range(_TRIES if len(pairs) else 0):
            tried = torch.randint(len(pairs), (len(open_rows),), generator=generator)
            good = may(own[open_rows], ids[tried, 1 - side])
            chosen[open_rows[good]] = tried[good]
            open_rows = open_rows[~good]
        # The rest by a full search: each distinct one once, weighted by its number of rows.
        place = torch.searchsorted(others, ids[:, 1 - side].contiguous())
        counts, order = place.bincount(minlength=len(others)), place.argsort(stable=True)
        firsts = counts.cumsum(0) - counts
        sums: dict[int, torch.Tensor] = {}  # of texts or items that several rows share
        for row in open_rows.tolist():
            key = int(own[row])
            if key not in sums:
                sums[key] = (counts * may(own[row].expand(len(others)), others)).cumsum(0)
            total = int(sums[key][-1])
            if total:
                draw = int(torch.randint(total, (1,), generator=generator))
                other = int(torch.searchsorted(sums[key], draw, right=True))
                before = int(sums[key][other] - counts[other])
                chosen[row] = order[int(firsts[other]) + draw - before]
            if len(sums) > _KEPT:
                sums.clear()
        found = chosen >= 0
        drawn[pairs[found], side] = pairs[chosen[found]]
    return drawn


class MismatchedRows(Dataset[dict[str, Any]]):
    """
    Rows with some cells of other rows, without labels.

    Args:
        rows: of a data set, as in the collator.
        numbers: the rows.
        others: for each of them, the row of its new cells.
        columns: the columns that come from there.
        kept: the columns that it keeps; all others are left out.
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


def mismatched_rows(
    task: PairTask, rows: Any, labels: np.ndarray | torch.Tensor, collator: MMDataCollator
) -> Iterator[tuple[int, np.ndarray, MismatchedRows]]:
    """
    The mismatched pairs with which a task is evaluated.

    First come pairs with the item of another row, then pairs with the text of another row.

    Args:
        task: a task that needs mismatched pairs.
        rows: of the evaluation set, as in the collator.
        labels (rows, 4): of the task.
        collator ([`MMDataCollator`]): The columns.

    Yields:
        The column of their logits; the numbers of their rows; the pairs.
    """
    text = collator.text_columns
    drawn = draw_mismatches(torch.as_tensor(labels)).numpy()
    items = [column for part in modalities_of(task.modality) for column in collator.columns_of(part.argument)]
    for side, columns in enumerate((items, text)):
        numbers = np.flatnonzero(drawn[:, side] >= 0)
        if len(numbers):
            kept = [column for column in collator.input_columns if column not in columns]
            yield (
                1 + side,
                numbers,
                MismatchedRows(rows, numbers.tolist(), drawn[numbers, side].tolist(), columns, kept),
            )


class Unlabelled:
    """
    A collator whose batches have no labels.

    Args:
        collator ([`MMDataCollator`]): The collator.
    """

    def __init__(self, collator: MMDataCollator):
        self.collator = collator

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        del batch["labels"]
        return batch


class WithMismatches:
    """
    A `compute_metrics` that first judges mismatched pairs for the tasks that need them.

    The pairs are drawn from the whole evaluation set, so metrics depend neither on the batch size nor on the number of
    processes.

    Args:
        tasks: the tasks that need mismatched pairs. Streams have none, which is a warning.
        rows: of the evaluation set, in its order, as in the collator.
        collator ([`MMDataCollator`]): The columns.
        answer: returns the logits of a data set of rows, a dict from task to array.
        own: the `compute_metrics` that follows.
    """

    def __init__(
        self,
        tasks: Sequence[PairTask],
        rows: Any,
        collator: MMDataCollator,
        answer: Callable[[MismatchedRows], dict[str, np.ndarray]],
        own: Callable[[EvalPrediction], dict[str, float]],
    ):
        self.tasks, self.rows, self.collator, self.answer, self.own = tasks, rows, collator, answer, own
        if tasks and is_iterable(rows):
            logger.warning_once(
                f"The evaluation rows are a stream, so task {tasks[0].name!r} gets mismatched pairs from the rows of "
                "one batch: its metrics depend on the batch size."
            )
            self.tasks = []

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        for task in self.tasks:
            logits, labels = prediction.predictions[task.name], prediction.label_ids[task.name]
            logits[:, 1:] = np.nan  # other rows of the same batch
            for column, numbers, rows in mismatched_rows(task, self.rows, labels, self.collator):
                logits[numbers, column] = self.answer(rows)[task.name][:, 0]
        return self.own(prediction)
