"""Constant weights."""

from typing import ClassVar

from .base import TaskWeighting, register_weighting


@register_weighting
class StaticWeighting(TaskWeighting):
    """
    Uses only the `loss_weight` of each task.

    Comparative studies find tuned fixed weights hard to beat (https://arxiv.org/abs/2201.04122,
    https://arxiv.org/abs/2505.10347).
    """

    kind: ClassVar[str] = "static"
    is_constant: ClassVar[bool] = True
