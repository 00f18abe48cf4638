"""The `y` of scikit-learn as columns of a table."""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils import column_or_1d

from ..model.label_cells import NUMBER, PADDING


def as_pandas(table: Any) -> Any:
    """Tables of polars, pyarrow and datasets as those of pandas; anything else as it is."""
    return table.to_pandas() if hasattr(table, "to_pandas") and not hasattr(table, "iloc") else table


def targets_of(y: Any, table: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """The names of the targets, which differ from the columns of the table, and their cells."""
    y = as_pandas(y)
    values = np.asarray(y)
    if values.ndim == 2 and values.shape[1] > 1:
        names = list(map(str, y.columns)) if hasattr(y, "columns") else [f"y{i}" for i in range(values.shape[1])]
        columns = [np.asarray(y.iloc[:, i]) if hasattr(y, "iloc") else values[:, i] for i in range(len(names))]
    else:
        names = [y.name if isinstance(getattr(y, "name", None), str) else "y"]
        columns = [column_or_1d(y, warn=values.ndim > 1)]
    taken, found = set(table.columns), []
    for name, cells in zip(names, columns, strict=True):
        while name in taken:
            name += "_"
        taken.add(name)
        missing = int(pd.isna(cells).sum())
        if missing:
            raise ValueError(
                f"Input y contains NaN or None in {missing:,} rows: leave these rows out, or use "
                "`mm_transformers.fit`, which trains the other targets with such rows."
            )
        found.append((name, cells))
    return found


def names_of_classes(classes: np.ndarray) -> list[str]:
    """A label for each class: the class as a text, if all these texts are labels of their own."""
    names = [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) for value in classes]
    are_whole = [name.lstrip("-").isdigit() for name in names]
    are_plain = all(
        name == name.strip() and name not in ("", str(PADDING)) and (whole or not NUMBER.fullmatch(name))
        for name, whole in zip(names, are_whole, strict=True)
    )
    if are_plain and len(set(names)) == len(names) and (all(are_whole) or not any(are_whole)):
        return names
    return [f"class {i}" for i in range(len(names))]
