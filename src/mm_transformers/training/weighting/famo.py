"""Weights that make all tasks improve at the same rate."""

from typing import ClassVar, Optional

import torch

from .base import StepSignals, TaskWeighting, WeightedTasks, check_option, register_weighting
from .uncertainty import adam_state, load_adam_state


# Losses below this count as this: the logarithm of 0 is not a number.
SMALLEST_LOSS = 1e-8


@register_weighting
class FAMOWeighting(TaskWeighting):
    """
    FAMO (Liu et al. 2023, https://arxiv.org/abs/2306.03792): follows the gradient of `c * sum_k z_k log(L_k)` with
    `z = softmax(xi)` and `c = 1 / sum_k (z_k / L_k)`, so that the weights of the losses, `c z_k / L_k`, sum to 1. After
    the step the same batches are run forward again, and `xi` follows, by Adam, the gradient of
    `sum_k z_k (log L_k before - log L_k after)`: tasks that improved less get more weight.

    This is the exact form; it costs one forward pass per step, and one more with gradient accumulation.

    Args:
        learning_rate (`float`, *optional*, defaults to 0.025): Of `xi`.
        weight_decay (`float`, *optional*, defaults to 0.01): Of `xi`.
    """

    kind: ClassVar[str] = "famo"
    looks_ahead: ClassVar[bool] = True
    needs_losses_after: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, learning_rate: float = 0.025, weight_decay: float = 0.01):
        super().__init__(tasks)
        self.logits = torch.zeros(len(tasks.names), requires_grad=True)
        self.optimizer = torch.optim.Adam(
            [self.logits],
            lr=check_option(self.kind, "learning_rate", learning_rate),
            weight_decay=check_option(self.kind, "weight_decay", weight_decay),
        )

    def _shares(self, labelled: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.logits.masked_fill(~labelled, -torch.inf), dim=0)

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        assert step is not None  # it looks ahead
        if not step.labelled.any():
            return torch.ones_like(step.losses)
        weights = self._shares(step.labelled).detach() / step.losses.clamp(min=SMALLEST_LOSS)
        return weights / weights.sum()

    def update(self, step: StepSignals) -> None:
        assert step.losses_after is not None
        if not step.labelled.any():
            return
        before = self.logits.detach().clone()
        gain = step.losses.clamp(min=SMALLEST_LOSS).log() - step.losses_after.clamp(min=SMALLEST_LOSS).log()
        [self.logits.grad] = torch.autograd.grad((self._shares(step.labelled) * gain).sum(), self.logits)
        self.optimizer.step()
        with torch.no_grad():
            self.logits.copy_(torch.where(step.labelled, self.logits, before))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"logits": self.logits.detach(), **adam_state(self.optimizer)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        load_adam_state(self.optimizer, state)
