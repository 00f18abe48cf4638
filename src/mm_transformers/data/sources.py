"""Data sets for the collator: with its column names, and with the origin of each row."""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..model.task_base import Task
from .cells import RowReader, opened, warn_of_ids


class NumberedRows(Protocol):
    """Rows by their number, such as a list, a data set or a `Subset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


class NamedColumns(Protocol):
    """Columns with files, such as [`MediaColumn`]."""

    columns: list[str]


class ReadColumns(Protocol):
    """The part of [`MMDataCollator`] that says which columns it reads."""

    text_columns: list[str]
    tasks: dict[str, Task]

    @property
    def input_columns(self) -> list[str]: ...

    @property
    def media(self) -> Mapping[str, NamedColumns]: ...


class RowKey(Enum):
    """Keys of a row that are no columns and cannot clash with column names."""

    ROW = "its number in the data set"
    SOURCE = "its data set"


# Under these keys [`MMTrainer`] adds to each row its number in the data set, and the data set.
ROW_KEY: Any = RowKey.ROW
SOURCE_KEY: Any = RowKey.SOURCE
# In a batch of a mixture: the number of rows from each data set. [`MMTrainer`] removes it before the model runs.
ROWS_PER_SOURCE = "rows_per_source"


class RowSource(NamedTuple):
    """
    The data set of a row.

    Args:
        name: its name in messages; `None` if there is only one data set.
        columns: name that the collator looks for -> name in the data set.
        tasks: the tasks that have labels there; `None` for all tasks with a column there.
        place: its number, and the number of data sets in the mixture, for counting; `None` outside of mixtures.
    """

    name: Optional[str] = None
    columns: Mapping[str, str] = {}
    tasks: Optional[frozenset[str]] = None
    place: Optional[tuple[int, int]] = None

    def labels(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks


ANY_SOURCE = RowSource()


def name_of_row(row: Mapping[str, Any], i: int) -> str:
    """The name of the i-th row of a batch in messages."""
    name = f"row {row[ROW_KEY]:,}" if ROW_KEY in row else f"row {i} of the batch"
    source = row.get(SOURCE_KEY, ANY_SOURCE).name
    return name if source is None else f"{name} of {source!r}" if ROW_KEY in row else f"{name}, from {source!r}"


def own_column(row: Mapping[str, Any], column: str) -> str:
    """The name of a column in the data set of the row."""
    source: RowSource = row.get(SOURCE_KEY, ANY_SOURCE)
    return source.columns.get(column, column)


def count_rows(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The number of rows from each data set of a mixture, (num_datasets,) int64; empty without a mixture."""
    places = [row[SOURCE_KEY].place for row in rows if SOURCE_KEY in row]
    if not places or places[0] is None:
        return {}
    return {ROWS_PER_SOURCE: torch.bincount(torch.tensor([i for i, _ in places]), minlength=places[0][1])}


class DataSource:
    """
    A data set with its own columns and tasks, for [`DataMixture`], or for [`MMTrainer`] in place of a data set.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, a list of dicts, a pandas `DataFrame`, or another data set
            that [`~transformers.Trainer`] takes.
        columns (`dict[str, str]`, *optional*):
            Names that the collator and the tasks look for ("text", "image", the columns of tasks) -> names in this data
            set. A column that is named here has its new names only; one column may have several.
        tasks (`list[str]`, *optional*):
            The tasks that have labels in this data set. Defaults to all tasks with a column in it, and those that need
            no column. Other tasks have no label in its rows, even if a column has their name.

    Raises:
        ValueError: if the data set is several splits, or `columns` or `tasks` have another form.

    Example:

    ```python
    >>> DataSource(tweets, columns={"text": "tweet", "sentiment": "mood"}, tasks=["sentiment"])
    ```
    """

    def __init__(self, dataset: Any, columns: Optional[Mapping[str, str]] = None, tasks: Optional[list[str]] = None):
        if isinstance(dataset, (dict, DataSource)):
            form = "several splits or data sets" if isinstance(dataset, dict) else "a DataSource itself"
            raise ValueError(f"A DataSource takes one data set, but got {form}: give one of them.")
        columns = dict(columns or {})
        if not all(isinstance(x, str) for pair in columns.items() for x in pair):
            raise ValueError(f"columns must be a dict of names, {{'text': 'review', ...}}, but is {columns!r}.")
        if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks or []):
            raise ValueError(f"tasks must be a list of names of tasks, but is {tasks!r}.")
        self.dataset, self.columns = dataset, columns
        self.tasks = None if tasks is None else list(tasks)

    @property
    def is_stream(self) -> bool:
        return is_iterable(self.dataset)

    @property
    def column_names(self) -> Optional[list[str]]:
        """The columns by the names that the collator looks for; `None` if the data set does not list them."""
        own = columns_of(self.dataset)
        if not own:
            return None
        renamed = set(self.columns.values())
        return [*self.columns, *(name for name in own if name not in renamed and name not in self.columns)]

    def __len__(self) -> int:
        return len(self.dataset)

    def check(self, collator: ReadColumns, name: str) -> None:
        """
        Checks columns and tasks against the data set.

        Args:
            collator: the [`MMDataCollator`].
            name: the name of the data set in messages.

        Raises:
            ValueError: if a task is unknown, a mapped column does not exist or has no use, the text column is missing,
                or no task has labels.
        """
        for wanted in self.tasks or []:
            if wanted not in collator.tasks:
                raise ValueError(
                    f"{name} names the task {wanted!r}, but the tasks of the model are {_shown(collator.tasks)}."
                )
        known: list[Optional[str]] = [*collator.input_columns, *(task.column for task in collator.tasks.values())]
        own = columns_of(self.dataset)
        for target, column in self.columns.items():
            if target not in known:
                raise ValueError(
                    f"{name} maps its column {column!r} to {target!r}, but no such column is read; the columns that "
                    f"are read are {_shown(dict.fromkeys(known))}."
                )
            if own and column not in own:
                raise ValueError(
                    f"{name} has no column {column!r}, which columns={{...}} maps to {target!r}; its columns are "
                    f"{_shown(own)}."
                )
        columns = self.column_names
        missing = [] if columns is None else [column for column in collator.text_columns if column not in columns]
        if columns is not None and missing:
            raise ValueError(
                f"{name} has no column {missing[0]!r} (its columns are {_shown(columns)}); name the column "
                f"of its texts by DataSource(..., columns={{{missing[0]!r}: '...'}})."
            )
        labelled = self.labelled_tasks(collator)
        if self.tasks is not None and labelled != set(self.tasks):
            task = collator.tasks[min(set(self.tasks) - labelled)]
            raise ValueError(
                f"{name} should have labels of task {task.name!r}, but has no column {task.column!r} (its columns "
                f"are {_shown(columns or [])}); name it by DataSource(..., columns={{{task.column!r}: '...'}})."
            )
        if not labelled:
            raise ValueError(
                f"{name} has no labels for any of the tasks {_shown(collator.tasks)}; leave it out, or name the "
                "columns of its labels by DataSource(..., columns=...)."
            )

    def labelled_tasks(self, collator: ReadColumns) -> set[str]:
        """The tasks that may have labels in this data set, by its columns."""
        tasks = collator.tasks.values() if self.tasks is None else [collator.tasks[name] for name in self.tasks]
        columns = self.column_names
        return {t.name for t in tasks if columns is None or t.default_cell is not None or t.column in columns}

    def rows(
        self,
        collator: ReadColumns,
        name: Optional[str] = None,
        place: Optional[tuple[int, int]] = None,
        numbers: Optional[Sequence[int]] = None,
    ) -> Any:
        """
        The data set as a map-style or iterable data set of torch whose rows the collator understands.

        Args:
            numbers: the numbers of the rows in messages; by default their places.
        """
        dataset, reader = opened(self.dataset, media_of(collator, self.columns))
        warn_of_ids(reader, dataset, collator.tasks.values(), self.columns)
        tasks = None if self.tasks is None else frozenset(self.tasks)
        source = RowSource(name, self.columns, tasks, place)
        if self.is_stream:
            return StreamOfSource(dataset, source, reader)
        return RowsOfSource(dataset, source, numbers, reader)


def batches(rows: NumberedRows, batch_size: int) -> Iterator[tuple[range, list[Any]]]:
    """The rows in batches, each with the numbers of its rows, from 0."""
    for start in range(0, len(rows), batch_size):
        numbers = range(start, min(start + batch_size, len(rows)))
        yield numbers, [rows[number] for number in numbers]


def rows_of(dataset: Any, collator: ReadColumns, numbers: Optional[Sequence[int]] = None) -> tuple[Any, Any]:
    """The rows for the data loader and the data set for samplers, of a data set or a [`DataSource`]."""
    source = dataset if isinstance(dataset, DataSource) else DataSource(dataset)
    if source.is_stream and source is not dataset:
        dataset, reader = opened(dataset, media_of(collator))
        warn_of_ids(reader, dataset, collator.tasks.values())
        if reader.columns:
            dataset = dataset.map(reader)
        return dataset, dataset  # unchanged, accelerate can shard it over processes
    return source.rows(collator, numbers=numbers), source.dataset


def media_of(collator: ReadColumns, columns: Mapping[str, str] = {}) -> dict[str, str]:
    """The columns of pictures, videos and sounds, by their names in the data set -> the argument of the processor."""
    return {columns.get(name, name): kind for kind, media in collator.media.items() for name in media.columns}


class RowsOfSource(Dataset[dict[str, Any]]):
    def __init__(
        self,
        dataset: Any,
        source: RowSource,
        numbers: Optional[Sequence[int]] = None,
        reader: Optional[RowReader] = None,
    ):
        self.dataset, self.source, self.reader = dataset, source, reader or RowReader()
        self.numbers = range(len(dataset)) if numbers is None else numbers

    @property
    def fingerprint(self) -> Optional[tuple[str, str]]:
        """Equal for equal rows; `None` if the data set has no fingerprint, or changes its rows at reading."""
        fingerprint = getattr(self.dataset, "_fingerprint", None)
        if fingerprint is None or self.dataset.format["type"] == "custom":
            return None
        return fingerprint, repr(sorted(self.source.columns.items()))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _view(self.dataset[index], self.source, self.reader, self.numbers[index])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if hasattr(self.dataset, "__getitems__"):
            rows = self.dataset.__getitems__(indices)
        else:
            rows = [self.dataset[index] for index in indices]
        return [
            _view(row, self.source, self.reader, self.numbers[index]) for row, index in zip(rows, indices, strict=True)
        ]


class StreamOfSource(IterableDataset[dict[str, Any]]):
    def __init__(self, dataset: Any, source: RowSource, reader: RowReader):
        self.dataset, self.source, self.reader = dataset, source, reader
        # The number of consecutive rows for one worker of a data loader: one batch, so that batches keep their order.
        self.rows_per_turn = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        # Streams of `datasets` and of torch split their rows over workers themselves; other iterables do not.
        shares = worker is not None and not isinstance(self.dataset, IterableDataset)
        for i, row in enumerate(self.dataset):
            if not shares or i // self.rows_per_turn % worker.num_workers == worker.id:
                yield _view(row, self.source, self.reader)

    def part(self, consumer: int, num_consumers: int, epoch: int) -> Iterator[dict[str, Any]]:
        """The rows of one of several consumers (processes, or workers of one); no two share a row."""
        import datasets
        from datasets.distributed import split_dataset_by_node

        dataset = self.dataset
        if isinstance(dataset, datasets.IterableDataset):
            dataset = split_dataset_by_node(dataset, consumer, num_consumers)
            dataset.set_epoch(epoch)
            # Not `iter(dataset)`, which would split the rows again in a worker of a data loader.
            for batch in dataset.iter(batch_size=1):
                yield _view({column: cells[0] for column, cells in batch.items()}, self.source, self.reader)
            return
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        for i, row in enumerate(dataset):
            if i % num_consumers == consumer:
                yield _view(row, self.source, self.reader)


def _view(row: Any, source: RowSource, reader: RowReader, number: Optional[int] = None) -> dict[str, Any]:
    which = "A row" if number is None else f"Row {number:,}"
    where = "" if source.name is None else f" of data set {source.name!r}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{which}{where} must be a dict from column to cell, but is of type {type(row).__name__}.")
    try:
        row = reader(row)
    except ValueError as error:
        raise ValueError(f"{which}{where}, {error}.") from None
    view = dict(row)
    if source.columns:
        renamed = set(source.columns.values())
        view = {column: cell for column, cell in row.items() if column not in renamed}
        for target, column in source.columns.items():
            view.pop(target, None)
            if column in row:
                view[target] = row[column]
    if number is not None:
        view[ROW_KEY] = number
    if source != ANY_SOURCE:
        view[SOURCE_KEY] = source
    return view


def is_iterable(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def columns_of(dataset: Any) -> Optional[list[str]]:
    """The columns of a data set, if it lists them."""
    names = getattr(dataset, "column_names", None)
    if names is None and hasattr(dataset, "iloc"):
        names = [str(name) for name in dataset.columns]
    return names


def _shown(names: Any) -> str:
    return ", ".join(map(repr, names))
