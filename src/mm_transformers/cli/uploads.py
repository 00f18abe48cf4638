"""What a client may hand to the demo page: files that it uploaded, and no path or address of its own."""

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..model.limits import limits


# One sentence, whatever was wrong: another one would say which files this machine has.
REFUSAL = "Upload the file to this page: it reads no paths and no addresses, and forgets files after a while."
_META = {"_type": "gradio.FileData"}


class UploadError(ValueError):
    """What a client sent is no file that it uploaded."""

    def __init__(self) -> None:
        super().__init__(REFUSAL)


class Upload(NamedTuple):
    """
    An uploaded file.

    Args:
        name (`str`): What the client calls it; only shown.
        content (`bytes`): All of it.
    """

    name: str
    content: bytes


def upload_folder() -> Path:
    """
    The folder of uploads, which gradio reads from the environment. If nobody has chosen one, this process makes its own
    and removes it at its end.
    """
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = _own_folder().name
    return Path(os.environ["GRADIO_TEMP_DIR"])


_made: list[tempfile.TemporaryDirectory] = []


def _own_folder() -> tempfile.TemporaryDirectory:
    if not _made:
        _made.append(tempfile.TemporaryDirectory(prefix="mm-transformers-page-", ignore_cleanup_errors=True))
    return _made[0]


def check_inputs(values: Any) -> None:
    """
    Before gradio looks at what a client sent: gradio fetches addresses, and passes over what it takes for no file.

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
    Args:
        given: what a client sent in the place of a file; `None` for no file.

    Raises:
        UploadError: if it is anything but a file that was uploaded.
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
        raise ValueError(f"The file is larger than the {most:,} bytes that are allowed (upload_bytes).")
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
