"""Weights that stay as they are."""

from typing import ClassVar

from .base import TaskWeighting, register_weighting


@register_weighting
class StaticWeighting(TaskWeighting):
    """
    The `loss_weight` of each task, and nothing else. Studies that compare find tuned fixed weights hard to beat
    (https://arxiv.org/abs/2201.04122, https://arxiv.org/abs/2505.10347).
    """

    kind: ClassVar[str] = "static"
    is_constant: ClassVar[bool] = True
