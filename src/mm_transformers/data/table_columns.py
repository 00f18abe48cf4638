"""Finds the kinds and the statistics of columns of numbers and categories in training rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..model.label_cells import is_null, shorten
from ..model.table import TableConfig
from ..model.table_kinds import COLUMNS, CategoryColumn, NumberColumn, TableError, column_of, read_number
from .row_labels import rows_with_columns


# A table with more edges of bins has none: a linear model would have too many features.
_MOST_EDGES = 4096


def table_columns(rows: Any, columns: Sequence[str] | Mapping[str, str | None], **options: Any) -> TableConfig:
    """
    The columns of numbers and categories of a model, with their statistics in the training rows.

    A column without a kind is one of numbers, if all of its cells are numbers, or texts that are numbers. Truth values
    are categories. So give the kind of numbers that are names, such as postal codes, and of dates.

    A column of numbers or dates with 20 values or more has up to 8 bins with as many values each. The model then reads
    piecewise-linear numbers, too. A table with more than about 450 such columns has no bins.

    Args:
        rows: the training rows: a `datasets.Dataset`, a pandas `DataFrame`, a list of dicts or a [`DataSource`].
        columns (`list[str]` or `dict[str, str]`): The names; or name -> `"number"`, `"date"`,
            `"category"`, or `None` to find it.
        options: the sizes of the encoder, see [`TableConfig`].

    Returns:
        [`TableConfig`], for `MMTransformerProcessor.from_encoders(..., table=...)` and
        `MMTransformerForMultiTask.from_encoders(..., table=...)`.

    Raises:
        ValueError: one sentence, if a column does not exist or is empty, has too many values, or a cell does not fit
            the kind of its column.

    Example:

    ```python
    >>> rows = [{"price": 2.0, "brand": "acme"}, {"price": 4.0, "brand": None}]
    >>> table_columns(rows, ["price", "brand"]).columns[0]
    {'name': 'price', 'kind': 'number', 'mean': 3.0, 'std': 1.0}
    ```
    """
    if isinstance(columns, str) or not isinstance(columns, (Sequence, Mapping)):
        raise ValueError(f"columns must be a list of names, or a dict from name to kind, but is {columns!r}.")
    kinds = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
    for name, asked in kinds.items():
        if asked not in (None, *COLUMNS):
            known = ", ".join(map(repr, COLUMNS))
            raise ValueError(f"Column {name!r} must have one of the kinds {known}, but has {asked!r}.")
    if not kinds:
        raise ValueError("columns is empty: give the names of the columns of numbers and categories.")
    cells: dict[str, list[Any]] = {name: [] for name in kinds}
    seen: set[str] = set()
    for row in rows_with_columns(rows, list(kinds)):
        seen.update(row.keys() & kinds.keys())
        for name in kinds:
            cells[name].append(row.get(name))
    if kinds.keys() - seen:
        raise ValueError(f"The training rows have no column {min(kinds.keys() - seen)!r}.")
    found = [_column(name, asked, cells[name]) for name, asked in kinds.items()]
    if sum(len(column.get("bins", ())) for column in found) > _MOST_EDGES:
        found = [{key: x for key, x in column.items() if key != "bins"} for column in found]
    return TableConfig(columns=found, **options)


def _column(name: str, kind: str | None, cells: list[Any]) -> dict[str, Any]:
    if all(is_null(cell) or (isinstance(cell, str) and not cell.strip()) for cell in cells):
        raise ValueError(f"Column {shorten(str(name))!r} has no value in the training rows; leave it out.")
    if kind is None:
        kind = NumberColumn.kind if are_numbers(cells) else CategoryColumn.kind
    config: dict[str, Any] = {"name": name, "kind": kind}
    column = column_of({**config, **column_of(config).prepare(cells)})
    values: list[Any] = []
    for number, cell in enumerate(cells):
        try:
            value = column.read(cell)
        except ValueError as error:
            raise ValueError(f"Row {number:,}, column {name!r}: {error}.") from None
        if value is not None:
            values.append(value)
    if not values:
        raise ValueError(f"Column {shorten(str(name))!r} has no value in the training rows; leave it out.")
    return {**config, **column.learned(values)}


def are_numbers(cells: Iterable[Any]) -> bool:
    """Whether the cells of a column that are not empty are numbers, and not truth values."""
    for cell in cells:
        if isinstance(cell, (bool, np.bool_)):
            return False
        try:
            read_number(cell)
        except TableError:
            return False
    return True
