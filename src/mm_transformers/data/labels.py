"""Columns of labels, as files store them, become what tasks take; labels that are not named are found in the rows."""

from collections.abc import Iterable
from typing import Any

import datasets
from transformers.utils import logging

from ..model.tasks import TASK_KINDS, Task, task_from_dict
from .loading import TEXT_TYPES


logger = logging.get_logger(__name__)


def prepare_labels(data: datasets.DatasetDict, tasks: list[dict[str, Any]], separator: str) -> datasets.DatasetDict:
    """
    Brings labels as files store them into the form that tasks take: truth values as names, texts as lists.

    Args:
        data: split -> rows; changed in place.
        tasks: the tasks as dicts; labels may still be missing.
        separator: what separates the labels of a multi_label cell that is a text.

    Raises:
        ValueError: if the training rows lack the column of a task.
    """
    for task in tasks:
        column, kind = task.get("column") or task["name"], task.get("kind")
        for split, rows in data.items():
            if column not in rows.column_names:
                if split == "train" and getattr(TASK_KINDS.get(kind or ""), "default_cell", None) is None:
                    raise ValueError(
                        f"The training rows have no column {column!r} for task {task['name']!r}; their columns are "
                        f"{', '.join(map(repr, rows.column_names))}."
                    )
                continue
            feature = rows.features[column]
            is_text = feature in TEXT_TYPES
            if kind == "classification" and feature == datasets.Value("bool"):
                data[split] = rows.cast_column(column, datasets.Value("string"))
            elif kind == "generation" and not is_text:
                data[split] = rows.cast_column(column, datasets.Value("string"))  # texts that look like numbers
            elif kind in ("multi_label", "token_classification") and is_text:
                # Words are what white space separates, so their labels are too.
                between = separator if kind == "multi_label" else None
                data[split] = rows.map(
                    lambda cell, column=column, between=between: {column: split_cell(cell, between)},
                    input_columns=column,
                    features=datasets.Features(
                        {**rows.features, column: datasets.List(datasets.Value("string"))}
                    ),
                    desc=f"Splitting {column}",
                )  # fmt: skip
    return data


def split_cell(cell: str | None, separator: str | None) -> list[str] | None:
    return None if cell is None else [label.strip() for label in cell.split(separator) if label.strip()]


def complete_task(task: dict[str, Any], rows: datasets.Dataset) -> Task:
    """
    The task that a dict describes; labels that it does not give are those of the training rows.

    Raises:
        ValueError: if the column holds no label, or what cannot be a label.
    """
    column = task.get("column") or task["name"]
    if "labels" in task or task.get("kind") not in ("classification", "multi_label", "token_classification"):
        return task_from_dict(task)
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, datasets.ClassLabel):
        labels = feature.names
    else:
        labels = infer_labels(rows[column], column)
    logger.info(f"Task {task['name']!r}: {len(labels)} labels inferred from the training rows: {', '.join(labels)}.")
    return task_from_dict({**task, "labels": labels})


def infer_labels(cells: Iterable[Any], column: str) -> list[str]:
    """The sorted distinct labels of a column; whole numbers are sorted as numbers."""
    values: set[Any] = set()
    for cell in cells:
        values.update(cell if isinstance(cell, list) else [cell])
    values = {value for value in values if value is not None and value == value}
    if not values:
        raise ValueError(f"Column {column!r} has no label in the training rows, so there is nothing to learn from.")
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    numbers = {float(value) for value in values}
    if not all(number.is_integer() for number in numbers):
        raise ValueError(f"Column {column!r} holds numbers that are not whole: is its task a regression?")
    return [str(int(number)) for number in sorted(numbers)]
