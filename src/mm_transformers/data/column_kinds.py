"""Looks at the columns of a table: what each holds, which are inputs, and which kind of task a target is."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..model.dates import date_format
from ..model.downloads import is_url
from ..model.file_contents import content_of, is_absent
from ..model.label_cells import is_null, shorten
from ..model.limits import limits
from ..model.table import RESERVED
from ..model.table_kinds import COLUMNS, TableError, read_number
from ..model.tasks import TASK_KINDS
from .cells import LABEL_SEPARATOR
from .table_columns import are_numbers


# What a column may be taken for. `--column name:kind` names one of these.
TEXT, IMAGE, VIDEO, AUDIO = "text", "image", "video", "audio"
NUMBER, DATE, CATEGORY, IGNORE = "number", "date", "category", "ignore"
FILE_KINDS = (IMAGE, VIDEO, AUDIO)
# The ends of file names.
SUFFIXES = {
    IMAGE: (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    VIDEO: (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"),
    AUDIO: (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"),
}
# The first bytes of files.
_MAGIC = {IMAGE: (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*"), AUDIO: (b"fLaC", b"OggS", b"ID3")}
_FEATURES = {datasets.Image: IMAGE, datasets.Audio: AUDIO, datasets.Video: VIDEO}
# More rows hardly change what a column is taken for.
_MOST_ROWS = 20_000
_FILES_TRIED = 100
# A text has more words than this on average; or its cells are nearly all different.
_WORDS_OF_A_TEXT = 4.0
_SEPARATORS = ("|", ";", ",")
_MOST_LABELS = 200
_FEW_NUMBERS = 10


@dataclass(frozen=True)
class ColumnKind:
    """
    What a column is taken for.

    Args:
        name (`str`): The column.
        role (`str`): One of [`known_kinds`]; "ignore" for columns that are left out.
        reason (`str`): Why; part of a sentence.
        is_said (`bool`, *optional*, defaults to `False`): Whether the user said so.
    """

    name: str
    role: str
    reason: str
    is_said: bool = False


@dataclass(frozen=True)
class Target:
    """
    The task of a column that is to be predicted.

    Args:
        task (`dict`): The task, in the form of a recipe.
        reason (`str`): Why it is of this kind; part of a sentence.
        separator (`str`, *optional*): What separates the labels of a text, if its cells hold several.
        left_out (`int`, *optional*, defaults to 0): Rows without a label.
    """

    task: dict[str, Any]
    reason: str
    separator: str | None = None
    left_out: int = 0


def column_kinds(
    rows: datasets.Dataset,
    targets: Iterable[str] = (),
    said: Mapping[str, str] | None = None,
    root: str | os.PathLike[str] = ".",
) -> list[ColumnKind]:
    """
    What each column is taken for, targets left aside.

    Args:
        rows: the table; cells of CSV are texts.
        targets: the columns to predict.
        said: column -> kind, for columns that the user knows better.
        root: where relative paths of pictures and the like begin.

    Raises:
        ValueError: one sentence, if a column in `said`, or its kind, does not exist.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"title": ["A red bicycle, hardly used", "Two old chairs of oak"], "price": [9.5, 20]})
    >>> [column.role for column in column_kinds(rows)]
    ['text', 'number']
    ```
    """
    said = dict(said or {})
    check_names(rows, said, "--column")
    for name, role in said.items():
        if role not in known_kinds():
            raise ValueError(f"Column {name!r} cannot be {role!r}: the kinds are {', '.join(known_kinds())}.")
    left_aside = set(targets)
    found = []
    for name in rows.column_names:
        if name in left_aside:
            continue
        if name in said:
            found.append(ColumnKind(name, said[name], "you said so", is_said=True))
        else:
            column = ColumnKind(name, *_kind(rows, name, Path(root)))
            found.append(_without_reserved_name(column, getattr(rows.features[name], "dtype", None)))
    return found


def _without_reserved_name(column: ColumnKind, dtype: str | None) -> ColumnKind:
    """A column of numbers or categories cannot be called as an input of a row: the row would have two of it."""
    if column.role not in COLUMNS or column.name not in RESERVED:
        return column
    if column.name == TEXT and dtype in ("string", "large_string"):
        return ColumnKind(TEXT, TEXT, f"its name ({column.reason})")
    return ColumnKind(column.name, IGNORE, f"an input of a row has its name; rename it to use it ({column.reason})")


def known_kinds() -> tuple[str, ...]:
    """All kinds of columns; those of numbers and categories are registered by [`register_column`]."""
    return (TEXT, *FILE_KINDS, *COLUMNS, IGNORE)


def check_names(rows: datasets.Dataset, names: Iterable[str], option: str) -> None:
    """
    Checks that a table has columns.

    Raises:
        ValueError: if the table lacks one of these columns.
    """
    for name in names:
        if name not in rows.column_names:
            columns = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"{option}: the table has no column {name!r}; its columns are {columns}.")


def _kind(rows: datasets.Dataset, name: str, root: Path) -> tuple[str, str]:
    """The kind of a column, and the reason."""
    feature = rows.features[name]
    item = getattr(feature, "feature", feature)
    for cls, role in _FEATURES.items():
        if isinstance(item, cls):
            return role, f"a column of `datasets.{cls.__name__}`"
    if isinstance(item, datasets.ClassLabel):
        return CATEGORY, f"{item.num_classes} named classes"
    cells = [cell for cell in _cells(rows, name) if not _is_empty(cell)]
    if not cells:
        return IGNORE, "it is empty"
    files = _files(cells, root)
    if files is not None:
        return files
    if any(isinstance(cell, (dict, bytes)) for cell in cells):
        return IGNORE, "its cells are neither texts, numbers nor files that can be read"
    if any(isinstance(cell, (list, tuple)) for cell in cells):
        if all(isinstance(word, str) for cell in cells if isinstance(cell, (list, tuple)) for word in cell):
            return TEXT, "lists of words"
        return IGNORE, "its cells are lists of numbers"
    different = len(set(map(str, cells)))
    if different == 1:
        return IGNORE, f"all its cells are {shorten(str(cells[0]))!r}"
    if all(isinstance(cell, (date, datetime)) for cell in cells):
        return DATE, "dates"
    if are_numbers(cells):
        if _counts_up(name, cells, different):
            return IGNORE, "an identifier: whole numbers, all different"
        return NUMBER, f"{len(set(map(read_number, cells)) - {None}):,} different numbers"
    texts = [str(cell).strip() for cell in cells]
    format = date_format(texts)
    if format is not None:
        return DATE, f"dates such as {texts[0]}" + (f", read as {format}" if format else "")
    words = sum(len(text.split()) for text in texts) / len(texts)
    if different == len(texts) > 20 and words < 1.5 and all(any(c.isdigit() for c in text) for text in texts):
        return IGNORE, f"an identifier: all different, such as {shorten(texts[0])!r}"
    if words >= _WORDS_OF_A_TEXT or different > len(texts) / 2 or different > limits().category_values:
        return TEXT, f"{different:,} different texts of {words:.1f} words on average"
    numbers = sum(_is_number(text) for text in texts)
    mixed = f", of which some are numbers (such as {next(t for t in texts if _is_number(t))!r})" if numbers else ""
    return CATEGORY, f"{different:,} different values in {len(texts):,} rows{mixed}"


def _cells(rows: datasets.Dataset, name: str) -> list[Any]:
    """The cells of at most 20,000 rows, in their order. The choice is random: each n-th row may be of one kind."""
    column = rows.select_columns([name])
    if len(rows) > _MOST_ROWS:
        column = column.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:_MOST_ROWS]))
    return list(column[:][name])


def _is_empty(cell: Any) -> bool:
    if isinstance(cell, (list, tuple)):
        return len(cell) == 0
    return is_absent(cell) if isinstance(cell, (dict, str)) else is_null(cell)


def _files(cells: Sequence[Any], root: Path) -> tuple[str, str] | None:
    """The kind of a column of files, and the reason; `None` for others."""
    items = [item for cell in cells for item in (cell if isinstance(cell, (list, tuple)) else [cell])]
    step = max(1, len(items) // _FILES_TRIED)
    tried = items[::step]
    contents = [content_of(item) for item in tried]
    for kind, suffixes in SUFFIXES.items():
        named = [c for c in contents if isinstance(c, (str, os.PathLike)) and str(c).lower().endswith(suffixes)]
        held = [c for c in contents if isinstance(c, bytes) and _holds(kind, c)]
        if len(named) + len(held) < 0.9 * len(contents):
            continue
        if held:
            return kind, f"the bytes of files ({len(held)} of {len(contents)} that were looked at)"
        there = sum(is_url(str(path)) or (root / str(path)).is_file() for path in named)
        if there >= 0.5 * len(named):
            return kind, f"paths of files, of which {there} of {len(named)} that were looked at exist"
        return IGNORE, f"paths such as {shorten(str(named[0]))!r}, but these files do not exist in {root}"
    return None


def _holds(role: str, content: bytes) -> bool:
    if content[:4] == b"RIFF":
        return {b"WAVE": AUDIO, b"WEBP": IMAGE, b"AVI ": VIDEO}.get(content[8:12]) == role
    if content[4:8] == b"ftyp":
        return role == (IMAGE if content[8:12] in (b"avif", b"heic") else VIDEO)
    if content[:4] == b"\x1aE\xdf\xa3":
        return role == VIDEO
    return content.startswith(_MAGIC.get(role, ()))


def _counts_up(name: str, cells: Sequence[Any], different: int) -> bool:
    """Whether whole numbers are all different, and are called an id or go up by one."""
    values = [value for value in map(read_number, cells) if value is not None]
    if different < len(values) or len(values) < 3 or any(not value.is_integer() for value in values):
        return False
    words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    is_named = bool({"id", "ids", "index", "key", "nr", "no", "number", "uuid", "row", "unnamed"} & set(words))
    return is_named or {second - first for first, second in pairwise(values)} == {1}


def _is_number(text: str) -> bool:
    try:
        return read_number(text) is not None
    except TableError:
        return False


def target(rows: datasets.Dataset, column: str, kind: str | None = None, has_decoder: bool = False) -> Target:
    """
    The task for a column that is to be predicted.

    Args:
        rows: the table.
        column: its name.
        kind: the kind of task, if the user says so: "classification", "multi_label", "regression", "generation", or
            another kind.
        has_decoder: whether the model can write.

    Raises:
        ValueError: one sentence, if the column does not exist or is empty, or no kind of task suits it.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"topic": ["food", "food", "travel", "travel"]})
    >>> target(rows, "topic").task
    {'name': 'topic', 'kind': 'classification'}
    ```
    """
    check_names(rows, [column], "--predict")
    name = task_name(column)
    task: dict[str, Any] = {"name": name, **({} if name == column else {"column": column})}
    cells = [cell for cell in _cells(rows, column) if not _is_empty(cell)]
    if not cells:
        raise ValueError(f"--predict {column}: the column is empty, so there is nothing to learn from.")
    separator: str | None = None
    if kind is not None:
        # Only some kinds split a text into labels.
        reason, splits = "you said so", isinstance(TASK_KINDS[kind].read_text("a|b", "|"), list)
        separator = _separator(cells)[0] if splits else None
    else:
        kind, reason, separator = _task_kind(rows.features[column], cells, column, has_decoder)
    task_kind = TASK_KINDS[kind]
    separator_of_cells = separator or LABEL_SEPARATOR

    def known(cells: Iterable[Any]) -> list[Any]:
        given = (cell for cell in cells if not _is_empty(cell))
        read = (task_kind.read_text(cell, separator_of_cells) if isinstance(cell, str) else cell for cell in given)
        return [cell for cell in read if cell is not None]

    labels = known(cells)
    parts = rows.select_columns([column]).iter(10_000)
    left_out = len(rows) - sum(len(known(part[column])) for part in parts)
    return Target({**task, "kind": kind, **task_kind.options_for(labels)}, reason, separator, left_out)


def _task_kind(feature: Any, cells: list[Any], column: str, has_decoder: bool) -> tuple[str, str, str | None]:
    if isinstance(feature, datasets.ClassLabel):
        return "classification", f"{feature.num_classes} named classes", None
    if any(isinstance(cell, (list, tuple)) for cell in cells):
        return "multi_label", "lists of labels", None
    if all(isinstance(cell, bool) for cell in cells):
        return "classification", "truth values", None
    different = len(set(map(str, cells)))
    if different == 1:
        raise ValueError(f"--predict {column}: all cells are {shorten(str(cells[0]))!r}, so there is nothing to learn.")
    if are_numbers(cells):
        values = [value for value in map(read_number, cells) if value is not None]  # a "-" is none
        different, is_whole = len(set(values)), all(value.is_integer() for value in values)
        if is_whole and different <= _FEW_NUMBERS and len(cells) >= 5 * different:
            reason = f"{different} different whole numbers; {column}:regression takes them as numbers"
            return "classification", reason, None
        return "regression", f"{different:,} different numbers", None
    separator, labels = _separator(cells)
    if separator is not None:
        return "multi_label", f"{labels} different labels, several in a cell, separated by {separator!r}", separator
    texts = [str(cell).strip() for cell in cells]
    words = sum(len(text.split()) for text in texts) / len(texts)
    if different <= max(2, min(_MOST_LABELS, len(texts) // 3)):
        return "classification", f"{different} different labels", None
    if has_decoder and words >= 2:
        return "generation", f"texts of {words:.1f} words on average", None
    advice = (
        "give a text encoder that can write, such as a T5, by --text"
        if words >= 2
        else f"say {column}:classification if each value is a class, or predict another column"
    )
    raise ValueError(
        f"--predict {column}: {different:,} different texts in {len(texts):,} rows are neither few labels nor numbers; "
        f"{advice}."
    )


def _separator(cells: Sequence[Any]) -> tuple[str | None, int]:
    """What separates labels within cells, and how many labels there are; `None` if cells hold one label each."""
    texts = [cell for cell in cells if isinstance(cell, str)]
    for separator in _SEPARATORS:
        several = sum(separator in text for text in texts)
        if several < 0.1 * len(texts) or not texts:
            continue
        counts = Counter(part.strip() for text in texts for part in text.split(separator) if part.strip())
        is_short = all(len(label.split()) <= 4 for label in counts)
        if is_short and 2 <= len(counts) <= _MOST_LABELS and sum(counts.values()) >= 3 * len(counts):
            return separator, len(counts)
    return None, 0


def task_name(column: str) -> str:
    """A name of a task for a column: letters, digits and underscores."""
    plain = unicodedata.normalize("NFKD", column).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")
    return name if name[:1].isalpha() else f"task_{name}".rstrip("_")
