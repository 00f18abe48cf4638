"""Weights that make tasks train at similar rates, by the norms of their gradients."""

from typing import ClassVar, Optional

import torch

from .base import StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting
from .uncertainty import adam_state, load_adam_state


@register_weighting
class GradNormWeighting(TaskWeighting):
    """
    GradNorm (Chen et al. 2018, https://arxiv.org/abs/1711.02257): with `G_k = |w_k grad L_k|` at the probe block, the
    last layer that all tasks share, the weights follow the gradient of `sum_k |G_k - mean(G) * r_k^alpha|`, where `r_k`
    is the share of its first loss that task k still has, relative to the mean of the tasks; the target is held fixed.
    Then they are scaled to sum to the number of tasks. Tasks without labels in a step are not updated.

    Args:
        alpha (`float`, *optional*, defaults to 1.5): How strongly slow tasks are helped.
        learning_rate (`float`, *optional*, defaults to 0.025): Of the weights, for Adam.
    """

    kind: ClassVar[str] = "gradnorm"
    needs_gradients: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, alpha: float = 1.5, learning_rate: float = 0.025):
        super().__init__(tasks)
        self.alpha = check_option(self.kind, "alpha", alpha)
        self.task_weights = torch.ones(len(tasks.names), requires_grad=True)
        self.first_losses = torch.full((len(tasks.names),), torch.nan)
        rate = check_option(self.kind, "learning_rate", learning_rate)
        self.optimizer = torch.optim.Adam([self.task_weights], lr=rate)

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        return self.task_weights.detach().clone()

    def update(self, step: StepSignals) -> None:
        assert step.gradients is not None
        seen, losses = step.labelled, step.losses.clamp(min=1e-8)
        self.first_losses = torch.where(seen & self.first_losses.isnan(), losses, self.first_losses)
        norms = step.gradients.norm(dim=1).cpu()
        if not (norms[seen] > 0).any():  # the rows of this step do not reach the probe block
            return
        before = self.task_weights.detach().clone()
        rates = losses[seen] / self.first_losses[seen]
        scaled = self.task_weights[seen] * norms[seen]
        target = (scaled.mean() * (rates / rates.mean()) ** self.alpha).detach()
        [self.task_weights.grad] = torch.autograd.grad((scaled - target).abs().sum(), self.task_weights)
        self.optimizer.step()
        with torch.no_grad():
            # A weight that Adam would take below 0 would turn the task around.
            updated = torch.where(seen, self.task_weights.clamp(min=1e-3), before)
            self.task_weights.copy_(updated * len(updated) / updated.sum())

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {"weights": self.task_weights.detach(), "first_losses": self.first_losses}
        return {**state, **adam_state(self.optimizer)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.task_weights.copy_(state["weights"])
        self.first_losses = state["first_losses"].clone()
        load_adam_state(self.optimizer, state)
