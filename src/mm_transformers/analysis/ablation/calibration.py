"""Compares confidence and accuracy of answers."""

from typing import NamedTuple

import numpy as np


NUM_BINS = 15


class Calibration(NamedTuple):
    """
    The calibration of answers.

    Args:
        ece: expected calibration error, the mean over all answers of |accuracy - confidence| of their bin (Guo et al.
            2017, https://arxiv.org/abs/1706.04599); 0 is best.
        counts, confidences, accuracies: of each of the bins of equal width from 0 to 1; NaN in bins without answers.
    """

    ece: float
    counts: list[int]
    confidences: list[float]
    accuracies: list[float]


def calibration(confidences: np.ndarray, right: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
    """
    The calibration of answers with these confidences.

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
    return Calibration(float(error), counts.tolist(), mean_confidence.tolist(), accuracy.tolist())
