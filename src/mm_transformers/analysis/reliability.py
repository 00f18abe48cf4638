"""Compares confidence and accuracy of answers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


NUM_BINS = 15


class Reliability(NamedTuple):
    """
    How well confidences and accuracies of answers agree.

    Args:
        ece: expected calibration error, the mean over all answers of |accuracy - confidence| of their bin (Guo et al.
            2017, https://arxiv.org/abs/1706.04599); 0 is best.
        counts, confidences, accuracies: of each of the bins of equal width from 0 to 1; NaN in bins without answers.
    """

    ece: float
    counts: list[int]
    confidences: list[float]
    accuracies: list[float]


def reliability(confidences: np.ndarray, right: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """
    The reliability of answers with these confidences.

    Args:
        confidences (answers,): probability of each answer, from 0 to 1.
        right (answers,) bool: whether it was right.
    """
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=values.astype(float), minlength=num_bins) for values in (confidences, right)]
    with np.errstate(invalid="ignore"):
        mean_confidence, accuracy = (total / counts for total in sums)
    error = np.abs(sums[1] - sums[0]).sum() / max(len(confidences), 1)
    return Reliability(float(error), counts.tolist(), mean_confidence.tolist(), accuracy.tolist())


def chance_error(confidences: np.ndarray, num_draws: int = 200, seed: int = 0) -> float:
    """
    The calibration error that perfect confidences would have by chance, with as many answers.

    Few answers have few per bin, so their error is far from 0 even if every confidence is right. This is the mean error
    of answers that are right with just their confidence, drawn at random.

    Args:
        confidences (answers,): probability of each answer, from 0 to 1.
        num_draws (`int`, *optional*, defaults to 200): How often to draw.
    """
    random = np.random.default_rng(seed)
    drawn = (random.random(len(confidences)) < confidences for _ in range(num_draws))
    return float(np.mean([reliability(confidences, right).ece for right in drawn]))


def draw_reliability(axes: Any, found: Mapping[str, Reliability], title: str) -> None:
    """
    Draws accuracy by confidence.

    Args:
        axes (`matplotlib.axes.Axes`): Where.
        found: the name of each curve, and what it shows. The legend names the curves, if there are several.
        title: of the axes.
    """
    axes.set_visible(True)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    for (name, one), color in zip(found.items(), ("#1f77b4", "#d62728"), strict=False):
        used = [i for i, count in enumerate(one.counts) if count]
        x, y = ([values[i] for i in used] for values in (one.confidences, one.accuracies))
        axes.plot(x, y, color=color, linewidth=1, label=f"{name}: {100 * one.ece:.1f}%")
        axes.scatter(x, y, color=color, s=[10 + 90 * one.counts[i] / max(one.counts) for i in used])
    axes.set(xlim=(0, 1.05), ylim=(0, 1.05))
    axes.set_xlabel("confidence", fontsize=8)
    axes.set_ylabel("share of right answers", fontsize=8)
    axes.set_title(title, fontsize=9)
    if len(found) > 1:
        axes.legend(fontsize=7, title="calibration error", title_fontsize=7, loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
