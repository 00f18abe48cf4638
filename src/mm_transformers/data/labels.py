"""Columns of labels, as files store them, become what tasks take; labels that are not named are found in the rows."""

import numbers
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import datasets
from transformers.utils import logging

from ..model.task_base import is_missing, is_null
from ..model.tasks import TASK_KINDS, Task, task_from_dict
from .loading import TEXT_TYPES


logger = logging.get_logger(__name__)


def prepare_labels(data: datasets.DatasetDict, tasks: list[dict[str, Any]], separator: str) -> datasets.DatasetDict:
    """
    Brings labels as files store them into the form that tasks take: truth values as names; texts as numbers, truth
    values or lists, and without white space around them.

    Args:
        data: split -> rows; changed in place.
        tasks: the tasks as dicts; labels may still be missing.
        separator: what separates the labels of a multi_label cell that is a text.

    Raises:
        ValueError: if the training rows lack the column of a task, or a text is not what the task takes.
    """
    for task in tasks:
        column, kind = task.get("column") or task["name"], task.get("kind")
        texts: dict[str, list[str]] = {}
        for split, rows in data.items():
            if column not in rows.column_names:
                if split == "train" and getattr(TASK_KINDS.get(kind or ""), "default_cell", None) is None:
                    raise ValueError(
                        f"The training rows have no column {column!r} for task {task['name']!r}; their columns are "
                        f"{', '.join(map(repr, rows.column_names))}."
                    )
                continue
            feature = rows.features[column]
            if feature in TEXT_TYPES and kind in ("multi_label", "token_classification"):
                # Words are what white space separates, so their labels are too.
                between = separator if kind == "multi_label" else None
                read = partial(split_cell, separator=between)
                data[split] = _mapped(rows, column, datasets.List(datasets.Value("string")), read)
            elif feature in TEXT_TYPES and kind != "generation":
                texts[split] = [cell for cell in rows.unique(column) if not _is_blank(cell)]
            elif (kind == "classification" and feature == datasets.Value("bool")) or kind == "generation":
                data[split] = rows.cast_column(column, datasets.Value("string"))  # texts that look like numbers
        # In all splits alike: a split with the labels 0 and 1 only may be one of texts all the same.
        reader = _reader(kind, {cell.strip() for cells in texts.values() for cell in cells})
        for split, cells in texts.items():
            data[split] = _read_texts(data[split], column, cells, reader, f"{split} rows", task["name"])
    return data


class _Reader(NamedTuple):
    """How the texts of a column, as that of a CSV file always is, become what a task takes."""

    read: Callable[[str], Any]
    feature: datasets.Value
    expected: str = "a text"


_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.0+)?")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?(nan|inf(inity)?)", re.IGNORECASE)
_TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _reader(kind: str | None, texts: set[str]) -> _Reader:
    if kind == "regression":
        return _Reader(_as_number, datasets.Value("float64"), "a number")
    if kind == "matching" or (kind == "retrieval" and {text.lower() for text in texts} <= {"true", "false"}):
        return _Reader(_as_truth_value, datasets.Value("bool"), "true or false")
    if kind == "classification" and all(_WHOLE_NUMBER.fullmatch(text) for text in texts):
        # 007 is no number; 1.0 is one, since tables with empty cells store integers as floats.
        return _Reader(_as_whole_number, datasets.Value("int64"))
    return _Reader(str, datasets.Value("string"))


def _as_number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None  # `float` also takes 1_000


def _as_truth_value(text: str) -> bool | None:
    return _TRUTH_VALUES.get(text.lower())


def _as_whole_number(text: str) -> int:
    return int(text.partition(".")[0])  # not by way of a float, which would round


def _read_texts(
    rows: datasets.Dataset, column: str, cells: list[str], reader: _Reader, where: str, name: str
) -> datasets.Dataset:
    wrong = next((cell for cell in cells if reader.read(cell.strip()) is None), None)
    if wrong is not None:
        row = next(i for i, cell in enumerate(rows[column]) if cell == wrong)
        raise ValueError(
            f"{where}: row {row:,}, column {column!r}: task {name!r} expects {reader.expected} (or an empty cell), but "
            f"got {wrong!r}."
        )
    if reader.read is str and all(cell and cell == cell.strip() for cell in rows.unique(column) if cell is not None):
        return rows  # as most are
    return _mapped(rows, column, reader.feature, partial(_read_cell, read=reader.read))


def _read_cell(cell: str | None, read: Callable[[str], Any]) -> Any:
    return None if cell is None or _is_blank(cell) else read(cell.strip())


def _is_blank(cell: str | None) -> bool:
    return cell is None or not cell.strip()


def _mapped(rows: datasets.Dataset, column: str, feature: Any, read: Callable[[Any], Any]) -> datasets.Dataset:
    return rows.map(
        lambda cell: {column: read(cell)},
        input_columns=column,
        features=datasets.Features({**rows.features, column: feature}),
        desc=f"Reading {column}",
    )


def check_labels(data: Mapping[str, datasets.Dataset], tasks: Iterable[Task], text_column: str) -> None:
    """
    Finds labels that a task does not know, in all splits, before hours are spent.

    Raises:
        ValueError: one sentence that names split, row and column.
    """
    for task in tasks:
        if task.needs_decoder:
            continue
        for split, rows in data.items():
            if task.column not in rows.column_names:
                continue
            texts = rows[text_column] if task.is_token_level and text_column in rows.column_names else None
            seen = set()
            for row, cell in enumerate(rows[task.column]):
                key = tuple(cell) if isinstance(cell, list) else cell
                if texts is None and (not isinstance(key, Hashable) or key in seen):
                    continue
                text = "" if texts is None or is_null(texts[row]) else texts[row]
                try:
                    task.encode_label(cell, " ".join(text) if isinstance(text, list) else text)
                except ValueError as error:
                    raise ValueError(f"{split} rows: row {row:,}, column {task.column!r}: {error}") from error
                seen.add(key)


def has_labels(rows: datasets.Dataset, task: Task) -> bool:
    """Whether any row has one."""
    return task.column in rows.column_names and not all(map(is_missing, rows[task.column]))


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
        for label in cell if isinstance(cell, list) else [cell]:
            if not isinstance(label, (str, bool, numbers.Real, type(None))):
                raise ValueError(
                    f"Column {column!r} holds {label!r} of type {type(label).__name__}, which is no label."
                )
            values.add(label)
    values = {value for value in values if not is_missing(value)}
    if not values:
        raise ValueError(f"Column {column!r} has no label in the training rows, so there is nothing to learn from.")
    if any(isinstance(value, str) for value in values) and not all(isinstance(value, str) for value in values):
        raise ValueError(f"Column {column!r} holds texts and numbers; labels are one or the other.")
    are_numbers = all(not isinstance(value, str) or _NUMBER.fullmatch(value) for value in values)
    if are_numbers and not all(float(value).is_integer() for value in values):
        raise ValueError(
            f"Column {column!r} holds numbers that are not whole: is its task a regression? If not, name its labels."
        )
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    return [str(int(value)) for value in sorted(values)]
