"""Weights by how uncertain each task is."""

from typing import ClassVar, Optional

import torch

from .base import StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting


@register_weighting
class UncertaintyWeighting(TaskWeighting):
    """
    Homoscedastic uncertainty (Kendall et al. 2018, https://arxiv.org/abs/1705.07115): minimises
    `sum_k a_k exp(-s_k) L_k + s_k / 2` over the model and `s`, the log variance of each task, which starts at 0 and
    stays within ±5. `a_k` is 1 for cross-entropies and 1/2 for squared errors. Tasks without labels in a step keep
    their `s_k`.

    The gradient by `s_k`, `1/2 - a_k exp(-s_k) L_k`, is taken from the losses of the whole step and followed by Adam
    without decay, so it is the same in all processes.

    Args:
        learning_rate (`float`, *optional*): Of `s`. Defaults to 10 times that of the training arguments.
    """

    kind: ClassVar[str] = "uncertainty"

    def __init__(self, tasks: WeightedTasks, *, learning_rate: Optional[float] = None):
        super().__init__(tasks)
        rate = 10 * tasks.learning_rate if learning_rate is None else learning_rate
        self.log_variances = torch.zeros(len(tasks.names), requires_grad=True)
        self.scales = torch.tensor(tasks.likelihood_scales)
        self.optimizer = torch.optim.Adam([self.log_variances], lr=check_option(self.kind, "learning_rate", rate))

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        return self.scales * torch.exp(-self.log_variances.detach())

    def update(self, step: StepSignals) -> None:
        before = self.log_variances.detach().clone()
        self.log_variances.grad = 0.5 - self.weights(None) * step.losses
        self.optimizer.step()
        with torch.no_grad():
            self.log_variances.clamp_(-5.0, 5.0)
            self.log_variances.copy_(torch.where(step.labelled, self.log_variances, before))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"log_variances": self.log_variances.detach(), **adam_state(self.optimizer)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.log_variances.copy_(state["log_variances"])
        load_adam_state(self.optimizer, state)


def adam_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What Adam remembers of its one parameter, as tensors."""
    [parameter] = optimizer.param_groups[0]["params"]
    return {f"adam_{name}": torch.as_tensor(value) for name, value in optimizer.state[parameter].items()}


def load_adam_state(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    [parameter] = optimizer.param_groups[0]["params"]
    found = {name.removeprefix("adam_"): value.clone() for name, value in state.items() if name.startswith("adam_")}
    optimizer.state[parameter].update(found)
