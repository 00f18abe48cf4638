"""Weights by the uncertainty of each task."""

from typing import ClassVar, Optional

import torch

from .base import StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting
from .task_numbers import TaskNumbers


@register_weighting
class UncertaintyWeighting(TaskWeighting):
    """
    Homoscedastic uncertainty (Kendall et al. 2018, https://arxiv.org/abs/1705.07115): learns a variance for each task.

    It minimises `sum_k a_k exp(-s_k) L_k + s_k / 2` over the model and `s`. `s` is the log variance of each task; it
    starts at 0 and stays within ±5. `a_k` is 1 for cross-entropies and 1/2 for squared errors. Tasks without labels in
    a step keep their `s_k`.

    The gradient by `s_k` is `1/2 - a_k exp(-s_k) L_k`, from the losses of the whole step. Adam without decay applies
    it, so `s_k` is equal in all processes.

    Args:
        learning_rate (`float`, *optional*): The learning rate of `s`. Defaults to 10 times that of the training
            arguments.
    """

    kind: ClassVar[str] = "uncertainty"

    def __init__(self, tasks: WeightedTasks, *, learning_rate: Optional[float] = None):
        super().__init__(tasks)
        rate = 10 * tasks.learning_rate if learning_rate is None else learning_rate
        rate = check_option(self.kind, "learning_rate", rate)
        self.log_variances = TaskNumbers(0.0, len(tasks.names), rate)
        self.scales = torch.tensor(tasks.likelihood_scales)

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        return self.scales * torch.exp(-self.log_variances.values)

    def update(self, step: StepSignals) -> None:
        self.log_variances.step(0.5 - self.weights(None) * step.losses, step.labelled)
        self.log_variances.values = self.log_variances.values.clamp(-5.0, 5.0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.log_variances.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.log_variances.load_state_dict(state)
