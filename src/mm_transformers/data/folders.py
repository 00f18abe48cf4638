"""The files of a folder as rows: pictures, videos and sounds."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..model.images import FORMATS
from ..model.modalities import MODALITIES
from .collator import MMDataCollator
from .column_kinds import IMAGE, SUFFIXES


logger = logging.get_logger(__name__)


class FolderRows:
    """
    One row for each file of a folder, and of the folders in it, that the model reads, in the order of the paths.

    A row has a column for each kind of file that is there, such as `image`: the path of the file from the folder on.
    Hidden files, and links that lead out of the folder, are left out; linked folders are not entered.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        collator ([`MMDataCollator`]): Its columns; its model says which kinds of files are read.

    Raises:
        ValueError: one sentence, if this is no folder, or has no file that the model reads.
    """

    def __init__(self, folder: str | os.PathLike[str], collator: MMDataCollator):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder.")
        self.root = os.path.realpath(folder)
        columns = {name: column for name, column in collator.media.items() if name in _file_kinds()}
        if not columns:
            raise ValueError(
                f"The model reads neither pictures nor sounds, so it cannot answer the files of {self.folder}: give a "
                "table."
            )
        kinds = {suffix: columns[name].columns[0] for name in columns for suffix in _suffixes(_file_kinds()[name])}
        self._all_columns = [*collator.text_columns, *(name for column in columns.values() for name in column.columns)]
        self._left_out = 0
        self._files = sorted(self._find(kinds))
        if self._left_out:
            logger.warning(
                f"{self.folder}: {self._left_out:,} links lead out of the folder, or to a folder, and are left out."
            )
        if not self._files:
            nouns = " or ".join(MODALITIES[name].nouns for name in columns)
            raise ValueError(f"{self.folder} has no files of {nouns} (names that end in {_some(kinds)}).")
        self.columns = list(dict.fromkeys(column for _, column in self._files))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, column in self._files:
            yield {**dict.fromkeys(self.columns), column: path}

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row for the collator: with whole paths, and with empty cells in the other columns."""
        whole = {name: None if path is None else os.path.join(self.root, path) for name, path in row.items()}
        return {**dict.fromkeys(self._all_columns), **whole}

    def _find(self, kinds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """The path and the column of each file."""
        for place, folders, names in os.walk(self.root):
            self._left_out += sum(os.path.islink(os.path.join(place, name)) for name in folders)
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                column = kinds.get(os.path.splitext(name)[1].lower())
                path = os.path.join(place, name)
                if column is None or name.startswith("."):
                    continue
                if os.path.islink(path) and not self._is_inside(path):
                    self._left_out += 1
                elif os.path.isfile(path):
                    yield _readable(os.path.relpath(path, self.root), self.folder), column

    def _is_inside(self, path: str) -> bool:
        return os.path.commonpath([os.path.realpath(path), self.root]) == self.root


def _file_kinds() -> dict[str, str]:
    """The arguments of the processor whose files have known suffixes -> the kind of file."""
    return {argument: modality.name for argument, modality in MODALITIES.items() if modality.name in SUFFIXES}


def _suffixes(kind: str) -> set[str]:
    """The ends of the names of such files."""
    if kind != IMAGE:
        return set(SUFFIXES[kind])
    from PIL import Image

    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    return known | set(SUFFIXES[IMAGE])


def _readable(path: str, folder: Path) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = path.encode(errors="replace").decode()
        raise ValueError(f"{folder}: the name of the file {shown!r} is not valid Unicode; rename it.") from error
    return path


def _some(kinds: Mapping[str, str]) -> str:
    """A few suffixes, the usual ones first."""
    usual = [suffix for suffixes in SUFFIXES.values() for suffix in suffixes[:3] if suffix in kinds]
    return ", ".join([*usual, "..."])
