"""Rows with several processes: each reads its share of a stream, and repeated rows count once."""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch.utils.data import IterableDataset


# In an evaluation batch: the repeated rows. [`MMTrainer`] removes this key before the model runs.
IS_REPEATED = "is_repeated"


class Repeated(NamedTuple):
    """A repeated row that pads the last batch."""

    row: Any


class ShareOfStream(IterableDataset[dict[str, Any]]):
    """
    The rows of one process: one batch in each group of as many batches as processes.

    The last batches are padded with the first rows of the stream, so that all processes have the same number of
    batches. Those rows are [`Repeated`].

    Args:
        dataset: the stream, of which every process reads all rows.
    """

    def __init__(self, dataset: Any):
        self.dataset, self.batch_size, self.rank, self.num_processes = dataset, 1, 0, 1

    def read_own_part(self, dataset: Any) -> None:
        """
        Makes this process read its own share only.

        Args:
            dataset: the `IterableDatasetShard` of accelerate around this. It then passes the rows on unchanged.
        """
        if dataset is self:
            return
        self.rank, self.num_processes = dataset.process_index, dataset.num_processes
        self.batch_size = dataset.batch_size // (self.num_processes if dataset.split_batches else 1)
        dataset.process_index, dataset.num_processes, dataset.batch_size, dataset.split_batches = 0, 1, 1, False

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        elif isinstance(getattr(self.dataset, "generator", None), torch.Generator):
            self.dataset.generator.manual_seed(epoch)  # as in accelerate, so that all processes draw the same

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.batch_size * self.num_processes)) * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        size = self.batch_size * self.num_processes
        rows, first = iter(self.dataset), list[Any]()
        while batch := list(islice(rows, size)):
            first = first or batch
            repeated = [Repeated(row) for row in islice(cycle(first), size - len(batch))]
            yield from [*batch, *repeated][self.rank * self.batch_size :][: self.batch_size]


class WithoutRepeats:
    """
    A collator that removes the labels of [`Repeated`] rows.

    Args:
        collator: makes a batch of rows, with `labels`, a dict from task to tensor.
        tells: whether batches have `is_repeated`, (batch,) int64: 1 for these rows.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], tells: bool):
        self.collator, self.tells = collator, tells

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        repeated = torch.tensor([isinstance(row, Repeated) for row in rows])
        batch = self.collator([row.row if isinstance(row, Repeated) else row for row in rows])
        _unlabel(batch, repeated)
        return {**batch, IS_REPEATED: repeated.long()} if self.tells else batch


def unlabel_repeated_rows(batch: dict[str, Any], num_rows: int, batch_size: int, rank: int, num_processes: int) -> None:
    """
    Removes the labels of repeated rows in the last batch of an epoch.

    accelerate pads the last batches with the first rows of the epoch, so that all processes have the same number. These
    rows must not count twice.

    Args:
        num_rows: of the epoch, in all processes together; 0 if unknown.
        batch_size: of one process.
    """
    num_left = num_rows % (batch_size * num_processes)
    if num_processes > 1 and num_left > 0:
        num_own = min(max(num_left - batch_size * rank, 0), batch_size)
        _unlabel(batch, slice(num_own, None))


def _unlabel(batch: dict[str, Any], rows: torch.Tensor | slice) -> None:
    for labels in batch.get("labels", {}).values():
        labels[rows] = torch.nan if labels.is_floating_point() else -100


def gather_once(accelerator: Accelerator, is_repeated: torch.Tensor) -> Callable[[Any], Any]:
    """
    A function that gathers tensors of all processes, without those of repeated rows.

    Args:
        is_repeated (batch,): of this process.
    """
    kept = accelerator.gather(is_repeated) == 0

    def gather(values: Any) -> Any:
        # Tensors of another length do not belong to these rows.
        return recursively_apply(lambda x: x[kept] if len(x) == len(kept) else x, accelerator.gather(values))

    return gather
