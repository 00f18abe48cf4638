"""Divides rows into folds, without leakage between any two."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..model.tasks import Task
from .cells import LABEL_SEPARATOR, as_records
from .splitting import allocate, find_groups, media_of_columns, strata_of


def fold_numbers(
    dataset: Any,
    folds: int,
    *,
    text_column: str | Sequence[str] | None = "text",
    image_column: str | Sequence[str] = "image",
    video_column: str = "video",
    audio_column: str | Sequence[str] = "audio",
    tasks: Iterable[Task] = (),
    group_column: str | None = None,
    seed: int = 0,
    label_separator: str = LABEL_SEPARATOR,
    own_columns: Mapping[str, str] | None = None,
) -> np.ndarray:
    """
    The fold of each row. The rules are those of [`hold_out_rows`]: rows of one picture, file, text or group are in one
    fold, and all folds have nearly the same shares of each label.

    The rows of a fold are held out of the rows that are left, one fold after the other; the last fold is the rest.

    Args:
        dataset: a map-style data set whose rows are dicts, or a table.
        folds (`int`): The number of folds, at least 2.
        text_column, image_column, video_column, audio_column, tasks, group_column, seed, label_separator, own_columns:
            as in [`hold_out_rows`].

    Returns:
        (num_rows,) int64, from 0 to `folds - 1`.

    Raises:
        ValueError: if there are too few groups of rows for so many folds, or as in [`hold_out_rows`].

    Example:

    ```python
    >>> fold_numbers([{"text": f"text {i}", "author": i // 2} for i in range(6)], 3, group_column="author")
    array([1, 1, 2, 2, 0, 0])
    ```
    """
    if folds < 2:
        raise ValueError(f"The number of folds must be at least 2, but is {folds}.")
    rows, tasks = as_records(dataset), list(tasks)
    media = media_of_columns(audio=audio_column, video=video_column, image=image_column, **(own_columns or {}))
    groups = find_groups(rows, 1 / folds, text_column, media, group_column)
    strata = strata_of(rows, tasks, text_column, label_separator)
    numbers = np.full(len(groups), folds - 1, dtype=np.int64)
    left = np.arange(len(groups))
    for fold in range(folds - 1):
        known, compact = np.unique(groups[left], return_inverse=True)
        if len(known) < folds - fold:
            raise ValueError(_too_few(groups, folds))
        of_rows = [strata[row] for row in left] if strata else []
        chosen = allocate(compact, of_rows, 1 / (folds - fold), seed, max(len(tasks), 1))
        numbers[left[chosen]] = fold
        left = left[~chosen]
    return numbers


def _too_few(groups: np.ndarray, folds: int) -> str:
    sizes = np.bincount(groups) if len(groups) else np.zeros(1, dtype=np.int64)
    return (
        f"{folds} folds cannot be made of {len(groups):,} rows: rows of one picture, file, text or group stay "
        f"together, so there are {np.count_nonzero(sizes):,} parts, the largest with {sizes.max():,} rows. Ask for "
        "fewer folds."
    )
