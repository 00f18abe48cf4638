"""Files that are there wholly or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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
    finally:
        partial.unlink(missing_ok=True)
