"""Measures of trust: calibration errors, and accuracy if only the surest rows are answered."""

from typing import NamedTuple

import numpy as np
import torch

from ..reliability import NUM_BINS, reliability


class RiskCoverage(NamedTuple):
    """
    The accuracy of the surest answers.

    Args:
        coverages: shares of the rows that are answered.
        accuracies: of the answered rows.
        area: the mean error over all shares (AURC, https://arxiv.org/abs/1805.08206); 0 is best.
    """

    coverages: list[float]
    accuracies: list[float]
    area: float


def class_wise_error(probabilities: torch.Tensor, labels: torch.Tensor, num_bins: int = NUM_BINS) -> float:
    """
    The mean over the labels of the calibration error of their probability (https://arxiv.org/abs/1910.12656).

    Args:
        probabilities (rows, labels), labels (rows,) int64.
    """
    errors = []
    for number in range(probabilities.shape[1]):
        holds = (labels == number).numpy()
        errors.append(reliability(probabilities[:, number].double().numpy(), holds, num_bins).ece)
    return float(np.mean(errors))


def risk_coverage(confidences: np.ndarray, right: np.ndarray) -> RiskCoverage:
    """
    The accuracy of the surest rows, for each number of them. Rows of equal confidence are answered together.

    Args:
        confidences (rows,): from which each row is answered first.
        right (rows,) bool: whether the answer is right.
    """
    if len(confidences) == 0:
        return RiskCoverage([], [], float("nan"))
    order = np.argsort(-confidences, kind="stable")
    ordered, sums = confidences[order], np.cumsum(right[order].astype(float))
    counts = np.arange(1, len(order) + 1)
    # In a tie, any order is as good, so each row has the mean of its ties.
    last = np.append(np.flatnonzero(np.diff(ordered)), len(order) - 1)
    first = np.append(0, last[:-1] + 1)
    for begin, end in zip(first, last, strict=True):
        before = sums[begin - 1] if begin else 0.0
        sums[begin : end + 1] = before + (sums[end] - before) * np.arange(1, end - begin + 2) / (end - begin + 1)
    accuracies = sums / counts
    return RiskCoverage((counts / len(order)).tolist(), accuracies.tolist(), float(1 - accuracies.mean()))


def accuracy_at(curve: RiskCoverage, coverage: float) -> float:
    """The accuracy if this share of the rows is answered, the surest first."""
    if not curve.coverages:
        return float("nan")
    place = max(round(coverage * len(curve.coverages)) - 1, 0)
    return curve.accuracies[place]
