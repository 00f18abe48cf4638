"""Reads the rows of clients: their files are decoded and resized once, and nothing of this machine is read."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional
from weakref import WeakValueDictionary

from ...model.chats import MESSAGES
from ...model.file_contents import decoded_base64
from ...model.images import ProcessedPictures
from ...model.label_cells import shorten
from ...model.limits import limits, named
from ...model.modalities import MODALITIES, PARTS, VISION, Modality, ReaderContext
from ...model.pipeline_mm_transformer import RowPipeline, checked_row
from ...model.processing_mm_transformer import check_number


# The smallest files of pictures and sounds are larger; shorter texts are paths.
_FEWEST_BYTES = 24


class ReadRow(NamedTuple):
    """
    A row that the pipeline takes without reading a file.

    Args:
        row: text, columns, and pictures, sounds and videos in memory.
        weight: its bytes in memory.
    """

    row: dict[str, Any]
    weight: int


class NobodyWaitsError(Exception):
    """Nobody waits for the rows any more."""


class _Sound(dict[str, Any]):
    """A sound in memory; unlike other dicts, it can be referred to weakly."""


class _Work:
    """
    The work that one request may cause.

    Args:
        stopped: set when nobody waits for it any more.
    """

    def __init__(self, stopped: Optional[threading.Event]) -> None:
        self.stopped, self.pixels = stopped, 0

    def check(self) -> None:
        if self.stopped is not None and self.stopped.is_set():
            raise NobodyWaitsError

    def add_pixels(self, pixels: int) -> None:
        self.pixels += pixels
        if self.pixels > limits().served_pixels:
            raise ValueError(
                f"the pictures of the request have in all more pixels than {named('served_pixels')}: "
                "send fewer rows at a time."
            )


class RowReader:
    """
    Reads rows of strangers for a pipeline.

    A picture, sound or video is bytes, or a text in base64. Paths and addresses are refused. Equal files that are in
    memory at the same time are one object, so a batch encodes them once.

    Args:
        pipe ([`RowPipeline`]): Says which keys a row may have.

    Example:

    ```python
    >>> RowReader(pipe).read([{"text": "Lovely weather!"}])[0].row
    {'text': 'Lovely weather!'}
    ```
    """

    def __init__(self, pipe: RowPipeline) -> None:
        self.processor: Any = pipe.processor
        self.known = frozenset(pipe.known_keys())
        # The keys of files, and of chats, which may hold files.
        self.heavy = {MESSAGES, *PARTS}.union(*(self.processor.input_columns.get(name, ()) for name in PARTS))
        self._kept: WeakValueDictionary[Any, Any] = WeakValueDictionary()
        self._lock = threading.Lock()

    def is_quick(self, rows: Sequence[Any]) -> bool:
        """Whether the rows hold texts and columns alone. A file of a kilobyte may be a picture of seconds."""
        return not any(isinstance(row, dict) and not self.heavy.isdisjoint(row) for row in rows)

    def read(self, rows: Sequence[Any], stopped: Optional[threading.Event] = None) -> list[ReadRow]:
        """
        Rows that can be answered; in any thread.

        Args:
            stopped: no further file is read once this is set.

        Raises:
            NobodyWaitsError: if it was stopped.
            ValueError: one sentence, if a row has an unknown key, no content, or a cell that cannot be read. Also if
                the rows need more memory than the limits allow.
        """
        found, total, work = [], 0, _Work(stopped)
        for number, row in enumerate(rows):
            try:
                found.append(self._read_row(row, number, work))
            except ValueError as error:
                told = str(error)
                raise ValueError(told if told.startswith("Row ") else f"Row {number}: {told}") from error
            total += found[-1].weight
            if total > limits().served_memory:
                raise ValueError(
                    f"The pictures, videos and sounds of the request take more memory than {named('served_memory')}: "
                    "send fewer rows at a time."
                )
        return found

    def _read_row(self, row: Any, number: int, work: _Work) -> ReadRow:
        parts = checked_row(row, number, self.known, self.processor)
        read, weight = dict(parts), 0
        text = parts.get("text", "")
        if len(text) > limits().served_characters:
            raise ValueError(f"the text has {len(text):,} characters, more than {named('served_characters')}")
        for modality in MODALITIES.values():
            if modality.columns is not None:
                self._check_columns(modality, parts)
            elif modality.name in parts:
                read[modality.name], bytes_of_part = self._read_part(modality, parts[modality.name], work)
                weight += bytes_of_part
        return ReadRow(read, weight + 4 * len(text))

    def _check_columns(self, modality: Modality, parts: dict[str, Any]) -> None:
        config = self.processor.own_configs.get(modality.encoder.name)
        cells = modality.cell(parts, config) if config is not None else {}
        for name, cell in cells.items():
            if not isinstance(cell, (str, int, float, bool)):
                raise ValueError(f"column {shorten(name)!r} must be a number or a text, but is a {type(cell).__name__}")
            if isinstance(cell, str) and len(cell) > limits().served_characters:
                raise ValueError(
                    f"column {shorten(name)!r} has {len(cell):,} characters, more than {named('served_characters')}"
                )
        if cells:
            modality.reader(self._context())(cells)

    def _read_part(self, modality: Modality, cell: Any, work: _Work) -> tuple[Any, int]:
        """The items of a cell in memory, and their bytes."""
        if not modality.has_files:
            # A kind of the user's own, whose cells are no files. The pipeline reads them; here they are checked.
            read = modality.reader(self._context())
            for item in modality.items(cell):
                read(item)
            return cell, 8 * len(str(cell))
        contents = [_file_of(item, modality.name) for item in modality.items(cell)]
        if not contents:
            return None, 0
        check_number(contents, modality.nouns)
        most = modality.pixels_for_each(contents)
        items = [self._read_file(modality, content, most, work) for content in contents]
        return (items[0] if modality.is_single else items), sum(map(_num_bytes, items))

    def _read_file(self, modality: Modality, content: bytes, most_pixels: Any, work: _Work) -> Any:
        work.check()
        if modality.encoder.own is not None:
            modality.reader(self._context())(content)
            return content
        key = (modality.name, hashlib.sha256(content).digest(), most_pixels)
        with self._lock:
            item = self._kept.get(key)
        if item is None:
            work.add_pixels(modality.declared_pixels(content))
            options = {} if most_pixels is None else {"most_pixels": most_pixels}
            item = modality.reader(self._context())(content, **options)
            if modality.encoder is VISION:
                pictures = item if isinstance(item, list) else [item]
                item = ProcessedPictures(self.processor.process_pictures(pictures))
            else:
                item = _Sound(item)
            with self._lock:
                item = self._kept.setdefault(key, item)
        return item

    def _context(self) -> ReaderContext:
        return ReaderContext(self.processor, _fetch_nothing)


def _file_of(cell: Any, key: str) -> bytes:
    """The bytes of a file that a client sent."""
    if isinstance(cell, bytes):
        return cell
    text = cell if isinstance(cell, str) else ""
    content = decoded_base64(text.partition(",")[2] if text[:5].lower() == "data:" else text)
    if content is None or len(content) < _FEWEST_BYTES:
        raise ValueError(
            f"{key} must be a file in base64, or an upload in a form; this server reads no paths and no addresses"
        )
    return content


def _num_bytes(item: Any) -> int:
    tensor = item.pixel_values if isinstance(item, ProcessedPictures) else item
    if isinstance(tensor, dict):
        tensor = tensor["array"]
    return int(tensor.nbytes) if hasattr(tensor, "nbytes") else len(tensor)


def _fetch_nothing(address: str) -> bytes:
    raise ValueError("addresses are not fetched")
