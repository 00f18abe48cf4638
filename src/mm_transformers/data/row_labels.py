"""Reads the labels and single columns of a whole data set, without images, videos and sounds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets

from ..model.label_cells import is_null
from ..model.tasks import Task
from ..model.text_tokens import join_texts
from .cells import LABEL_SEPARATOR, label_of, opened
from .sources import ANY_SOURCE, SOURCE_KEY, DataSource, RowsOfSource, RowSource, own_column


def rows_with_columns(dataset: Any, columns: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    """
    The rows of a data set, in order, with these columns if they exist (and perhaps more).

    Of a `datasets.Dataset` no other column is read, and images, videos and sounds come as bytes or path.

    Args:
        dataset: a `datasets.Dataset`, a list of dicts, another map-style data set whose rows are dicts, or a
            [`DataSource`] of one, whose column names are translated.
        columns: the names that the collator uses.
    """
    source = dataset if isinstance(dataset, DataSource) else DataSource(dataset)
    inner, wanted = source.dataset, list(columns)
    if isinstance(inner, datasets.Dataset) and inner.format["type"] != "custom":
        own = [source.columns.get(column, column) for column in wanted]
        own = [column for column in dict.fromkeys(own) if column in inner.column_names]
        if not own:
            yield from ({} for _ in range(len(inner)))
            return
        inner = inner.with_format(None).select_columns(own)
    inner, reader = opened(inner, dict.fromkeys(source.columns.get(column, column) for column in wanted))
    tasks = None if source.tasks is None else frozenset(source.tasks)
    rows = RowsOfSource(inner, RowSource(None, source.columns, tasks), reader=reader)
    for start in range(0, len(rows), 1000):
        yield from rows.__getitems__(list(range(start, min(start + 1000, len(rows)))))


def encoded_labels(
    dataset: Any, tasks: Iterable[Task], text_column: str | Sequence[str] | None, label_separator: str = LABEL_SEPARATOR
) -> dict[str, list[Any]]:
    """
    Task name -> the encoded label of each row, `None` where it is missing.

    Args:
        dataset: as in [`rows_with_columns`].
        tasks: the tasks whose labels to encode.
        text_column: the columns of texts; read only for tasks that label words.
        label_separator: the separator in texts with several labels.

    Raises:
        ValueError: one sentence that names the row and the column, if a cell is not a label.
    """
    tasks = list(tasks)
    columns = [task.column or task.name for task in tasks]
    if any(task.is_token_level for task in tasks):
        columns += as_columns(text_column)
    labels: dict[str, list[Any]] = {task.name: [] for task in tasks}
    for number, row in enumerate(rows_with_columns(dataset, columns)):
        text = text_in(row, text_column)
        for task, column in zip(tasks, columns, strict=False):
            if not row.get(SOURCE_KEY, ANY_SOURCE).labels(task.name):
                labels[task.name].append(None)
                continue
            try:
                labels[task.name].append(label_of(task, row.get(column, task.default_cell), text, label_separator))
            except ValueError as error:
                raise ValueError(f"row {number:,}, column {own_column(row, column)!r}: {error}.") from None
    return labels


def as_columns(column: str | Sequence[str] | None) -> list[str]:
    """One column, several or none, as a list; see `text_column` of [`MMDataCollator`]."""
    if column is None:
        return []
    return [column] if isinstance(column, str) else list(column)


def text_in(row: Mapping[str, Any], text_column: str | Sequence[str] | None) -> str:
    """The text of a row, from one column or several."""
    return join_texts({column: text_of(row.get(column)) for column in as_columns(text_column)} or {"": ""})


def text_of(cell: Any) -> str:
    """The text of a cell: a list of words is joined, an empty cell is ""."""
    if isinstance(cell, (list, tuple)):
        return " ".join(map(str, cell))
    return "" if is_null(cell) else str(cell)
