"""Loads files and data sets of the Hub as splits of rows."""

import functools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute as compute
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import metadata_load
from transformers.utils import logging

from ..model.label_cells import NO_NUMBER
from ..model.messages import one_line
from ..model.tasks import Task
from .cells import with_root
from .splitting import Part, hold_out_parts
from .tables import CHUNK_SIZE, SUFFIXES, TableRows


logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
# Bytes of 16 rows of Parquet. If they are larger, `datasets` converts fewer rows at a time.
_PART_BYTES = 2**22
TEXT_TYPES = (datasets.Value("string"), datasets.Value("large_string"))


def load_files(
    files: Mapping[str, str],
    media_columns: Sequence[str],
    root: str | None = None,
    cache_dir: str | None = None,
    option: str = "{split}",
) -> datasets.DatasetDict:
    """
    The rows of CSV, JSON lines or Parquet files. Cells of CSV are texts; see [`prepare_labels`].

    Args:
        files: split -> path.
        media_columns: columns of images, videos and sounds; relative paths in them become absolute.
        root: where these paths start; defaults to the folder of each file.
        cache_dir: the cache folder of `datasets`.
        option: the name in messages of the option that gave the file of a split.

    Raises:
        ValueError: if a file does not exist, is of another kind, has no rows, or cannot be read.
    """
    data = datasets.DatasetDict()
    for split, path in files.items():
        named = f"{option.format(split=split)} {path}"
        if Path(path).suffix not in SUFFIXES:
            raise ValueError(f"{named} must end in one of {', '.join(SUFFIXES)}.")
        if not Path(path).is_file():
            raise ValueError(f"{named} does not exist.")
        try:
            rows = _read(path, split, cache_dir)
        except ValueError as error:
            raise ValueError(f"{option.format(split=split)}: {one_line(error, 1000)}") from error
        except DatasetGenerationError as error:
            raise ValueError(f"{named} cannot be read: {one_line(error.__cause__ or error)}") from error
        for column in media_columns:
            rows = with_root(rows, column, root or str(Path(path).parent))
        data[split] = rows
    return data


def _read(path: str, split: str, cache_dir: str | None) -> datasets.Dataset:
    table = TableRows(Path(path))
    if table.path.suffix == ".parquet":  # may store features, such as images, beside the types of its columns
        # The loader of `datasets` unpacks as many rows at a time as it is told.
        num_rows = CHUNK_SIZE * _PART_BYTES // max(table.largest_part(), _PART_BYTES)
        return datasets.load_dataset(
            "parquet", data_files={split: path}, split=split, cache_dir=cache_dir, batch_size=max(num_rows, 1)
        )
    # The loaders of `datasets` guess types from the first rows of each part of a file; later rows may differ.
    stat = table.path.stat()
    return datasets.Dataset.from_generator(
        _rows_of,
        features=datasets.Features.from_arrow_schema(table.schema),
        cache_dir=cache_dir,
        gen_kwargs={"table": table, "version": (os.path.abspath(path), stat.st_mtime_ns, stat.st_size)},
        split=datasets.NamedSplit(split),
    )


def _rows_of(table: TableRows, version: Any) -> Iterator[dict[str, Any]]:
    """
    The rows of a file, for the cache of `datasets`.

    Args:
        version: of the file; `datasets` reads it anew when this changes.
    """
    yield from table


def load_named(name: str, config_name: str | None = None, cache_dir: str | None = None) -> datasets.DatasetDict:
    """
    The train, validation and test splits of a data set of the Hub or a folder; missing splits are left out.

    Raises:
        ValueError: if there are no training rows, or a folder names files elsewhere.
    """
    if os.path.isdir(name):
        _check_local(Path(name))
    data = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    if "train" not in data:
        raise ValueError(f"{name} has no split 'train'; its splits are {', '.join(data)}.")
    return datasets.DatasetDict({split: data[split] for split in SPLITS if split in data})


def _check_local(folder: Path) -> None:
    """
    Checks that a data set in a folder consists of files.

    Raises:
        ValueError: if the README of a data set, or its `.huggingface.yaml`, names addresses as its files.
    """
    card, plain = folder / "README.md", folder / ".huggingface.yaml"
    found = (metadata_load(card) if card.is_file() else None) or {}
    configs = [found.get("configs"), yaml.safe_load(plain.read_text("utf-8")) if plain.is_file() else None]
    if any("://" in text for text in _texts_in(configs)):
        raise ValueError(
            f"The data set in {folder} refers to files elsewhere, which are not fetched: download them first."
        )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts_in(item)


def hold_out(
    data: datasets.DatasetDict,
    fraction: float,
    columns: Mapping[str, Any],
    tasks: Iterable[Task],
    split: str = "validation",
) -> tuple[Part, Part] | None:
    """
    Takes a part of the training rows as another split, by [`hold_out_rows`]; an existing split is kept.

    Args:
        columns: `text_column`, `image_column`, `video_column`, `audio_column`, `own_columns`, `label_separator` and
            `group_column`, as in [`hold_out_rows`].
        tasks: the tasks whose labels are to be distributed equally.
        split: "validation" or "test".

    Returns:
        The training rows and the held-out rows, with their places among the earlier training rows; `None` if the split
        existed.

    Raises:
        ValueError: if the rows cannot be split.
    """
    if split in data:
        return None
    train, held_out = hold_out_parts(data["train"], fraction, tasks=tasks, **columns)
    logger.info(f"No {split} split: {len(held_out.rows):,} of {len(data['train']):,} training rows are held out.")
    data["train"], data[split] = train.rows, held_out.rows
    return train, held_out


def leave_out_empty_rows(
    data: datasets.DatasetDict, columns: Iterable[str], numbers: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """
    Removes the rows without any content from all splits, with a warning that counts them.

    Args:
        columns: those that the model reads; a split may lack some.
        numbers: those of them that hold numbers or dates, where texts such as "n/a" are missing cells.

    Returns:
        Split -> the numbers that the rows which are left had before.

    Raises:
        ValueError: if a split has no other rows.
    """
    columns, left = list(columns), {}
    for split, rows in data.items():
        read = [column for column in columns if column in rows.column_names]
        parts = rows.select_columns(read).with_format("arrow").iter(1000)
        filled = np.concatenate(
            [np.any([_has_content(part[column], column in numbers) for column in read], axis=0) for part in parts]
        )
        left[split] = np.flatnonzero(filled)
        if filled.all():
            continue
        names = ", ".join(map(repr, read))
        if not filled.any():
            raise ValueError(f"No {split} row has content in {names}.")
        count = np.sum(~filled)
        logger.warning(
            f"{count:,} of {len(rows):,} {split} rows {'has' if count == 1 else 'have'} no content in {names} and "
            f"{'is' if count == 1 else 'are'} left out; the first is row {filled.argmin():,}. Later messages number "
            "the other rows, unless they say 'of the training table'."
        )
        data[split] = rows.select(left[split])
    return left


def _has_content(cells: pyarrow.ChunkedArray, are_numbers: bool = False) -> np.ndarray:
    kind, valid = cells.type, compute.invert(cells.is_null(nan_is_null=True))
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        texts = compute.utf8_trim_whitespace(cells)
        filled = compute.greater(compute.utf8_length(texts), 0)
        if are_numbers:
            missing = compute.is_in(compute.utf8_lower(texts), value_set=pyarrow.array(sorted(NO_NUMBER), kind))
            filled = compute.and_not(filled, missing)
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        filled = compute.greater(compute.list_value_length(cells), 0)
    elif pyarrow.types.is_struct(kind):  # a picture: its path, its bytes
        fields = [compute.is_valid(compute.struct_field(cells, i)) for i in range(kind.num_fields)]
        filled = functools.reduce(compute.or_, fields) if fields else valid
    else:
        filled = valid
    return compute.and_(valid, compute.fill_null(filled, False)).to_numpy()


def sample_rows(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """
    A random choice of the rows of a split in their order, the same at each call; without a count all of them.

    Raises:
        ValueError: if the count is less than 1.
    """
    places = sample_places(len(rows), count)
    return rows if len(places) == len(rows) else rows.select(places)


def sample_places(num_rows: int, count: int | None) -> np.ndarray:
    """
    The places of the rows of [`sample_rows`]. Those of a smaller count are among those of a larger one.

    Raises:
        ValueError: if the count is less than 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"A number of rows must be at least 1, but is {count}.")
    if count is None or count >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(0).permutation(num_rows)[:count])


def check_columns(data: Mapping[str, datasets.Dataset], wanted: Mapping[str, tuple[str, ...]]) -> None:
    """
    Checks that each split has one of the columns of each option.

    Args:
        data: split -> rows.
        wanted: the option that names the columns -> columns, of which each split needs one.

    Raises:
        ValueError: if a split has none of them.
    """
    for split, rows in data.items():
        for option, names in wanted.items():
            if not set(names) & set(rows.column_names):
                columns = ", ".join(map(repr, rows.column_names))
                raise ValueError(f"The {split} rows have no column {names[0]!r}; set {option} to one of {columns}.")
