"""Rows in random order, with rows of the same image side by side."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class SharedImageSampler(Sampler[int]):
    """
    Row indices in a random order in which rows with the same image come together, up to `rows_per_image` at a time.

    A batch then reads and encodes an image once for all of its rows. The order depends on the seed and the epoch alone.

    Args:
        images: a value per row, equal for equal images; `None` for a row without an image.
        rows_per_image: the largest number of rows of an image that come together; 1 is the usual random order.
        seed: of the order.
    """

    def __init__(self, images: Iterable[Hashable], rows_per_image: int, seed: int = 0):
        # Numbered in order of appearance, and not by a hash, so that every process has the same order.
        numbers: dict[Hashable, int] = {}
        groups = [
            numbers.setdefault(("row", row) if key is None else key, len(numbers)) for row, key in enumerate(images)
        ]
        self.groups = np.array(groups, dtype=np.int64)
        self.rows_per_image, self.seed, self.epoch = rows_per_image, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self.epoch).tolist()

    def order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        rows = generator.permutation(len(self.groups))
        rows = rows[np.argsort(self.groups[rows], kind="stable")]
        groups = self.groups[rows]
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        place = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        chunks = np.cumsum((place % self.rows_per_image) == 0) - 1  # the number of the chunk of each row
        positions = generator.permutation(chunks[-1] + 1 if len(rows) else 0)
        return rows[np.argsort(positions[chunks], kind="stable")]


def images_of(rows: Any, column: Any) -> Iterator[Hashable]:
    """
    The images of [`SharedImageSampler`], from rows as the collator sees them.

    Images are equal by path or by the bytes of their files. Any other image, such as an array, counts as different from
    all others.

    Args:
        column: the [`MediaColumn`] of the images.
    """
    for start in range(0, len(rows), 1000):
        for row in rows.__getitems__(list(range(start, min(start + 1000, len(rows))))):
            keys = tuple(column.key(cell) for _, cell in column.cells(row))
            yield keys if keys and all(isinstance(key, (str, bytes)) for key in keys) else None
