"""Weights that make all tasks improve at the same rate."""

from typing import ClassVar, Optional

import torch

from .base import SMALLEST_LOSS, StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting
from .task_numbers import TaskNumbers


@register_weighting
class FAMOWeighting(TaskWeighting):
    """
    FAMO (Liu et al. 2023, https://arxiv.org/abs/2306.03792): tasks that improved less get more weight.

    Training follows the gradient of `c * sum_k z_k log(L_k)`, with `z = softmax(xi)` and `c = 1 / sum_k (z_k / L_k)`.
    So the weights of the losses, `c z_k / L_k`, sum to 1. After the step, the same batches run forward again. Then Adam
    updates `xi` by the gradient of `sum_k z_k (log L_k before - log L_k after)`.

    This is the exact form. It costs one forward pass per step, and one more with gradient accumulation.

    Args:
        learning_rate (`float`, *optional*, defaults to 0.025): The learning rate of `xi`.
        weight_decay (`float`, *optional*, defaults to 0.01): The weight decay of `xi`.
    """

    kind: ClassVar[str] = "famo"
    looks_ahead: ClassVar[bool] = True
    needs_losses_after: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, learning_rate: float = 0.025, weight_decay: float = 0.01):
        super().__init__(tasks)
        self.logits = TaskNumbers(
            0.0,
            len(tasks.names),
            check_option(self.kind, "learning_rate", learning_rate),
            check_option(self.kind, "weight_decay", weight_decay),
        )

    def _shares(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.logits.values.masked_fill(~seen, -torch.inf), dim=0)

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        assert step is not None  # it looks ahead
        if not step.can_improve.any():
            return torch.ones_like(step.losses)
        weights = self._shares(step.can_improve) / step.losses.clamp(min=SMALLEST_LOSS)
        return weights / weights.sum()

    def update(self, step: StepSignals) -> None:
        assert step.losses_after is not None
        seen = step.can_improve
        if seen.any():
            gain = step.losses.clamp(min=SMALLEST_LOSS).log() - step.losses_after.clamp(min=SMALLEST_LOSS).log()
            shares = self._shares(seen)
            self.logits.step(shares * (gain - (shares * gain).sum()), seen)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.logits.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.logits.load_state_dict(state)
