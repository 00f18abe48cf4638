"""Weights that balance the scales of losses and gradients."""

from typing import ClassVar, Optional

import torch

from .base import SMALLEST_LOSS, StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting


@register_weighting
class DBMTLWeighting(TaskWeighting):
    """
    DB-MTL (Lin et al. 2023, https://arxiv.org/abs/2308.12029): balances the logarithms of the losses and the gradient
    norms.

    It takes the logarithm of each loss, and scales the gradient of each task to the largest norm. Norms are those of
    moving averages, `g_k <- beta g_k + (1 - beta) grad log L_k`.

    This is an approximation. The paper averages and scales the gradients of all shared parameters. Here norms are taken
    at the probe block, the last layer that all tasks share. They become weights `max_j |g_j| / (|g_k| L_k)` of one
    ordinary backward pass.

    Args:
        beta (`float`, *optional*, defaults to 0.9):
            The decay of the average. With 0, no gradient of the size of the probe block is kept (and saved) per task.
    """

    kind: ClassVar[str] = "db_mtl"
    looks_ahead: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, beta: float = 0.9):
        super().__init__(tasks)
        self.beta = check_option(self.kind, "beta", beta, below=1.0)
        self.average: Optional[torch.Tensor] = None
        self.num_steps = torch.zeros(len(tasks.names))

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        assert step is not None  # it looks ahead
        average, num_steps = self._averaged(step)
        # The averages start at 0 and are corrected as in Adam, since tasks may have different numbers of steps.
        norms = average.norm(dim=1).cpu() / (1 - self.beta ** num_steps.clamp(min=1))
        # A task whose rows bypass the layer has no gradient there. It keeps its own scale.
        scales = torch.where(norms > 0, norms.max() / norms, 1.0)
        return torch.where(step.can_improve, scales / step.losses.clamp(min=SMALLEST_LOSS), 0.0)

    def update(self, step: StepSignals) -> None:
        # Not in `weights`: the optimiser may skip a step, whose gradients are then unreliable.
        if self.beta > 0:
            self.average, self.num_steps = self._averaged(step)

    def _averaged(self, step: StepSignals) -> tuple[torch.Tensor, torch.Tensor]:
        """The averages with this step, (num_tasks, num_parameters), and the number of steps of each task."""
        assert step.gradients is not None
        seen = step.can_improve
        gradients = step.gradients / step.losses.clamp(min=SMALLEST_LOSS)[:, None].to(step.gradients.device)
        average = torch.zeros_like(gradients) if self.average is None else self.average.to(gradients.device)
        updated = self.beta * average + (1 - self.beta) * gradients
        return torch.where(seen[:, None].to(gradients.device), updated, average), self.num_steps + seen

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self.average is None else {"average": self.average, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.average, self.num_steps = state.get("average"), state.get("num_steps", self.num_steps)
