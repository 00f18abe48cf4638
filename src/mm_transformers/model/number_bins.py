"""The bins of a column of numbers, and the place of a number in them (https://arxiv.org/abs/2203.05556)."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from .label_cells import is_finite_number, shorten_value


# More bins were no better on validation rows.
_BINS, _VALUES_PER_BIN = 8, 10
# The largest number of edges in the config of a stranger.
_MOST_EDGES = 65


def find_bins(values: Sequence[float]) -> list[float]:
    """
    The edges of bins with about as many values each; none if there are too few different values for two bins.

    Example:

    ```python
    >>> find_bins([float(i) for i in range(40)])
    [0.0, 9.0, 19.0, 29.0, 39.0]
    ```
    """
    import numpy as np

    bins = min(_BINS, len(values) // _VALUES_PER_BIN)
    if bins < 2:
        return []
    # Edges are values: a number between two of them may be infinite.
    edges = np.unique(np.quantile(np.asarray(values, float), np.arange(bins + 1) / bins, method="inverted_cdf"))
    return edges.tolist() if len(edges) > 2 else []


def checked_bins(edges: Any, where: str) -> list[float]:
    """
    The edges of a config, checked: it may come from a stranger.

    Raises:
        ValueError: one sentence.
    """
    is_list = isinstance(edges, (list, tuple)) and 2 <= len(edges) <= _MOST_EDGES
    if not is_list or not all(map(is_finite_number, edges)):
        raise ValueError(
            f"{where} must have bins that are a list of 2 to {_MOST_EDGES} finite numbers, but has "
            f"{shorten_value(edges)}."
        )
    found = [float(edge) for edge in edges]
    if any(low >= high for low, high in itertools.pairwise(found)):
        raise ValueError(f"{where} must have bins that increase, but has {shorten_value(edges)}.")
    return found


def shares_of_bins(number: float, edges: Sequence[float]) -> list[float]:
    """
    The share of each bin that is below a number: 1, ..., 1, a share, 0, ..., 0.

    Numbers beyond the outer edges count as these. So outliers have no effect; they have one by the standardised number.

    Example:

    ```python
    >>> shares_of_bins(6.0, [0.0, 4.0, 8.0, 9.0])
    [1.0, 0.5, 0.0]
    ```
    """
    bins = len(edges) - 1
    if number <= edges[0]:
        return [0.0] * bins
    if number >= edges[-1]:
        return [1.0] * bins
    place = bisect_right(edges, number) - 1
    low, high = edges[place], edges[place + 1]
    if math.isinf(high - low):
        number, low, high = number / 2, low / 2, high / 2
    return [1.0] * place + [(number - low) / (high - low)] + [0.0] * (bins - place - 1)


class CentredShares:
    """
    The shares of the bins of a column that are below a number, minus those of the mean of the column.

    So the mean has zeros, as a missing number has in a linear model.

    Args:
        column (`dict`): the config of a column of numbers; it may lack `bins`.

    Example:

    ```python
    >>> CentredShares({"mean": 2.0, "bins": [0.0, 4.0, 8.0]})(6.0)
    [0.5, 0.5]
    ```
    """

    def __init__(self, column: Mapping[str, Any]) -> None:
        self.edges: Sequence[float] = column.get("bins", ())
        self.of_mean = shares_of_bins(column["mean"], self.edges) if self.edges else []

    def __call__(self, number: float | None) -> list[float]:
        """NaN if the number is missing; an empty list without bins."""
        if number is None or not self.edges:
            return [math.nan] * len(self.of_mean)
        shares = shares_of_bins(number, self.edges)
        return [share - mean for share, mean in zip(shares, self.of_mean, strict=True)]
