"""Hashes of the tables of a training, beside its model: later they say whether a table has changed."""

import hashlib
import json
from pathlib import Path

from ...model.safe_writing import write_atomically
from .recipe import Recipe


TABLES_NAME = "tables.json"


def hashes_of_tables(recipe: Recipe) -> dict[str, str]:
    """Split -> the SHA-256 of its file. Empty for a data set that is named, and not given as files."""
    found = {}
    for split, path in recipe.data.files.items():
        content = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(2**20):
                content.update(part)
        found[split] = content.hexdigest()
    return found


def save_hashes(folder: Path, hashes: dict[str, str]) -> None:
    """Writes `tables.json` atomically."""
    with write_atomically(folder / TABLES_NAME) as file:
        file.write((json.dumps(hashes, indent=2) + "\n").encode())


def changed_tables(recipe: Recipe, folder: Path) -> list[str] | None:
    """
    The files of a recipe that are not those of the training in a folder; `None` if the folder does not say it.

    Raises:
        OSError: if a file cannot be read.
    """
    try:
        known = json.loads((folder / TABLES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict):
        return None
    return [recipe.data.files[split] for split, found in hashes_of_tables(recipe).items() if known.get(split) != found]
