"""Files that are there wholly or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_writable(path: Path) -> None:
    """
    Before long work whose result is to be written there.

    Raises:
        ValueError: if it is a folder, or lies in what is none or may not be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is no folder.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: {folder} may not be written to.")


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """
    A file to write to, which takes the place of `path` when the block ends, and is gone if it ends by an exception.

    Raises:
        OSError: as writing does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since only within a file system a file is renamed in one step.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in _NO_SPACE and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
