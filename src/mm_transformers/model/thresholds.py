"""The probability from which on a label is in an answer: one number, or one for each label."""

import numbers
from typing import Any

import torch


DEFAULT = 0.5


def check_thresholds(name: str, value: Any, labels: list[str]) -> float | dict[str, float]:
    """
    The value of the option `threshold`: a float, or a dict from each label to a float.

    Labels that the given dict leaves out have 0.5.

    Raises:
        ValueError: if it is something else, names an unknown label, or holds a number that is not between 0 and 1.
    """
    found = dict.fromkeys(labels, DEFAULT)
    for label, number in value.items() if isinstance(value, dict) else [(None, value)]:
        of = "" if label is None else f" of {label!r}"
        if label is not None and str(label) not in found:
            raise ValueError(f"Task {name!r}: threshold names {label!r}, which is not one of its labels.")
        if isinstance(number, bool) or not isinstance(number, numbers.Real) or not 0 < number < 1:
            raise ValueError(f"Task {name!r}: threshold{of} must lie between 0 and 1, but is {number!r}.")
        if label is None:
            return float(number)
        found[str(label)] = float(number)
    return found


def best_threshold(probabilities: torch.Tensor, holds: torch.Tensor, otherwise: float) -> float:
    """
    The threshold with the highest F1 of a label.

    Every threshold between two neighbouring probabilities gives the same answers, so the middle is taken. Of equally
    good ones, the one nearest to 0.5 is taken.

    Args:
        probabilities: (rows,) of the label.
        holds: (rows,) bool, whether the row has the label.
        otherwise: the result if all rows have the label, or none.
    """
    if not holds.any() or holds.all():
        return otherwise
    ordered, order = probabilities.double().sort(descending=True)
    right = holds[order].cumsum(0)
    chosen = torch.arange(1, len(ordered) + 1, device=ordered.device)
    f1 = 2 * right / (chosen + holds.sum())  # 2 TP / (2 TP + FP + FN)
    below = torch.cat([ordered[1:], ordered.new_zeros(1)])
    middles = (ordered + below) / 2
    # Equal probabilities are on one side; a middle that rounds to one of its neighbours separates nothing.
    is_cut = (ordered > middles) & (middles > below) & (middles > 0) & (middles < 1)
    if not is_cut.any():
        return otherwise
    f1 = torch.where(is_cut, f1, -1.0)
    best = torch.where(f1 == f1.max(), (middles - DEFAULT).abs(), torch.inf)
    return float(middles[best.argmin()])
