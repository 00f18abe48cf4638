"""The inputs of the demo page that clients may send: uploaded files, and no paths or addresses."""

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..model.limits import limits


# The same sentence for all errors: details would reveal the files of this machine.
REFUSAL = "Upload the file to this page again: it reads no paths and no addresses, and deletes uploads after some time."
_META = {"_type": "gradio.FileData"}


class UploadError(ValueError):
    """A client sent a value that is no uploaded file."""

    def __init__(self) -> None:
        super().__init__(REFUSAL)


class Upload(NamedTuple):
    """
    An uploaded file.

    Args:
        name (`str`): Its name from the client; only shown.
        content (`bytes`): All of it.
    """

    name: str
    content: bytes


def upload_folder() -> Path:
    """
    The folder of uploads, which gradio reads from the environment.

    If it is not set, this process creates a folder and removes it at its end.
    """
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = _own_folder().name
    return Path(os.environ["GRADIO_TEMP_DIR"])


_made: list[tempfile.TemporaryDirectory[str]] = []


def _own_folder() -> tempfile.TemporaryDirectory[str]:
    if not _made:
        _made.append(tempfile.TemporaryDirectory(prefix="mm-transformers-page-", ignore_cleanup_errors=True))
    return _made[0]


def check_inputs(values: Any) -> None:
    """
    Checks the inputs of a client before gradio reads them: gradio fetches addresses, and ignores objects that are no
    files.

    Args:
        values: JSON, such as the list of the inputs of an event.

    Raises:
        UploadError: if an object in it is no uploaded file.
    """
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            _real_path(value)
        elif isinstance(value, (list, tuple)):
            pending.extend(value)


def opened_upload(given: Any) -> Optional[Upload]:
    """
    The file that a client uploaded.

    Args:
        given: the client's value of a file input; `None` for no file.

    Raises:
        UploadError: if it is anything but an uploaded file.
        ValueError: if the file is larger than `limits().upload_bytes`.
    """
    if given is None:
        return None
    path, most = _real_path(given), limits().upload_bytes
    try:
        # The last part is no link: `path` is a real path.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            content = file.read(most + 1)
    except OSError:
        raise UploadError from None
    if len(content) > most:
        raise ValueError(f"The file is larger than the limit of {most:,} bytes (upload_bytes).")
    return Upload(path.name, content)


def _real_path(given: Any) -> Path:
    path = given.get("path") if isinstance(given, Mapping) else None
    if not isinstance(path, str) or given.get("is_stream") or given.get("meta") != _META:
        raise UploadError
    try:
        real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(upload_folder()))
        is_file = folder in real.parents and os.path.isabs(path) and stat.S_ISREG(os.lstat(real).st_mode)
    except (OSError, ValueError):  # missing, too long, or with a zero byte
        raise UploadError from None
    if not is_file:
        raise UploadError
    return real
