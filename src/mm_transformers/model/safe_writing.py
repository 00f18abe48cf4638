"""
Writes to a temporary file, then renames it: a file is complete or absent, and nothing is written through a link.

A link with the name of a file is replaced by the file; its target stays unchanged.
"""

import errno
import os
import platform
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Optional


# The weights of a model in one file, or in several with an index.
_WEIGHTS = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_OWN_NAME = re.compile(
    r"(?:\..+\.(?=.*\.partial$)|\.saving-|_training_lock\.json\.)([0-9a-f]{8})-(\d+)-[0-9a-f]{16}(?:\.partial)?"
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """
    A file to write to, which replaces `path` at the end of the block, and is removed after an exception.

    Args:
        path (`str` or `Path`): Its folder is created if it does not exist. A link with this name is replaced, not
            followed.

    Raises:
        OSError: from writing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since only within a file system a file is renamed in one step.
    partial = path.with_name(f".{path.name[:100]}.{own_name()}.partial")
    try:
        with open(partial, "xb") as file:  # never an existing file, nor through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        _keep_mode(path, partial)
        os.replace(partial, path)
    except OSError as error:
        if error.errno in _NO_SPACE and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """As [`write_atomically`], a whole text as UTF-8."""
    with write_atomically(path) as file:
        file.write(text.encode())


@contextmanager
def saved_aside(folder: Any) -> Iterator[Path]:
    """
    A new folder to save files to. When the block ends, they take their places in `folder`; after an exception they are
    gone, and the files of `folder` are as before. Weights that were saved there before in another number of files go,
    since loading would mix them with the new ones.

    Args:
        folder (`str` or `Path`): Made if it does not exist.

    Example:

    ```python
    >>> with saved_aside("my-model") as staged:
    ...     tokenizer.save_pretrained(staged)
    ```"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".saving-{own_name()}"
    staged.mkdir()
    try:
        yield staged
        saved = {path.name for path in staged.iterdir()}
        for path in sorted(staged.rglob("*")):
            target = folder / path.relative_to(staged)
            if path.is_dir():
                drop_link(target)
                target.mkdir(exist_ok=True)
            else:
                _keep_mode(target, path)
                os.replace(path, target)
        _remove_other_weights(folder, saved)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def leads_outside(path: Path, folder: Path) -> bool:
    """
    Whether a path in a folder is a link to another place, so that reading it would reveal another file of this machine.

    Links of the cache of huggingface_hub, from a snapshot to its blobs, count as files.
    """
    target, folder = path.resolve(), folder.resolve()
    is_blob = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return not (target.is_relative_to(folder) or is_blob)


def own_name() -> str:
    """A unique name that contains the id of the process; see [`process_of`]."""
    return f"{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:16]}"


def process_of(path: Path) -> Optional[int]:
    """The process of this host that has created a temporary file or folder; `None` for other files."""
    found = _OWN_NAME.fullmatch(path.name)
    return int(found[2]) if found and found[1] == _HOST else None


def drop_link(path: Any) -> None:
    """Removes a link, so that code that opens this path creates a new file; anything else stays."""
    if os.path.islink(path):
        os.unlink(path)


def _remove_other_weights(folder: Path, saved: set[str]) -> None:
    names = {found[1] for name in saved if (found := _WEIGHTS.fullmatch(name))}
    for path in folder.iterdir():
        found = _WEIGHTS.fullmatch(path.name)
        if found and found[1] in names and path.name not in saved:
            path.unlink()


def _keep_mode(old: Path, new: Path) -> None:
    """Copies the permissions: a private file stays private."""
    if old.is_file() and not old.is_symlink():
        new.chmod(stat.S_IMODE(old.stat().st_mode))
