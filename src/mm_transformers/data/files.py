"""Where results can be written; how they are written is in `model/safe_writing.py`."""

import os
from pathlib import Path


def check_writable(path: Path) -> None:
    """
    Before long work whose result is to be written there.

    Raises:
        ValueError: if it is a folder, or lies in what is none or may not be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: you have no permission to write to {folder}.")
