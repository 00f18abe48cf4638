"""Weights that make tasks train at similar rates, by the norms of their gradients."""

from typing import ClassVar, Optional

import torch

from .base import StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting
from .task_numbers import TaskNumbers


@register_weighting
class GradNormWeighting(TaskWeighting):
    """
    GradNorm (Chen et al. 2018, https://arxiv.org/abs/1711.02257): slow tasks get larger gradients.

    `G_k = |w_k grad L_k|` is the gradient norm at the probe block, the last layer that all tasks share. The weights
    follow the gradient of `sum_k |G_k - mean(G) * r_k^alpha|`. Here `r_k` is the current loss of task k as a share of
    its first loss, relative to the mean of the tasks. The target is held fixed. Then the weights are scaled to sum to
    the number of tasks. Tasks without labels in a step keep their weight, as do tasks whose gradient does not reach the
    probe block.

    Args:
        alpha (`float`, *optional*, defaults to 1.5): How strongly slow tasks are helped.
        learning_rate (`float`, *optional*, defaults to 0.025): The learning rate of the weights, for Adam.
    """

    kind: ClassVar[str] = "gradnorm"
    needs_gradients: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, alpha: float = 1.5, learning_rate: float = 0.025):
        super().__init__(tasks)
        self.alpha = check_option(self.kind, "alpha", alpha)
        rate = check_option(self.kind, "learning_rate", learning_rate)
        self.task_weights = TaskNumbers(1.0, len(tasks.names), rate)
        self.first_losses = torch.full((len(tasks.names),), torch.nan)

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        return self.task_weights.values

    def update(self, step: StepSignals) -> None:
        assert step.gradients is not None
        norms = step.gradients.norm(dim=1).cpu()
        seen = step.can_improve & (norms > 0)
        if not seen.any():
            return
        self.first_losses = torch.where(seen & self.first_losses.isnan(), step.losses, self.first_losses)
        before = self.task_weights.values
        rates = step.losses[seen] / self.first_losses[seen]
        scaled = before[seen] * norms[seen]
        target = scaled.mean() * (rates / rates.mean()) ** self.alpha
        gradients = torch.zeros_like(before)
        gradients[seen] = (scaled - target).sign() * norms[seen]  # of sum |G_k - target|, the target held fixed
        self.task_weights.step(gradients, seen)
        # A negative weight would maximise the loss of the task.
        after = self.task_weights.values.clamp(min=1e-3)
        self.task_weights.values = torch.where(seen, after * before[seen].sum() / after[seen].sum(), before)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**self.task_weights.state_dict(), "first_losses": self.first_losses}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.first_losses = state["first_losses"].clone()
        self.task_weights.load_state_dict(state)
