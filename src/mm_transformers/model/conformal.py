"""
Split conformal prediction: thresholds for which sets and intervals hold the truth as often as promised.

The promise holds on average over rows that are exchangeable with the calibration rows, such as further rows of the same
source (Vovk et al. 2005; https://arxiv.org/abs/2107.07511).
"""

import math
from collections.abc import Sequence
from typing import Optional

import torch


# Thresholds are stored for these coverages: 1/200, 2/200, ...
NUM_LEVELS = 200
LEVELS = tuple(number / NUM_LEVELS for number in range(1, NUM_LEVELS))


def quantile_thresholds(scores: torch.Tensor, levels: Sequence[float] = LEVELS) -> list[float]:
    """
    For each coverage the smallest threshold that a new score stays below with at least this probability.

    It is the score number ceil((n + 1) * coverage) of n, in ascending order, and infinite if there are fewer.

    Args:
        scores (rows,): of the truths of calibration rows, lower for more plausible ones.
    """
    ordered = _known(scores).sort().values.tolist()
    places = [math.ceil(level * (len(ordered) + 1) - 1e-9) for level in levels]
    return [ordered[place - 1] if place <= len(ordered) else math.inf for place in places]


def risk_thresholds(scores: torch.Tensor, holds: torch.Tensor, levels: Sequence[float] = LEVELS) -> list[float]:
    """
    For each coverage the smallest threshold below which lies, on average over new rows, this share of the true labels.

    This is conformal risk control (https://arxiv.org/abs/2208.02814) of the false negative rate. Rows without a true
    label miss none.

    Args:
        scores (rows, labels): lower for more plausible labels.
        holds (rows, labels) bool: the true labels.
    """
    count = len(scores)
    of_row = holds.sum(-1, keepdim=True).expand_as(holds)[holds].double()
    ordered, order = _known(scores[holds]).sort()
    # The mean share of missed labels if the threshold is the score at this place.
    missed = 1 / (of_row[order] * max(count, 1))
    risks = torch.cat([missed.flip(0).cumsum(0).flip(0), missed.new_zeros(1)]).tolist()
    values = [-math.inf, *ordered.tolist()]
    found, place = [], 0
    for level in levels:
        bound = (1 - level) * (count + 1) / max(count, 1) - 1 / max(count, 1)
        if count == 0 or bound < -1e-12:
            found.append(math.inf)
            continue
        while risks[place] > bound + 1e-12:
            place += 1
        found.append(values[place])
    return found


def level_of(coverage: float) -> int:
    """
    The place of the lowest stored coverage that is at least this one.

    Raises:
        ValueError: if it is not between 0 and the highest stored coverage.
    """
    if isinstance(coverage, bool) or not isinstance(coverage, (int, float)) or not 0 < coverage <= LEVELS[-1]:
        raise ValueError(f"coverage must be above 0 and at most {LEVELS[-1]}, but is {coverage!r}.")
    return math.ceil(coverage * NUM_LEVELS - 1e-9) - 1


def stored(thresholds: Sequence[float]) -> list[Optional[float]]:
    """For JSON: 6 digits, rounded up, so that no promise is lost; `None` for infinity."""
    return [_rounded_up(value) if math.isfinite(value) else _LOWEST if value < 0 else None for value in thresholds]


_LOWEST = -1e30


def _known(scores: torch.Tensor) -> torch.Tensor:
    """Scores in float64. Nothing is known of an answer that is no number, so its score is infinite."""
    return torch.where(scores.isnan(), math.inf, scores.double())


def _rounded_up(value: float) -> float:
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return float(f"{math.ceil(value / unit) * unit:.12g}")
