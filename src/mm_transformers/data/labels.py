"""Converts label columns of files for their tasks, and finds unnamed labels in the rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from ..model.label_cells import whole_number
from ..model.tasks import TASK_KINDS, Task, task_from_dict
from .cells import LABEL_SEPARATOR
from .loading import TEXT_TYPES
from .row_labels import encoded_labels


logger = logging.get_logger(__name__)


def prepare_labels(data: datasets.DatasetDict, tasks: list[dict[str, Any]]) -> datasets.DatasetDict:
    """
    Sets the types of label columns, from whole columns and not from single cells.

    A column of whole numbers written as texts becomes numbers, if the task takes numbers. A column of a task that
    writes becomes texts, even if they look like numbers.

    Args:
        data: split -> rows; changed in place.
        tasks: the tasks as dicts; labels may still be missing.

    Raises:
        ValueError: if the training rows lack the column of a task.
    """
    for task in tasks:
        column, kind = task.get("column") or task["name"], TASK_KINDS.get(task.get("kind") or "", Task)
        held = {split: rows for split, rows in data.items() if column in rows.column_names}
        if "train" in data and "train" not in held and kind.default_cell is None:
            raise ValueError(
                f"The training rows have no column {column!r} for task {task['name']!r}; their columns are "
                f"{', '.join(map(repr, data['train'].column_names))}."
            )
        if kind.needs_decoder:
            for split, rows in held.items():
                is_plain = isinstance(rows.features[column], datasets.Value)
                data[split] = rows.cast_column(column, datasets.Value("string")) if is_plain else rows
        elif kind.takes_whole_numbers and held and all(rows.features[column] in TEXT_TYPES for rows in held.values()):
            # Alike in all splits: a split with the labels 0 and 1 only may still belong to a column of texts.
            texts = {text for rows in held.values() for text in rows.unique(column) if not _is_blank(text)}
            if texts and all(whole_number(text.strip()) is not None for text in texts):
                data.update({split: _with_numbers(rows, column) for split, rows in held.items()})
    return data


def _is_blank(cell: str | None) -> bool:
    return cell is None or not cell.strip()


def _with_numbers(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    return rows.map(
        lambda cell: {column: None if _is_blank(cell) else whole_number(cell.strip())},
        input_columns=column,
        features=datasets.Features({**rows.features, column: datasets.Value("int64")}),
        desc=f"Reading {column}",
    )


def check_labels(
    data: Mapping[str, datasets.Dataset],
    tasks: Iterable[Task],
    text_column: str | Sequence[str] | None,
    label_separator: str = LABEL_SEPARATOR,
    numbers: Mapping[str, np.ndarray] | None = None,
) -> None:
    """
    Checks that the task knows the labels of all splits, before a long training; warns of numbers that are far away.

    Args:
        numbers: split -> the numbers of its rows in their table, for the warning; by default 0, 1, ...

    Raises:
        ValueError: one sentence that names split, row and column.
    """
    checked = [task for task in tasks if not task.needs_decoder]
    for split, rows in data.items():
        try:
            labels = encoded_labels(rows, checked, text_column, label_separator)
        except ValueError as error:
            raise ValueError(f"{split} rows: {error}") from error
        for task in checked if split == "train" else ():
            in_table = labels[task.name]
            if numbers is not None:
                # Rows of the table that were left out have no label here.
                known = dict(zip(numbers[split].tolist(), in_table, strict=True))
                in_table = [known.get(number) for number in range(max(known, default=-1) + 1)]
            if warning := task.warning_about(in_table):
                logger.warning_once(warning)


def has_labels(
    rows: datasets.Dataset, task: Task, text_column: str | Sequence[str] | None, label_separator: str = LABEL_SEPARATOR
) -> bool:
    """Whether any row has a label of the task."""
    labels = encoded_labels(rows, [task], text_column, label_separator)[task.name]
    return any(label is not None for label in labels)


def complete_task(task: dict[str, Any], rows: datasets.Dataset, label_separator: str = LABEL_SEPARATOR) -> Task:
    """
    The task of a dict; by default its labels are those of the training rows.

    Raises:
        ValueError: if the column holds no label, or a cell that cannot be a label.
    """
    column = task.get("column") or task["name"]
    kind = TASK_KINDS.get(task.get("kind") or "", Task)
    if column not in rows.column_names:
        return task_from_dict(task)
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    cells = (kind.read_text(cell, label_separator) if isinstance(cell, str) else cell for cell in rows[column])
    completed = kind.infer_options(task, cells, column, names)
    for option in completed.keys() - task.keys():
        value = completed[option]
        is_list = isinstance(value, list)
        count, shown = (f"{len(value)} ", ", ".join(map(str, value))) if is_list else ("", str(value))
        logger.info(f"Task {task['name']!r}: {count}{option} inferred from the training rows: {shown}.")
    return task_from_dict(completed)
