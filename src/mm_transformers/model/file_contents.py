"""The contents of cells that hold images, videos or sounds: paths, addresses, bytes, and dicts with one of these."""

import base64
import hashlib
import os
import re
import stat
import urllib.parse
import urllib.request
from collections.abc import Hashable, Mapping
from typing import Any, Optional

from .label_cells import is_null, shorten
from .limits import limits, named


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
_DATA_URL = re.compile(r"data:([^,]{0,200}?)(;base64)?,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{48,}={0,2}")
# The first bytes of files of images, sounds and videos; those of MP4 have a number before them.
_SIGNATURES = (
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"OggS", b"fLaC", b"ID3", b"FORM",
    b"\x1aE\xdf\xa3",
)  # fmt: skip


class UnreadableFile(ValueError):
    """A file or an address that cannot be read; the message says why, in one sentence."""


def content_of(cell: Any) -> Any:
    """
    The bytes or the path in a cell; anything else unchanged.

    A dict with both gives the bytes. Texts in base64 and `data:` addresses are bytes, `file://` addresses are paths.
    """
    if isinstance(cell, Mapping):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if not isinstance(cell, str):
        return cell
    if cell.startswith("file://"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(cell).path)
    inline = _inline_bytes(cell)
    return cell if inline is None else inline


def _inline_bytes(text: str) -> Optional[bytes]:
    """The file in a text; `None` if it holds none, or one that is too large or damaged."""
    if len(text) > limits().file_bytes:
        return None
    found = _DATA_URL.match(text)
    if found is not None:
        content = text[found.end() :]
        return decoded_base64(content) if found.group(2) else urllib.parse.unquote_to_bytes(content)
    text = text.strip()
    if len(text) < 48 or not _BASE64.fullmatch(text):
        return None
    start = decoded_base64(text[:24]) or b""
    return decoded_base64(text) if start.startswith(_SIGNATURES) or start[4:8] == b"ftyp" else None


def decoded_base64(text: str) -> Optional[bytes]:
    """The bytes of a text in base64, also its variant for addresses; `None` if it is none."""
    text = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:  # letters beyond ASCII, too
        return None


def is_absent(cell: Any) -> bool:
    """True for an empty cell: a missing value, a blank text, or a dict without bytes, path and array."""
    if isinstance(cell, Mapping) and set(cell) & {"array", "bytes", "path"}:
        return cell.get("array") is None and cell.get("bytes") is None and is_absent(cell.get("path"))
    return is_null(cell) or (isinstance(cell, str) and not cell.strip())


def cast_of(cell: Any) -> Mapping[str, Any]:
    """The decoding options of the data set for the cell, such as `{"mode": "L"}`."""
    options = cell.get("cast") if isinstance(cell, Mapping) else None
    is_right = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
    return options if is_right else {}


def content_key(cell: Any, content: Any) -> Hashable:
    """Equal for the same object, path or bytes, decoded with the same options."""
    options = "".join(f"{name}={value};" for name, value in sorted(cast_of(cell).items()))
    if isinstance(content, bytes):
        return hashlib.sha256(options.encode() + content).digest()
    if isinstance(content, (str, os.PathLike)):
        return os.fspath(content) if not options else f"{os.fspath(content)}|{options}"
    return id(content)


def describe(cell: Any, kind: str) -> str:
    """The name of an image, a video or a sound in messages."""
    if isinstance(cell, Mapping):
        path, others = cell.get("path"), (value for value in cell.values() if value is not None)
        is_empty = path is None or (isinstance(path, str) and not path)
        cell = next(others, None) if is_empty else path
    if isinstance(cell, str) and (cell.startswith("data:") or isinstance(content_of(cell), bytes)):
        return f"the {kind} (a text of {len(cell):,} characters)"
    if isinstance(cell, (str, os.PathLike)):
        return f"{kind} {shorten(os.fspath(cell))!r}"
    if isinstance(cell, bytes):
        return f"the {kind} ({len(cell):,} bytes)"
    return f"the {kind} (a {type(cell).__name__})"


def not_there(cell: Any, kind: str) -> str:
    """The sentence for a file that does not exist, without its end."""
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if text.startswith("data:"):
        if len(text) > limits().file_bytes:
            return f"{describe(cell, kind)} is longer than {named('file_bytes')}"
        return f"{describe(cell, kind)} is not valid base64"
    if is_address(text):
        return f"{describe(cell, kind)} is an address, which only data sets can open; give a file, or its bytes"
    is_relative = bool(text) and not os.path.isabs(text) and len(text) < 4096
    return f"{describe(cell, kind)} does not exist{' in the current folder' if is_relative else ''}"


def is_address(content: Any) -> bool:
    """Whether a text is not a path but an address, such as `s3://...`, or holds the file itself."""
    if not isinstance(content, str):
        return False
    return bool(_ADDRESS.match(content)) or content.startswith("data:") or isinstance(content_of(content), bytes)


def check_file(content: bytes | str | os.PathLike[str]) -> None:
    """
    Checks bytes or a path before they are read.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableFile: if it is larger than the limit `file_bytes`, or a device, a pipe or a folder.
    """
    if isinstance(content, bytes):
        size = len(content)
    else:
        # Paths are never so long, and the system's error would contain all of it.
        if len(os.fspath(content)) > 4096 or "\0" in os.fspath(content):
            raise FileNotFoundError
        found = os.stat(content)
        if not stat.S_ISREG(found.st_mode):
            is_folder = stat.S_ISDIR(found.st_mode)
            raise UnreadableFile("it is a folder" if is_folder else "it is a device or a pipe, not a file")
        size = found.st_size
    if size > limits().file_bytes:
        raise UnreadableFile(f"it has {size:,} bytes, more than {named('file_bytes')}")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """
    All bytes of a file, within the limits.

    Raises:
        OSError, UnreadableFile: as [`check_file`].
    """
    check_file(path)
    with open(path, "rb") as file:
        return file.read(int(limits().file_bytes))
