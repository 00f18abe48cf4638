"""The rows of several data sets, in the order of an epoch or as one endless stream."""

from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .sources import StreamOfSource


# The index of a missing row in a batch.
NO_ROW = -1
# The uses of random numbers. Each has its own, so the order within a data set does not depend on the draws.
_ORDER, _DRAWS = 0, 1


class MixtureSampler(Sampler[int]):
    """
    Indices into the concatenated data sets; they depend on the seed and the epoch alone.

    Each epoch draws the same number of rows of a data set. It continues in the permutation of that data set where the
    last epoch stopped. Each permutation is shuffled anew, so all rows are used evenly.

    Args:
        sizes: the number of rows of each data set.
        shares: the share of each data set in an epoch; `None` for each row once.
        seed: of the order.
        batch_size: if given, every batch of that size is from one data set; -1 stands for missing rows.
        drop_last: leave out the batches that would have -1.
    """

    def __init__(
        self,
        sizes: list[int],
        shares: Optional[list[float]],
        seed: int,
        batch_size: Optional[int] = None,
        drop_last: bool = False,
    ):
        self.sizes, self.seed, self.batch_size = sizes, seed, batch_size
        self.epoch = 0
        unit = batch_size or 1
        if shares is not None:
            self.counts = [unit * n for n in apportion(-(-sum(sizes) // unit), shares)]
            self.steps = self.counts
        else:
            self.counts = [n - n % unit if drop_last else n for n in sizes]
            self.steps = sizes  # each epoch leaves out other rows

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        unit = self.batch_size or 1
        return sum(-(-n // unit) * unit for n in self.counts)

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for start in range(0, len(order), 10_000):  # Python integers take four times the memory
            yield from order[start : start + 10_000].tolist()

    def order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch, (len(self),) int64."""
        rng = np.random.default_rng([self.seed, _DRAWS, epoch])
        offsets = np.cumsum([0, *self.sizes])
        draws = [offsets[i] + self._rows(i, epoch * self.steps[i], n) for i, n in enumerate(self.counts)]
        if self.batch_size is None:
            return rng.permutation(np.concatenate(draws))
        lacking = [-len(rows) % self.batch_size for rows in draws]
        draws = [np.pad(rows, (0, n), constant_values=NO_ROW) for rows, n in zip(draws, lacking, strict=True)]
        return rng.permutation(np.concatenate(draws).reshape(-1, self.batch_size)).reshape(-1)

    def _rows(self, i: int, start: int, count: int) -> np.ndarray:
        """A piece of the endless sequence of the permutations of a data set."""
        size = self.sizes[i]
        passes = range(start // size, -(-(start + count) // size))
        orders = [permutation(self.seed, i, n, size) for n in passes]
        piece = np.concatenate(orders) if orders else np.empty(0, dtype=np.int64)
        return piece[start % size :][:count]


def permutation(seed: int, i: int, n: int, size: int) -> np.ndarray:
    """The order of the n-th pass through the i-th data set."""
    return np.random.default_rng([seed, _ORDER, i, n]).permutation(size)


def apportion(total: int, shares: list[float]) -> list[int]:
    """Integers that sum to the total, by largest remainder; at least 1 each, at the cost of the largest."""
    exact = np.array(shares) / sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    while (counts == 0).any() and counts.max() > 1:
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return [max(int(count), 1) for count in counts]


class MixedRows(Dataset[dict[str, Any]]):
    """The concatenated rows of map-style data sets, with their sampler."""

    def __init__(self, parts: list[Any], sampler: MixtureSampler):
        self.parts, self.sampler = parts, sampler
        self.offsets = np.cumsum([0, *map(len, parts)])

    def set_epoch(self, epoch: int) -> None:
        # If batches are skipped on several processes, accelerate finds this, but not the sampler.
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        kept = np.array([index for index in indices if index != NO_ROW])
        which = np.searchsorted(self.offsets, kept, side="right") - 1
        for i in np.unique(which):
            mine = kept[which == i]
            found = self.parts[i].__getitems__((mine - self.offsets[i]).tolist())
            rows.update(zip(mine.tolist(), found, strict=True))
        return [rows[index] for index in kept.tolist()]


class MixedStream(IterableDataset[dict[str, Any]]):
    """
    An endless stream of rows from streams and map-style data sets, drawn by the shares.

    Each process and each worker of its data loader reads its own part of every data set, again and again.

    Args:
        parts: the data sets.
        shares: the probability of each.
        seed: of draws, and of the order of map-style data sets.
        batch_size: if given, this number of consecutive rows is from one data set.
    """

    def __init__(self, parts: list[Any], shares: list[float], seed: int, batch_size: Optional[int] = None):
        self.parts, self.seed, self.batch_size = parts, seed, batch_size
        self.shares = np.array(shares) / sum(shares)
        self.rank, self.num_processes = 0, 1

    def read_own_part(self, dataset: Any) -> None:
        """
        Makes this process read its own part only.

        Args:
            dataset: this stream, as accelerate has put it into the data loader of a process. With several processes, it
                is inside an `IterableDatasetShard`, for which every process would read all rows and keep its share.
        """
        if dataset is not self:
            self.rank, self.num_processes = dataset.process_index, dataset.num_processes
            dataset.process_index, dataset.num_processes = 0, 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        consumer, num_consumers = self.rank * num_workers + worker_id, self.num_processes * num_workers
        rng = np.random.default_rng([self.seed, _DRAWS, consumer])
        rows = [self._again_and_again(i, consumer, num_consumers) for i in range(len(self.parts))]
        while True:
            for i in rng.choice(len(rows), size=1000, p=self.shares):
                for _ in range(self.batch_size or 1):
                    yield next(rows[i])

    def _again_and_again(self, i: int, consumer: int, num_consumers: int) -> Iterator[dict[str, Any]]:
        part = self.parts[i]
        n = 0
        while True:
            row = None
            if isinstance(part, StreamOfSource):
                for row in part.part(consumer, num_consumers, n):
                    yield row
            else:
                for index in permutation(self.seed, i, n, len(part))[consumer::num_consumers].tolist():
                    row = part[index]
                    yield row
            if row is None:
                raise ValueError(
                    f"Data set {part.source.name!r} has no row for part {consumer + 1} of {num_consumers} (processes "
                    "times data loader workers): it is empty, can be read only once, or has fewer rows than parts."
                )
            n += 1
