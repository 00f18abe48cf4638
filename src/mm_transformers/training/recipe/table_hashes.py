"""Hashes of the tables of a training, beside its model: later they say whether a table has changed."""

import hashlib
import json
from pathlib import Path

from ...model.safe_writing import write_atomically
from .recipe import Recipe


TABLES_NAME = "tables.json"


def hashes_of_tables(recipe: Recipe) -> dict[str, str]:
    """Split -> the SHA-256 of its file. Empty for a data set that is named, and not given as files."""
    return {split: _hash_of(path) for split, path in recipe.data.files.items()}


def _hash_of(path: str) -> str:
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            content.update(part)
    return content.hexdigest()


def save_hashes(folder: Path, hashes: dict[str, str]) -> None:
    """Writes `tables.json` atomically."""
    with write_atomically(folder / TABLES_NAME) as file:
        file.write((json.dumps(hashes, indent=2) + "\n").encode())


def has_new_test_rows(recipe: Recipe, folder: Path) -> bool | None:
    """
    Whether test rows are held out of a table that is not that of the training in a folder.

    Then they may be rows of that training. `None` if the folder does not say it. Test rows in a file of their own are
    never trained on, and validation rows have no part in the split.

    Raises:
        OSError: if the table cannot be read.
    """
    if recipe.data.test is not None or recipe.data.train is None:
        return False
    try:
        known = json.loads((folder / TABLES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict):
        return None
    return known.get("train") != _hash_of(recipe.data.train)
