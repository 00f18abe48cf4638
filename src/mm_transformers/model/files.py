"""What images, videos and sounds in a table have in common: paths, addresses, bytes, and dicts with one of these."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Hashable, Mapping
from typing import Any


def content_of(cell: Any) -> Any:
    """What a dict holds, the bytes if it has both bytes and path; anything else as it is."""
    if not isinstance(cell, Mapping):
        return cell
    return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")


def content_key(content: Any) -> Hashable:
    """Equal for the same object, path or bytes."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    if isinstance(content, (str, os.PathLike)):
        return os.fspath(content)
    return id(content)


def describe(cell: Any, kind: str) -> str:
    """How messages call an image, a video or a sound."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") or next((value for value in cell.values() if value is not None), None)
    if isinstance(cell, (str, os.PathLike)):
        return f"{kind} {os.fspath(cell)!r}"
    if isinstance(cell, bytes):
        return f"the {kind} ({len(cell):,} bytes)"
    return f"the {kind} (a {type(cell).__name__})"


def not_there(cell: Any, kind: str) -> str:
    """The sentence about a file that does not exist."""
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    is_relative = isinstance(path, (str, os.PathLike)) and bool(os.fspath(path)) and not os.path.isabs(path)
    return f"{describe(cell, kind)} does not exist{' in the current folder' if is_relative else ''}"


def is_url(content: Any) -> bool:
    return isinstance(content, str) and content.startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """
    Raises:
        OSError: if there is no answer within 30 seconds, it is an error, or it is cut short.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mm-transformers"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()
    except (ValueError, http.client.HTTPException) as error:  # a wrong address, half an answer
        raise OSError(str(error)) from error
