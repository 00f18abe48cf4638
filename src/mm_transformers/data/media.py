"""Reads the images, videos, sounds and columns of a batch, once each; errors name the row."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Optional

import torch
from transformers.utils import logging

from ..model.limits import CarriedLimits, limits
from ..model.modalities import Modality
from ..model.processing_mm_transformer import check_number
from .addresses import NO_ADDRESSES, Addresses
from .sources import own_column


logger = logging.get_logger(__name__)

# The number of bad files that are named, each in a separate warning.
MOST_NAMED = 100


class SharedCounter:
    """A counter for the workers of a data loader. Each has a separate place, so that none waits."""

    def __init__(self) -> None:
        self._counts = torch.zeros(256, dtype=torch.int64).share_memory_()

    def __int__(self) -> int:
        return int(self._counts.sum())

    def add_one(self) -> None:
        worker = torch.utils.data.get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % (len(self._counts) - 1)] += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._counts.share_memory_()  # a copy is not


class RowColumns:
    """
    Several columns that form one item of a row, such as numbers and categories.

    Args:
        columns: their names.
        modality: the kind of the item.
        load: a dict from column to cell -> the input of the processor, `None` if all cells are missing; raises
            `ValueError` with one sentence.
    """

    def __init__(self, columns: Sequence[str], modality: Modality, load: Callable[[Any], Any]):
        self.columns, self.modality, self.load = list(columns), modality, load

    def read(self, rows: list[Mapping[str, Any]], names: list[str]) -> tuple[list[list[Any]], list[bool]]:
        """
        The item of each row, read, and whether the row has one. A wrong cell is an error, and not a bad file.

        Args:
            names: the names of the rows in messages.
        """
        result = []
        for row, name in zip(rows, names, strict=True):
            try:
                item = self.load({column: row[column] for column in self.columns if column in row})
            except ValueError as error:
                raise type(error)(f"{name}, {error}; correct it, or leave the cell empty.") from None
            result.append([] if item is None else [item])
        return result, [bool(items) for items in result]


def check_on_bad_file(choice: str) -> None:
    """
    Checks the reaction to items that cannot be read.

    Raises:
        ValueError: if there is no such reaction.
    """
    if choice not in ("raise", "drop"):
        raise ValueError(f"on_bad_file must be 'raise' or 'drop', but is {choice!r}.")


class MediaColumn:
    """
    The column of images, videos or sounds, or several columns whose items come one after the other.

    Args:
        columns: their names.
        modality: the kind of its items; splits a cell into them.
        load: an item -> the input of the processor; raises `ValueError` with one sentence. It takes `most_pixels` if
            the modality limits pixels.
        on_bad_file: `"raise"`, or `"drop"` to count and drop items that cannot be read.
        num_bad_files: the counter of dropped items.
        addresses: the addresses in cells that may be fetched; none by default.
        process: an item, read -> the same as the image processor resizes it, for items beyond the limit `batch_pixels`.
    """

    def __init__(
        self,
        columns: Sequence[str],
        modality: Modality,
        load: Callable[[Any], Any],
        on_bad_file: str,
        num_bad_files: SharedCounter,
        addresses: Addresses = NO_ADDRESSES,
        process: Optional[Callable[[Any], Any]] = None,
    ):
        self.columns, self.split, self.key, self.load = list(columns), modality.items, modality.key, load
        self.on_bad_file, self.num_bad_files, self.addresses = on_bad_file, num_bad_files, addresses
        self.pixels_for_each: Callable[[list[Any]], Optional[int]] = modality.pixels_for_each
        self.num_pixels, self.process = modality.num_pixels, process
        self.limits = CarriedLimits()

    def read(self, rows: list[Mapping[str, Any]], names: list[str]) -> tuple[list[list[Any]], list[bool]]:
        """
        The items of each row, read, and whether the row had any. Shared items are one object.

        Args:
            names: the names of the rows in messages.
        """
        loaded: dict[Hashable, Any] = {}
        kept = []  # a key may be the id of an object, which is reused after its deletion
        result, were_there, pixels = [], [], 0
        for row, name in zip(rows, names, strict=True):
            cells = self.cells(row)
            items = []
            are_few = self._are_few(cells, row, name)
            most = self.pixels_for_each([cell for _, cell in cells]) if are_few else None
            for column, cell in cells if are_few else ():
                key = (self.key(cell), most)
                kept.append(cell)
                if key not in loaded:
                    item = self.load_item(cell, f"{name}, column {own_column(row, column)!r}", most)
                    if item is not None and self.process is not None:
                        pixels += self.num_pixels(item)
                        if pixels > limits().batch_pixels:
                            item = self.process(item)
                    loaded[key] = item
                if loaded[key] is None:
                    self.num_bad_files.add_one()
                else:
                    items.append(loaded[key])
            result.append(items)
            were_there.append(len(cells) > 0)
        return result, were_there

    def cells(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The items of a row, not read, each with its column."""
        return [(column, cell) for column in self.columns for cell in self.split(row.get(column))]

    def load_item(self, cell: Any, where: str, most_pixels: Optional[int] = None) -> Any:
        """
        One item, read; `None` if it cannot be read and is dropped. The drop is not counted here.

        Args:
            where: the name of row and column in messages.
            most_pixels: the number of pixels that the item may keep.
        """
        options = {} if most_pixels is None else {"most_pixels": most_pixels}
        try:
            return self.load(self.addresses.at_hand(cell), **options)
        except ValueError as error:
            self._refuse(error, where)
            return None

    def _are_few(self, cells: list[tuple[str, Any]], row: Mapping[str, Any], name: str) -> bool:
        """Whether the number of items of a row is within the limit; otherwise they count as one unreadable item."""
        try:
            check_number(cells, "items")
        except ValueError as error:
            columns = ", ".join(repr(own_column(row, column)) for column in self.columns)
            self._refuse(error, f"{name}, column {columns}")
            self.num_bad_files.add_one()
            return False
        return True

    def _refuse(self, error: ValueError, where: str) -> None:
        where = f"{where}: {error}"
        if self.on_bad_file == "raise":
            raise type(error)(
                f"{where}; repair or remove it, or pass on_bad_file='drop' to treat it as missing."
            ) from None
        if int(self.num_bad_files) < MOST_NAMED:
            logger.warning(f"{where}; treated as missing.")
        elif int(self.num_bad_files) == MOST_NAMED:
            logger.warning(f"{MOST_NAMED} bad files have been listed; more bad files are only counted.")
