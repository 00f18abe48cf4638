"""
The one definition of a cell.

One part depends on the data set: its features and its folder. The other part depends on the task or modality that reads
the cell.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from torch.utils.data import ChainDataset, ConcatDataset, Dataset, IterableDataset, Subset
from transformers.utils import logging

from ..model.file_contents import is_absent, is_address
from ..model.label_cells import PADDING, as_scalar, is_missing
from ..model.modalities import MODALITIES
from .formulas import with_formula


if TYPE_CHECKING:
    from ..model.task_base import Task


logger = logging.get_logger(__name__)

# The separator in texts with several labels.
LABEL_SEPARATOR = "|"
# The depth of nested lists of numbers that form one item, by the argument of the processor.

Reader = Callable[[Any], Any]


def label_of(task: "Task", cell: Any, text: str = "", separator: str = LABEL_SEPARATOR) -> Any:
    """
    The encoded label of a cell, `None` if it is missing.

    Args:
        task ([`Task`]): Defines the meaning of texts and values.
        cell: from a [`RowReader`].
        text: the text of the row.
        separator: the separator in texts with several labels.

    Raises:
        ValueError: one sentence without the name of the row, if the cell is neither a label nor missing.

    Example:

    ```python
    >>> label_of(MultiLabel("tags", labels=["sea", "sun"]), '["sun"]')
    [1]
    ```
    """
    cell = as_scalar(cell)
    if not isinstance(cell, str):
        return task.encode_label(cell, text)
    try:
        return task.encode_label(task.read_known_text(cell, separator), text)
    except ValueError:
        written = with_formula(cell)  # the text before `predict` escaped it
        if written == cell:
            raise
        return task.encode_label(task.read_known_text(written, separator), text)


class RowReader:
    """
    Reads the rows of one data set.

    - Ids of `ClassLabel` become names, since each data set has its own order of names. -1 becomes `None`, in lists
      -100.
    - Lists of numbers in columns of pictures, videos and sounds become arrays of the declared type.
    - Cells of `Image`, `Audio` and `Video` keep the options of that feature, under "cast".

    Args:
        features (`dict`, *optional*): Column -> feature of `datasets`; without it, rows are unchanged.
        media (`dict[str, str]`, *optional*):
            Columns of pictures, videos and sounds -> the argument of the processor, or `None` if lists stay lists.
        root (`str`, *optional*): The folder where relative paths in these columns start.
    """

    def __init__(
        self,
        features: Optional[Mapping[str, Any]] = None,
        media: Optional[Mapping[str, Optional[str]]] = None,
        root: Optional[str] = None,
    ):
        media = media or {}
        self.columns: dict[str, list[Reader]] = {}
        for name, feature in (features or {}).items():
            read = _name_reader(feature) or (_media_reader(feature, media[name]) if name in media else None)
            self.columns[name] = [] if read is None else [read]
        if root is not None:
            for name in media:
                self.columns[name] = [partial(absolute_paths, root=root), *self.columns.get(name, [])]
        self.columns = {name: readers for name, readers in self.columns.items() if readers}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        cells = dict(row)
        for name, readers in self.columns.items():
            if name in cells:
                try:
                    for read in readers:
                        cells[name] = read(cells[name])
                except ValueError as error:
                    raise ValueError(f"column {name!r}: {error}") from error
        return cells


class Source(NamedTuple):
    """A data set with undecoded cells, and the reader of its rows."""

    dataset: Any
    reader: RowReader


def opened(dataset: Any, media: Mapping[str, Optional[str]]) -> Source:
    """
    The cells of a data set as they are stored, with the reader of its rows.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, in any format; a list of dicts; a pandas `DataFrame` or
            another table; or `Subset`s and `ConcatDataset`s of torch of these. A format hides no column.
        media: as in [`RowReader`].
    """
    import datasets

    if isinstance(dataset, Subset):
        inner, reader = opened(dataset.dataset, media)
        return Source(Subset(inner, dataset.indices), reader)
    if isinstance(dataset, ConcatDataset):
        return Source(ConcatDataset([_Read(*opened(part, media)) for part in dataset.datasets]), RowReader())
    if isinstance(dataset, ChainDataset):
        return Source(ChainDataset([_ReadStream(*opened(part, media)) for part in dataset.datasets]), RowReader())
    dataset = as_records(dataset)
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return Source(dataset, RowReader())
    if isinstance(dataset, datasets.Dataset):
        layout, shown = dataset.format["type"], dataset.format["columns"]
        hidden = [column for column in media if column in dataset.column_names and column not in shown]
        if layout == "custom":
            # The output of the user's own transform stays unchanged.
            for column in hidden if len(dataset) > 0 else ():
                if column not in dataset[0]:
                    logger.warning_once(
                        f"The transform of the data set hides its column {column!r}, so the column cannot be read. "
                        "Keep all columns by with_transform(..., output_all_columns=True)."
                    )
            return Source(dataset, RowReader(dataset.features))
        for column in hidden:
            logger.warning_once(
                f"The format of the data set hides its column {column!r}, but the column is still read. To ignore "
                f"the column, use remove_columns({column!r})."
            )
        if layout is not None or len(shown) < len(dataset.column_names):
            dataset = dataset.with_format(None)
    elif getattr(dataset, "_formatting", None) is not None:
        dataset = dataset.with_format(None)
    for column in media:
        dataset = undecoded(dataset, column)
    features = dataset.features or {}
    arrays = [name for name in media if name in features and _array_type(features[name], media[name])]
    if isinstance(dataset, datasets.Dataset):
        arrays = [name for name in arrays if not any(map(_numpy_loses_nulls, dataset.data.column(name).chunks))]
    if arrays and isinstance(dataset, datasets.Dataset):
        dataset = dataset.with_format("numpy", columns=arrays, output_all_columns=True)  # 20 times as fast as lists
    return Source(dataset, RowReader(features, media))


def _numpy_loses_nulls(column: Any, is_cell: bool = True) -> bool:
    """
    Whether the format "numpy" of `datasets` turns missing values of a pyarrow column into NaN.

    This happens to missing arrays and to missing items inside lists. Missing lists become `None`.
    """
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column, is_cell = column.storage, False
    if not is_cell and column.null_count > 0:
        return True
    return hasattr(column, "values") and _numpy_loses_nulls(column.values, False)


class _Read(Dataset[dict[str, Any]]):
    """Rows of a part of a data set, read."""

    def __init__(self, dataset: Any, reader: RowReader):
        self.dataset, self.reader = dataset, reader

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.reader(self.dataset[index])


class _ReadStream(IterableDataset[dict[str, Any]]):
    """Rows of a part of a stream, read."""

    def __init__(self, dataset: Any, reader: RowReader):
        self.dataset, self.reader = dataset, reader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.reader, self.dataset)


def as_records(dataset: Any) -> Any:
    """
    A table of pandas, polars or pyarrow as a list of dicts; anything else unchanged.

    A table with the features of a data set becomes a data set, since features hold the names of labels.
    """
    metadata = getattr(getattr(dataset, "schema", None), "metadata", None) or {}
    if b"huggingface" in metadata and hasattr(dataset, "to_batches"):
        import datasets

        is_plain = not isinstance(dataset, datasets.table.Table)
        return datasets.Dataset(datasets.table.InMemoryTable(dataset) if is_plain else dataset)
    if hasattr(dataset, "iloc") and hasattr(dataset, "columns"):
        rows = [{str(name): cell for name, cell in row.items()} for row in dataset.to_dict("records")]
        return [{name: _as_lists(cell) for name, cell in row.items()} for row in rows]
    for method in ("to_dicts", "to_pylist"):
        if hasattr(dataset, method) and not hasattr(dataset, "features"):
            return getattr(dataset, method)()
    return dataset


def _as_lists(cell: Any) -> Any:
    """Arrays of objects, and empty arrays, as lists, as in other sources; pandas turns lists into arrays."""
    code = getattr(getattr(cell, "dtype", None), "kind", None)
    if code is None or cell.ndim == 0 or (code != "O" and cell.shape != (0,)):
        return cell
    return [_as_lists(item) for item in cell]


# Labels


def _name_reader(feature: Any, missing: Optional[int] = None) -> Optional[Reader]:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names or [])
        # Names that only repeat the ids, as in `ClassLabel(num_classes=3)`, carry no information.
        names = [] if names == [str(i) for i in range(len(names))] else names
        return partial(_name_of, names=names, missing=missing)
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    read = None if inner is None or isinstance(inner, dict) else _name_reader(inner, PADDING)
    return None if read is None else partial(_each, read=read)


def _name_of(cell: Any, names: Sequence[str], missing: Optional[int]) -> Any:
    cell = as_scalar(cell)
    if is_missing(cell) or cell == -1:
        return missing
    if names and isinstance(cell, int) and not isinstance(cell, bool):
        if not 0 <= cell < len(names):
            raise ValueError(f"{cell} is not the id of one of the {len(names)} labels in the features of the data set")
        return names[cell]
    return cell


def warn_of_ids(reader: RowReader, dataset: Any, tasks: Iterable[Any], columns: Mapping[str, str] = {}) -> None:
    """
    Makes the reader of a stream without features warn of whole numbers in columns of named labels.

    Without features, the order of the label names in the data set is unknown.

    Args:
        columns: as in [`DataSource`].
    """
    import datasets

    if isinstance(dataset, datasets.IterableDataset) and dataset.features is None:
        for task in tasks:
            if task.takes_ids:
                column = columns.get(task.column, task.column)
                reader.columns[column] = [*reader.columns.get(column, []), partial(_ids_told, task=task.name)]


def _ids_told(cell: Any, task: str) -> Any:
    items = cell.tolist() if hasattr(cell, "tolist") else cell
    if any(type(item) is int for item in (items if isinstance(items, (list, tuple)) else [items])):
        logger.warning_once(
            f"Task {task!r}: the whole numbers in its column are used as positions in labels=[...], because the "
            "stream has no features with label names. map() drops features; keep them by map(..., "
            "features=dataset.features)."
        )
    return cell


def _each(cell: Any, read: Reader) -> Any:
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    return [read(item) for item in cell] if isinstance(cell, (list, tuple)) else cell


# Pictures, videos and sounds


def undecoded(dataset: Any, column: str) -> Any:
    """
    The cells of `datasets.Image`, `Video` and `Audio` as bytes or path, without decoding.

    Then shared items can be found, and a broken item can be named with its row.
    """
    import datasets

    known = isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.features is not None
    if not known or column not in dataset.features:
        return dataset
    feature = dataset.features[column]
    stored = _stored(feature)
    return dataset if stored is None or stored == feature else dataset.cast_column(column, stored)


def _stored(feature: Any) -> Any:
    """The feature without decoding; `None` if it holds no images, videos or sounds."""
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Video, datasets.Audio)):
        return dataclasses.replace(feature, decode=False)
    inner = _stored(feature.feature) if hasattr(feature, "feature") else None
    return None if inner is None else dataclasses.replace(feature, feature=inner)


def _media_reader(feature: Any, kind: Optional[str]) -> Optional[Reader]:
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Video, datasets.Audio)):
        names = ("mode", "sampling_rate", "stream_index")
        options = {name: getattr(feature, name) for name in names if getattr(feature, name, None) is not None}
        return partial(_with_cast, options=options) if options else None
    depth, dtype = _array_type(feature, kind) or (0, None)
    if kind is not None and dtype is not None:
        levels = depth - _item_depth(feature, kind)
        # An empty list of video frames is an error, as in a list of dicts.
        read: Reader = partial(_as_item if levels <= 0 and not MODALITIES[kind].is_sequence else _as_array, dtype=dtype)
        for _ in range(levels):
            read = partial(_each, read=read)
        return read
    if isinstance(feature, dict):  # such as {"array": ..., "sampling_rate": ...}
        _, dtype = _numbers_in(feature.get("array"))
        return None if dtype is None else partial(_with_array, dtype=dtype)
    inner = getattr(feature, "feature", None)
    read_inner = None if inner is None else _media_reader(inner, kind)
    return None if read_inner is None else partial(_each, read=read_inner)


def _array_type(feature: Any, kind: Optional[str]) -> Optional[tuple[int, str]]:
    """The depth of the lists of a column and the type of their numbers, if its items are arrays."""
    depth, dtype = _numbers_in(feature)
    axes = () if kind is None else MODALITIES[kind].axes
    return (depth, dtype) if axes and dtype is not None and depth >= min(axes) else None


def _item_depth(feature: Any, kind: str) -> int:
    """The largest number of axes of an item. A list of arrays is several items, but frames are one video."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    modality = MODALITIES[kind]
    if modality.is_sequence or not hasattr(feature, "shape"):
        return max(modality.axes)
    return min(len(feature.shape), modality.most_axes)


def _numbers_in(feature: Any) -> tuple[int, Optional[str]]:
    """The depth of the lists of a feature, and the type of the numbers in them, if any."""
    import datasets

    if hasattr(feature, "shape") and hasattr(feature, "dtype"):  # Array2D, ...
        return len(feature.shape), feature.dtype
    if isinstance(feature, datasets.Value):
        is_number = feature.dtype == "bool" or feature.dtype.startswith(("int", "uint", "float"))
        return 0, feature.dtype if is_number else None
    if not hasattr(feature, "feature") or isinstance(feature.feature, dict):
        return 0, None
    depth, dtype = _numbers_in(feature.feature)
    return depth + 1, dtype


def _as_array(cell: Any, dtype: str) -> Any:
    import numpy as np

    if cell is None:
        return None
    try:
        return np.asarray(cell, dtype=dtype)
    except (ValueError, TypeError):  # rows of several lengths, or missing values
        return cell


def _as_item(cell: Any, dtype: str) -> Any:
    array = _as_array(cell, dtype)
    return None if getattr(array, "shape", None) == (0,) else array  # an empty list holds no item


def _with_array(cell: Any, dtype: str) -> Any:
    return {**cell, "array": _as_array(cell["array"], dtype)} if isinstance(cell, Mapping) else cell


def _with_cast(cell: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(cell, Mapping) and "array" not in cell and not is_absent(cell):
        return {**cell, "cast": options}
    return cell


def absolute_paths(cell: Any, root: str) -> Any:
    """
    A cell whose relative paths start at `root`.

    The cell is a path, a dict with "path" and no bytes, or a list of these. Addresses, files in base64, empty texts and
    other values stay unchanged.
    """
    if isinstance(cell, (list, tuple)):
        return [absolute_paths(item, root) for item in cell]
    if isinstance(cell, Mapping) and isinstance(cell.get("path"), str) and cell.get("bytes") is None:
        return {**cell, "path": absolute_paths(cell["path"], root)}
    is_path = isinstance(cell, str) and not is_absent(cell) and not is_address(cell)
    return os.path.abspath(os.path.join(root, cell)) if is_path else cell


def with_root(rows: Any, column: str, root: str) -> Any:
    """A `datasets.Dataset` in which relative paths in a column of images, videos or sounds start at `root`."""
    if column not in rows.column_names:
        return rows
    rows = undecoded(rows, column)
    tables = rows.with_format("arrow").select_columns([column]).iter(1000)
    paths = (path for table in tables for path in _paths_in(table.column(0).combine_chunks()))
    if all(absolute_paths(path, root) == path for path in paths):
        return rows  # files in the cells need not be written again
    return rows.map(
        lambda cell: {column: absolute_paths(cell, root)},
        input_columns=column,
        features=rows.features,
        desc=f"Finding {column}",
    )


def _paths_in(column: Any) -> list[Any]:
    """The paths in a column of pyarrow, without those of cells that have bytes."""
    from pyarrow import types

    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        return _paths_in(column.flatten())
    if types.is_struct(column.type):
        names = {field.name for field in column.type}
        paths = column.field("path") if "path" in names else column.slice(0, 0)
        return _paths_in(paths.filter(column.field("bytes").is_null()) if "bytes" in names else paths)
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    return column.to_pylist() if is_text else []
