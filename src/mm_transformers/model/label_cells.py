"""Cells of tables as labels: missing cells, names, ids and numbers; the labels of a column."""

import functools
import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Optional

import torch


# Floats hold all integers up to here.
MAX_EXACT_FLOAT = 2**53
# 007 is no whole number; 1.0 is one, since tables with empty cells store integers as floats.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.0+)?")
# `float` also takes 1_000.
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?(nan|inf(inity)?)", re.IGNORECASE)
# Texts, in lower case, that stand for a missing number: those of pandas, and two more that people write.
NO_NUMBER = frozenset({"nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "?"})

# The mark of a missing label in a list, such as padding.
PADDING = -100


def is_null(value: Any) -> bool:
    """True for `None`, NaN and pandas' missing values: the ways in which tables leave a cell empty."""
    value = as_scalar(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, numbers.Real) and bool(value != value)


def is_missing(value: Any) -> bool:
    """True for a missing label: an empty cell, or -100."""
    value = as_scalar(value)
    return is_null(value) or (isinstance(value, numbers.Real) and bool(value == -100))


def as_scalar(value: Any) -> Any:
    """The Python value of a scalar of numpy or torch, or of a `Decimal`, as tables hold; anything else as it is."""
    if isinstance(value, Decimal):
        return math.nan if value.is_nan() else float(value)  # a signalling NaN is no float
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_finite_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; truth values are none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_labels(name: str, labels: list[Any]) -> list[str]:
    """The label names as strings, checked: at least two, no duplicates."""
    if isinstance(labels, str) or not isinstance(labels, (list, tuple)):
        raise ValueError(f"Task {name!r}: labels must be a list of names, but is {labels!r}.")
    wrong = [label for label in labels if isinstance(label, (list, tuple, dict))]
    if wrong:
        raise ValueError(f"Task {name!r}: a label must be a name, but is {shorten_value(wrong[0])}.")
    labels = [str(label) for label in labels]
    if len(labels) == 0:
        raise ValueError(f"Task {name!r} needs its label names: labels=['...', '...'].")
    if str(PADDING) in labels:
        raise ValueError(f"Task {name!r}: no label can be called {PADDING}, which marks a missing label.")
    duplicates = sorted(label for label, count in Counter(labels).items() if count > 1)
    if duplicates:
        raise ValueError(f"Task {name!r}: label {duplicates[0]!r} occurs twice in labels.")
    return labels


def infer_labels(cells: Iterable[Any], column: str) -> list[str]:
    """The sorted distinct labels of a column; whole numbers are sorted as numbers."""
    values: set[Any] = set()
    kinds: set[type] = set()
    for cell in cells:
        for label in map(as_scalar, cell if isinstance(cell, (list, tuple)) else [cell]):
            if not isinstance(label, (str, bool, numbers.Real, type(None))):
                raise ValueError(
                    f"Column {column!r} holds {shorten_value(label)} of type {type(label).__name__}, which "
                    "cannot be a label."
                )
            if not is_missing(label):
                kinds.add(type(label) if isinstance(label, (str, bool)) else float)
                values.add(label.strip() if isinstance(label, str) else label)
    if not values:
        raise ValueError(
            f"Column {column!r} has no label in the training rows: leave out its task, or give rows with labels."
        )
    if len(kinds) > 1:
        one, other = sorted({str: "texts", bool: "truth values", float: "numbers"}[held] for held in kinds)[::-1][:2]
        raise ValueError(f"Column {column!r} holds {one} and {other}, but labels must all have one type.")
    if kinds == {bool}:
        return sorted(str(value).lower() for value in values)
    are_numbers = all(not isinstance(value, str) or NUMBER.fullmatch(value) for value in values)
    if are_numbers and not all(float(value).is_integer() for value in values):
        raise ValueError(
            f"Column {column!r} holds numbers that are not whole: for a regression, set the kind of the task to "
            "regression; for a classification, name its labels."
        )
    if kinds == {str}:
        return sorted(values)
    if any(isinstance(value, float) and abs(value) > MAX_EXACT_FLOAT for value in values):
        raise ValueError(
            f"Column {column!r} holds floats beyond {MAX_EXACT_FLOAT:,}, which are not exact: store it as integers or "
            "texts."
        )
    return [str(int(value)) for value in sorted(values)]


def label_scores(task: Any, logits: torch.Tensor, answers: list[Any]) -> tuple[torch.Tensor, list[str]]:
    """Of each row the logit (batch, num_labels) of one label, by default of the highest; and the labels' names."""
    chosen = logits.argmax(-1).tolist()
    ids = [
        i if answer is None else label_id(task.name, task.labels, answer)
        for i, answer in zip(chosen, answers, strict=True)
    ]
    return logits[torch.arange(len(ids), device=logits.device), ids], [task.labels[i] for i in ids]


def label_id(name: str, labels: list[str], value: Any) -> int:
    """
    The id of one label, given as its name or its id.

    A whole-number float counts as an id, since tables with missing cells store integers as floats. If the names
    themselves are numbers ("1" to "5" stars), a number is a name, not an id. A truth value is the label "True" or
    "False", in upper or lower case, or "1" or "0".
    """
    value = as_scalar(value)
    if isinstance(value, str):
        found = _named(labels, value)
        if found is None and value.strip().lower() in ("true", "false"):
            found = _truth_value(labels, value.strip().lower())
        if found is not None:
            return found
        raise ValueError(f"task {name!r}: label {shorten(value)!r} is not one of: {_shown(labels)}")
    if isinstance(value, bool):
        found = _truth_value(labels, str(value).lower())
        found = _named(labels, str(int(value))) if found is None else found
        if found is not None:
            return found
    elif isinstance(value, numbers.Real):
        if isinstance(value, float) and MAX_EXACT_FLOAT < abs(value) < math.inf:
            raise ValueError(
                f"task {name!r}: the label {value:.0f} is a float, and beyond {MAX_EXACT_FLOAT:,} these are not exact; "
                "store the column as integers or texts"
            )
        names = _numbers_in(tuple(labels))
        if not names and value in range(len(labels)):
            return int(float(value))
        if value in names:
            return names[value]
        also = "" if names else f" (or an id from 0 to {len(labels) - 1})"
        raise ValueError(
            f"task {name!r}: label {shorten(str(value))} is not one of: {_shown(labels)}{also}; a missing label is "
            "None, NaN or -100"
        )
    raise ValueError(
        f"task {name!r}: a label must be a name or an id (None if it is missing), but is {shorten_value(value)} of "
        f"type {type(value).__name__}"
    )


def ids_are_places(labels: list[str]) -> bool:
    """Whether a number in a cell is the place of a label, since no label is itself a number."""
    return not _numbers_in(tuple(labels))


def _named(labels: list[str], text: str) -> Optional[int]:
    """The place of a name, with or without white space around it."""
    found = text if text in labels else text.strip()
    return labels.index(found) if found in labels else None


def _truth_value(labels: list[str], word: str) -> Optional[int]:
    """The place of "true" or "false", however written, if there is one."""
    places = [i for i, label in enumerate(labels) if label.lower() == word]
    return places[0] if len(places) == 1 else None


def _shown(labels: list[str]) -> str:
    return f"{', '.join(map(shorten, labels[:20]))}{', ...' if len(labels) > 20 else ''}"


def shorten(text: str) -> str:
    """A text for messages: if it is long, its beginning and its length."""
    return text if len(text) <= 120 else f"{text[:60]}... ({len(text):,} characters)"


def shorten_value(value: Any) -> str:
    """The value of a cell for messages: in one line, also for an array."""
    return shorten(repr(value)).replace("\n", " ")


@functools.cache
def _numbers_in(labels: tuple[str, ...]) -> dict[float, int]:
    """The ids of the label names that are themselves numbers."""
    ids: dict[float, int] = {}
    for i, label in enumerate(labels):
        if not NUMBER.fullmatch(label) or len(label) > 300:  # longer ones are no floats
            continue
        # Not by way of a float, which would round.
        number = int(label) if label.lstrip("+-").isdigit() else float(label)
        if math.isfinite(number) and (number not in ids or label == str(number)):  # of 007 and 7, the number is 7
            ids[number] = i
    return ids


def whole_number(text: str) -> int | None:
    """The whole number in a text such as "7", "-7" or "7.0", exact for any size; `None` for other texts."""
    return int(text.partition(".")[0]) if _WHOLE_NUMBER.fullmatch(text) else None
