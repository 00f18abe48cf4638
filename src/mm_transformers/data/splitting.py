"""Holds out rows for validation: rows of one picture stay together, and both parts have equal shares of labels."""

import contextlib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import csr_matrix
from torch.utils.data import Subset
from transformers.utils import logging

from ..model.file_contents import check_file, content_of
from ..model.label_cells import as_scalar, is_null
from ..model.limits import limits
from ..model.modalities import PARTS
from ..model.tasks import Task
from .cells import LABEL_SEPARATOR, as_records
from .mixture import DataMixture
from .row_labels import as_columns, encoded_labels, rows_with_columns, text_in
from .sources import DataSource, is_iterable


logger = logging.get_logger(__name__)

# A column of images, videos or sounds -> the function that splits one of its cells into items.
Media = Mapping[str, Callable[[Any], list[Any]]]


def media_of_columns(**columns: str | Sequence[str]) -> Media:
    """
    The columns of images, videos, sounds and items of your own modalities, with the functions that split their cells.

    Args:
        columns: modality -> its column or columns.
    """
    return {column: PARTS[name].items for name, given in columns.items() for column in as_columns(given)}


def hold_out_rows(
    dataset: Any,
    fraction: float,
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
) -> tuple[Any, Any]:
    """
    Splits rows into training rows and held-out rows, without leakage between the two.

    - **Groups.** Rows with the same image, video or sound are on the same side: as a path, bytes, an array or an
      object. So are rows with the same cell of `group_column`. Rows with an equal text (white space and case aside)
      stay together in groups of limited size. The limit is a quarter of the rows to hold out, or four rows if that is
      more. Rarer texts come first. More frequent texts are likely keywords or prompts, and would join nearly all rows
      into one group.
    - **Strata.** Both sides have nearly the same shares of each class and each label of a label set. The same holds for
      five quantile bins of numbers, and for missing labels, for all tasks at once. A class with two or more groups has
      at least one on each side if the held-out part is large enough. The only group of a class stays in the training
      rows.

    The same rows and seed give the same split. Both parts come in random order. A file is read only if another has the
    same size. Nothing is decoded, except an image that is given as an object.

    Args:
        dataset: a `datasets.Dataset`, a list of dicts, a pandas `DataFrame`, another map-style data set whose rows are
            dicts, or a [`DataSource`] of one of these.
        fraction (`float`): The share of the rows to hold out, between 0 and 1.
        text_column, image_column, video_column, audio_column (`str` or `list[str]`, *optional*):
            As in [`MMDataCollator`]; a column that the data set lacks is ignored.
        tasks (`Iterable[Task]`, *optional*): The tasks whose labels are to be distributed equally.
        group_column (`str`, *optional*): A column whose equal cells belong together, such as an author or a scene.
        seed (`int`, *optional*, defaults to 0): The seed of all random choices.
        label_separator (`str`, *optional*, defaults to `"|"`): As in [`MMDataCollator`].
        own_columns (`dict[str, str]`, *optional*): Modality of your own -> its column; see [`register_modality`].

    Returns:
        The training rows and the held-out rows: of the type of `dataset`, or `torch.utils.data.Subset`s of it.

    Raises:
        ValueError: if the data set is a stream, several splits, or one group; if `fraction` is not between 0 and 1; if
            `group_column` does not exist; or if a cell is not a label.

    Example:

    ```python
    >>> train, validation = hold_out_rows(rows, 0.1, tasks=[Classification("topic", labels=["animals", "food"])])
    ```
    """
    train, held_out = hold_out_parts(
        dataset, fraction, text_column=text_column, image_column=image_column, video_column=video_column,
        audio_column=audio_column, tasks=tasks, group_column=group_column, seed=seed, label_separator=label_separator,
        own_columns=own_columns,
    )  # fmt: skip
    return train.rows, held_out.rows


class Part(NamedTuple):
    """Some rows of a data set, and their places in it."""

    rows: Any
    places: Sequence[int]


def hold_out_parts(
    dataset: Any,
    fraction: float,
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
) -> tuple[Part, Part]:
    """[`hold_out_rows`], with the places of the rows in the data set."""
    media = media_of_columns(audio=audio_column, video=video_column, image=image_column, **(own_columns or {}))
    return _split(dataset, fraction, text_column, media, list(tasks), group_column, seed, label_separator)


def split_for_validation(
    dataset: Any, collator: Any, fraction: float = 0.1, seed: int = 0, group_column: str | None = None
) -> tuple[Part, Part] | None:
    """
    [`hold_out_rows`] for a trainer without validation rows; columns and tasks are those of its collator.

    Args:
        dataset: the training rows.
        collator ([`MMDataCollator`]): The columns and the tasks.
        fraction, seed, group_column: See [`hold_out_rows`].

    Returns:
        The training rows and the held-out rows. `None` if no split is possible: for a stream, a [`DataMixture`] or a
        dict of data sets, for less than two rows, and for rows that form one group.

    Raises:
        ValueError: if `fraction` is not between 0 and 1, `group_column` does not exist, or a cell is not a label.
    """
    inner = dataset.dataset if isinstance(dataset, DataSource) else dataset
    if inner is None or isinstance(inner, (dict, DataMixture)) or is_iterable(inner):
        return None
    tasks = list(collator.tasks.values())
    try:
        separator = collator.label_separator
        return _split(dataset, fraction, collator.text_column, collator.splitters, tasks, group_column, seed, separator)
    except _OneGroup as error:
        logger.warning(str(error))
        return None


class _OneGroup(ValueError):
    pass


def _split(
    dataset: Any,
    fraction: float,
    text_column: str | Sequence[str] | None,
    media: Media,
    tasks: list[Task],
    group_column: str | None,
    seed: int,
    label_separator: str,
) -> tuple[Part, Part]:
    if not 0 < fraction < 1:
        raise ValueError(f"The fraction of rows to hold out must lie between 0 and 1, but is {fraction}.")
    inner = dataset.dataset if isinstance(dataset, DataSource) else dataset
    if isinstance(inner, (dict, DataMixture)):
        raise ValueError(f"Rows can be held out of one data set only, but got a {type(inner).__name__} of several.")
    if is_iterable(inner):
        raise ValueError(
            f"Rows cannot be held out of a stream ({type(inner).__name__}): give separate validation rows, or a data "
            "set with a length."
        )
    readable = _with_records(dataset)
    groups = find_groups(readable, fraction, text_column, media, group_column)
    if len(groups) == 0 or groups.max() == 0:
        reason = "there are fewer than two" if len(groups) < 2 else "all rows share an image, a video, a sound or "
        reason += "" if len(groups) < 2 else f"a cell of {group_column!r}" if group_column else "a text"
        raise _OneGroup(f"No rows can be held out, since {reason}: give separate validation rows.")
    strata = strata_of(readable, tasks, text_column, label_separator)
    held_out = allocate(groups, strata, fraction, seed, max(len(tasks), 1))
    order = np.random.default_rng([seed, 1]).permutation(len(groups))
    train, others = (order[which[order]].tolist() for which in (~held_out, held_out))
    return Part(_take(dataset, train), train), Part(_take(dataset, others), others)


def _with_records(dataset: Any) -> Any:
    """A table as a list of dicts, built once; anything else unchanged."""
    if isinstance(dataset, DataSource):
        return DataSource(_with_records(dataset.dataset), dataset.columns, dataset.tasks)
    return as_records(dataset)


def _take(dataset: Any, rows: list[int]) -> Any:
    if isinstance(dataset, DataSource):
        return DataSource(_take(dataset.dataset, rows), dataset.columns, dataset.tasks)
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(rows)
    if hasattr(dataset, "iloc"):
        return dataset.iloc[rows]
    if isinstance(dataset, (list, tuple)):
        return [dataset[row] for row in rows]
    return Subset(dataset, rows)


# Groups


def find_groups(
    dataset: Any,
    fraction: float,
    text_column: str | Sequence[str] | None,
    media: Media,
    group_column: str | None = None,
) -> np.ndarray:
    """
    (num_rows,) int64: the number of the group of each row; see [`hold_out_rows`].

    Raises:
        ValueError: if no row has the `group_column`.
    """
    contents = _Contents()
    members: list[tuple[int, Hashable]] = []  # row, and the key that it shares with other rows
    texts: dict[str, list[int]] = {}
    has_group_column = group_column is None
    num_rows = 0
    wanted = [
        *as_columns(text_column),
        *media,
        *([] if group_column is None else [group_column]),
    ]
    for number, row in enumerate(rows_with_columns(dataset, wanted)):
        num_rows += 1
        for column, split in media.items():
            members += [(number, key) for item in split(row.get(column)) for key in contents.keys(item)]
        if group_column is not None and group_column in row:
            has_group_column = True
            cell = as_scalar(row[group_column])
            if not is_null(cell):
                members.append((number, ("group", cell if isinstance(cell, (str, int, float)) else repr(cell))))
        text = " ".join(text_in(row, text_column).casefold().split())
        if text:
            texts.setdefault(text, []).append(number)
    if num_rows and not has_group_column:
        raise ValueError(f"No row has the column {group_column!r}, by which the rows to hold out are grouped.")
    joined = DisjointSet(range(num_rows))
    first: dict[Hashable, int] = {}
    for number, key in members:
        joined.merge(number, first.setdefault(contents.resolve(key), number))
    _join_texts(joined, texts, fraction * num_rows)
    numbers: dict[int, int] = {}  # in the order of the rows, so equal in every process
    return np.array([numbers.setdefault(joined[row], len(numbers)) for row in range(num_rows)], dtype=np.int64)


def _join_texts(joined: DisjointSet, texts: dict[str, list[int]], num_held_out: float) -> None:
    limit = max(min(4, num_held_out), num_held_out / 4)
    for rows in sorted(texts.values(), key=len):
        if len(rows) > limit:
            break
        if len(rows) > 1 and sum(joined.subset_size(root) for root in {joined[row] for row in rows}) <= limit:
            for row in rows[1:]:
                joined.merge(rows[0], row)


class _Contents:
    """Keys of images, videos and sounds that are equal for equal content."""

    def __init__(self) -> None:
        self._decoders: list[Any] = []  # kept, so that their ids are not reused
        self._sizes: dict[int, set[tuple[str, Any]]] = {}  # number of bytes -> the keys of this size
        self._seen: set[Hashable] = set()
        self._resolved: dict[Hashable, Hashable] | None = None

    def keys(self, item: Any) -> list[Hashable]:
        """One key, or none for an empty cell. Apply [`resolve`] to it after all items have been seen."""
        is_array = isinstance(item, Mapping) and item.get("array") is not None
        content = item["array"] if is_array else item if hasattr(item, "get_all_samples") else content_of(item)
        return [] if is_null(content) else [self._key(content)]

    def _key(self, content: Any) -> Hashable:
        if isinstance(content, (str, os.PathLike)):
            key = ("path", os.fspath(content))
            if key not in self._seen:
                self._seen.add(key)
                with contextlib.suppress(OSError, ValueError):  # an address, or no such file
                    self._sizes.setdefault(os.stat(content).st_size, set()).add(key)
            return key
        if isinstance(content, bytes):
            key = ("bytes", hashlib.sha256(content).digest())
            self._sizes.setdefault(len(content), set()).add(key)
            return key
        if isinstance(content, (list, tuple)) and content and not isinstance(as_scalar(content[0]), (int, float)):
            return ("list", *(key for item in content for key in self.keys(item)))  # the frames of a video
        if hasattr(content, "tobytes") and hasattr(content, "mode"):  # an image of Pillow
            return ("pixels", content.mode, content.size, hashlib.sha256(content.tobytes()).digest())
        if hasattr(content, "shape") or isinstance(content, (list, tuple)):
            array = np.asarray(content.detach().cpu() if hasattr(content, "detach") else content)
            digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
            return ("array", str(array.dtype), array.shape, digest)
        self._decoders.append(content)
        return ("object", id(content))

    def resolve(self, key: Hashable) -> Hashable:
        """The final key: for files of the same size the hash of their bytes."""
        if self._resolved is None:
            self._resolved = {}
            for keys in self._sizes.values():
                paths = [key[1] for key in keys if key[0] == "path"]
                if len(paths) == len(keys):
                    # The first bytes differ in nearly all files, even for sounds of the same length.
                    starts = [_hash_of_file(path, 2**14) for path in paths] if len(paths) > 1 else []
                    times = Counter(starts)
                    paths = [path for path, start in zip(paths, starts, strict=False) if times[start] > 1]
                self._resolved.update({("path", path): ("bytes", _hash_of_file(path)) for path in paths})
        return self._resolved.get(key, key)


def _hash_of_file(path: str, num_bytes: int | None = None) -> Hashable:
    """The hash of the first bytes, by default of all; the path if the file is unreadable or above the limit."""
    try:
        check_file(path)
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(int(num_bytes or limits().file_bytes))).digest()
    except (OSError, ValueError):
        return path


# Strata


def strata_of(
    dataset: Any, tasks: Sequence[Task], text_column: str | Sequence[str] | None, label_separator: str = LABEL_SEPARATOR
) -> list[list[Hashable]]:
    """The strata of each row: for each task the values of [`Task.strata`], or a stratum of missing labels."""
    strata: list[list[Hashable]] = []
    for name, labels in encoded_labels(dataset, tasks, text_column, label_separator).items():
        rows = next(task for task in tasks if task.name == name).strata(labels)
        strata = strata or [[] for _ in labels]
        for found, label, values in zip(strata, labels, rows, strict=True):
            missing = (None,) if label is None else ("no stratum",)
            found += [(name, value) for value in (values or missing)]
    return strata


class _Counts(NamedTuple):
    """The strata of each group, and the number of its rows in each; the last stratum is "all rows"."""

    strata: list[list[int]]
    rows: list[list[int]]
    matrix: csr_matrix  # (num_groups, num_strata) int64


def _count(groups: np.ndarray, strata: list[list[Hashable]]) -> _Counts:
    numbers: dict[Hashable, int] = {}
    pairs = [(g, numbers.setdefault(s, len(numbers))) for g, row in zip(groups, strata, strict=False) for s in row]
    pairs += [(group, len(numbers)) for group in groups]
    shape = (int(groups.max()) + 1, len(numbers) + 1)
    index = np.array(pairs, dtype=np.int64).T
    matrix = csr_matrix((np.ones(len(pairs), dtype=np.int64), (index[0], index[1])), shape=shape)
    matrix.sum_duplicates()
    parts = [matrix.indptr[i : i + 2] for i in range(shape[0])]
    return _Counts(
        [matrix.indices[a:b].tolist() for a, b in parts], [matrix.data[a:b].tolist() for a, b in parts], matrix
    )


def allocate(
    groups: np.ndarray, strata: list[list[Hashable]], fraction: float, seed: int, size_weight: float = 1.0
) -> np.ndarray:
    """
    The rows to hold out, (num_rows,) bool.

    This is iterative stratification (Sechidis et al. 2011, https://doi.org/10.1007/978-3-642-23808-6_10), of groups
    instead of rows. It goes from the rarest stratum to the most frequent. Each group goes to the side with the smaller
    sum of squared deviations from the wanted numbers of rows. The sum is over the strata of the group and over all
    rows.

    scikit-learn's `StratifiedGroupKFold` takes one class per row and fractions of 1 / k only. It may also hold out the
    only group of a class.

    Args:
        groups (num_rows,) int64: the number of the group of each row; at least two groups.
        strata: the strata of each row, or an empty list.
        fraction: the share of the rows to hold out.
        seed: of the order of groups.
        size_weight: the weight of the number of rows relative to one stratum.
    """
    counts = _count(groups, strata)
    num_groups = len(counts.strata)
    sizes = np.bincount(groups)
    rank = np.random.default_rng(seed).permutation(num_groups)
    by_stratum = counts.matrix.tocsc()
    members = [by_stratum.indices[a:b] for a, b in zip(by_stratum.indptr[:-1], by_stratum.indptr[1:], strict=True)]
    members = [rows[np.argsort(rank[rows])] for rows in members]
    totals = np.asarray(counts.matrix.sum(0)).ravel()
    order = np.argsort(totals, kind="stable").tolist()
    side = _Sides(counts, [len(rows) for rows in members])
    limit = max(1, math.ceil(fraction * len(groups)))

    for group in np.flatnonzero(sizes > limit).tolist():
        side.train(group)
    for group in range(num_groups):
        if not side.may_hold_out(group):
            side.train(group)
    _cover(side, counts, order, members, sizes, limit)
    _distribute(side, counts, order, members, fraction * totals, size_weight)
    _exchange(side, counts, fraction * totals, seed)
    if not any(side.held_out):
        # Every group is too large, or the only one of a class: take the smallest, if possible not an only one.
        only = [any(len(members[stratum]) == 1 for stratum in of_group) for of_group in counts.strata]
        side.held_out[min(range(num_groups), key=lambda group: (only[group], sizes[group], rank[group]))] = True
    return np.array(side.held_out)[groups]


class _Sides:
    """The side of each group, and the number of groups of each stratum that are not held out."""

    def __init__(self, counts: _Counts, num_groups: list[int]):
        self.strata = counts.strata
        self.left = num_groups
        self.num_held_out = [0] * len(num_groups)
        self.is_open = [True] * len(counts.strata)  # without a side so far
        self.held_out = [False] * len(counts.strata)

    def may_hold_out(self, group: int) -> bool:
        """Whether each of its strata keeps another group."""
        return self.is_open[group] and all(self.left[stratum] > 1 for stratum in self.strata[group])

    def train(self, group: int) -> None:
        self.is_open[group] = False

    def hold_out(self, group: int) -> None:
        self.is_open[group], self.held_out[group] = False, True
        for stratum in self.strata[group]:
            self.left[stratum] -= 1
            self.num_held_out[stratum] += 1

    def may_exchange(self, group: int, other: int) -> bool:
        """Whether `group` may be held out instead of `other`, with no stratum lost on either side."""
        of_group, of_other = self.strata[group], self.strata[other]
        return all(self.left[s] > 1 or s in of_other for s in of_group) and all(
            self.num_held_out[s] > 1 or s in of_group for s in of_other
        )

    def exchange(self, group: int, other: int) -> None:
        self.hold_out(group)
        self.held_out[other] = False
        for stratum in self.strata[other]:
            self.left[stratum] += 1
            self.num_held_out[stratum] -= 1


def _cover(
    side: _Sides, counts: _Counts, order: list[int], members: list[np.ndarray], sizes: np.ndarray, limit: int
) -> None:
    """Holds out one group of each stratum, if there is room, from the rarest stratum on."""
    covered: set[int] = set()
    used = 0
    for stratum in order:
        candidates = [group for group in members[stratum].tolist() if side.may_hold_out(group)]
        if not candidates or stratum in covered:
            continue
        median = np.median(sizes[candidates])
        small = [group for group in candidates if sizes[group] <= median]
        best = max(small, key=lambda group: len(set(counts.strata[group]) - covered))  # the first in random order
        if used + sizes[best] <= limit:
            side.hold_out(best)
            used += int(sizes[best])
            covered.update(counts.strata[best])


def _distribute(
    side: _Sides,
    counts: _Counts,
    order: list[int],
    members: list[np.ndarray],
    wanted: np.ndarray,
    size_weight: float,
) -> None:
    """Holds out groups, stratum by stratum, up to the wanted number of rows of each stratum."""
    is_open, held_out = np.array(side.is_open), np.array(side.held_out)
    num_open = is_open @ counts.matrix
    rates = np.clip(wanted - held_out @ counts.matrix, 0, num_open) / np.maximum(num_open, 1)
    rate = rates.tolist()
    # For each stratum, the held-out rows minus the wanted rows, over the groups with a side.
    excess = [0.0] * len(rate)
    weight = [1.0] * (len(rate) - 1) + [size_weight]
    for stratum in order:
        for group in members[stratum].tolist():
            if not side.is_open[group]:
                continue
            parts = list(zip(counts.strata[group], counts.rows[group], strict=True))
            for s, rows in parts:
                excess[s] -= rate[s] * rows
            change = sum(weight[s] * rows * (2 * excess[s] + rows) for s, rows in parts)
            if change < 0 and side.may_hold_out(group):
                side.hold_out(group)
                for s, rows in parts:
                    excess[s] += rows
            else:
                side.train(group)


def _exchange(side: _Sides, counts: _Counts, wanted: np.ndarray, seed: int) -> None:
    """
    Exchanges held-out groups for random others, if that lowers the sum of squared deviations.

    This matters if a group has several classes.
    """
    rng = np.random.default_rng([seed, 2])
    held_out = np.flatnonzero(side.held_out)
    others = np.flatnonzero(~np.array(side.held_out))
    if not len(held_out) or not len(others):
        return
    excess = (np.array(side.held_out) @ counts.matrix - wanted).tolist()
    num_tries = min(50 * len(held_out), 20_000)
    places = rng.integers(len(held_out), size=num_tries).tolist(), rng.integers(len(others), size=num_tries).tolist()
    for place, other_place in zip(*places, strict=True):
        old, new = int(held_out[place]), int(others[other_place])
        change = dict(zip(counts.strata[new], counts.rows[new], strict=True))
        for stratum, rows in zip(counts.strata[old], counts.rows[old], strict=True):
            change[stratum] = change.get(stratum, 0) - rows
        if sum(rows * (2 * excess[s] + rows) for s, rows in change.items()) < 0 and side.may_exchange(new, old):
            side.exchange(new, old)
            held_out[place], others[other_place] = new, old
            for stratum, rows in change.items():
                excess[stratum] += rows
