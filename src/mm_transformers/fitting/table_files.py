"""Tables in memory as files, since a recipe names files."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from ..model.label_cells import is_null
from ..model.safe_writing import write_atomically
from ..training.recipe import RECIPE_NAME


# Files of `fit` with rows of the user. The Hub leaves out the files that a `.gitignore` names.
_NOT_FOR_THE_HUB = ("report.html", "folds.csv", "folds/", "rows/", "features/", "training_args.bin")


def keep_from_hub(folder: Path) -> None:
    """Names the files that hold rows in a `.gitignore`, unless the folder has one."""
    path = folder / ".gitignore"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            "# These files hold rows of the table, so they are not uploaded.",
            *(f"/{x}" for x in _NOT_FOR_THE_HUB),
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_file(rows: Any, path: Path) -> str | os.PathLike[str]:
    """
    The file of a table; rows in memory are written to `path`.

    Raises:
        ValueError: if a model in the folder was trained on other rows.
    """
    if isinstance(rows, (str, os.PathLike)):
        return rows
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(f"The table has the splits {', '.join(rows)}: give them as table, validation= and test=.")
    if not isinstance(rows, datasets.Dataset):
        records = [_plain(record) for record in (rows.to_dict("records") if hasattr(rows, "to_dict") else rows)]
        names = dict.fromkeys(name for record in records for name in record)  # rows may lack columns
        rows = datasets.Dataset.from_dict({name: [record.get(name) for record in records] for name in names})
    content = io.BytesIO()
    rows.to_parquet(content)
    if path.is_file() and path.read_bytes() == content.getvalue():
        return path
    if path.exists() and (path.parent.parent / RECIPE_NAME).exists():
        raise ValueError(f"{path.parent.parent} holds the recipe of a training on other rows; choose another output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(content.getvalue())
    return path


def _plain(record: Mapping[Any, Any]) -> dict[str, Any]:
    # In pandas, NaN stands for a missing cell of any type.
    return {str(name): None if is_null(cell) else cell for name, cell in record.items()}
