"""The weight of each label in a loss: numbers, or "balanced" over the training rows."""

from typing import Any, Optional

import torch

from .label_cells import is_finite_number


BALANCED = "balanced"


def check_weights(task: Any, option: str) -> Any:
    """
    The value of an option of weights: `None`, `"balanced"`, or a dict from each label to a float.

    Labels that the given dict leaves out have the weight 1.

    Raises:
        ValueError: if it is something else, names an unknown label, or holds a weight that is negative or not finite.
    """
    value = getattr(task, option)
    if value is None or value == BALANCED:
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f"Task {task.name!r}: {option} must be None, {BALANCED!r} or a dict from label to weight, but is {value!r}."
        )
    weights = dict.fromkeys(task.labels, 1.0)
    for label, weight in value.items():
        if str(label) not in weights:
            raise ValueError(
                f"Task {task.name!r}: {option} names {label!r}, which is not one of its labels: "
                f"{', '.join(task.labels[:20])}{', ...' if len(task.labels) > 20 else ''}."
            )
        if not is_finite_number(weight) or weight < 0:
            raise ValueError(
                f"Task {task.name!r}: {option} of {label!r} must be a finite number >= 0, but is {weight!r}."
            )
        weights[str(label)] = float(weight)
    return weights


def weight_tensor(task: Any, option: str, device: torch.device) -> Optional[torch.Tensor]:
    """
    The weights in the order of the labels, (num_labels,) float32; `None` if there are none.

    Raises:
        ValueError: if balanced weights are not yet known.
    """
    value = getattr(task, option)
    if value is None:
        return None
    if value == BALANCED:
        raise ValueError(
            f"Task {task.name!r}: {option}={BALANCED!r} has no numbers yet, since MMTrainer computes them from the "
            "training rows. Train with MMTrainer, or give a dict from label to weight."
        )
    return torch.tensor([value[label] for label in task.labels], dtype=torch.float32, device=device)


def known_weights(task: Any, option: str) -> Optional[tuple[float, ...]]:
    """The weights in the order of the labels; `None` if there are none, or if they are not yet known."""
    value = getattr(task, option)
    return tuple(value[label] for label in task.labels) if isinstance(value, dict) else None


def balanced_weights(labels: list[str], counts: list[float]) -> dict[str, float]:
    """
    n / (k * n_c) for each label: n labels in total, of k different ones, n_c of label c.

    Their mean over the n labels is 1. A label that does not occur has the weight 1.
    """
    num_labels, num_known = sum(counts), sum(count > 0 for count in counts)
    return {
        label: num_labels / (num_known * count) if count > 0 else 1.0
        for label, count in zip(labels, counts, strict=True)
    }
