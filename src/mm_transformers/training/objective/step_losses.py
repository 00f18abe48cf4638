"""Accumulates the losses of the tasks, from the batches of an optimiser step to a log line."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ...model.task_base import Task


def divisors_of(
    tasks: Mapping[str, Task], batches: Sequence[Mapping[str, Any]], accelerator: Accelerator, device: torch.device
) -> dict[str, torch.Tensor]:
    """
    The divisors of the losses of these batches.

    Args:
        tasks: name -> task.
        batches: all micro-batches of one optimiser step of this process, with `labels`, a dict from task to tensor.
        accelerator: averages over the processes.
        device: of the result.

    Returns:
        Task -> number of its labels, and "regularization" -> number of batches; scalar tensors. Gradients are averaged
            over the processes, so each process divides by its share of the labels of all.
    """
    counts = torch.zeros(len(tasks), device=device)
    for batch in batches:
        for i, (name, task) in enumerate(tasks.items()):
            if name in batch.get("labels", {}):
                counts[i] += task.num_labelled(batch["labels"][name]).to(device)
    counts = accelerator.reduce(counts, reduction="mean")
    divisors = dict(zip(tasks, counts, strict=True))
    return {**divisors, "regularization": torch.tensor(float(max(len(batches), 1)), device=device)}


class StepLosses:
    """
    The loss of each task and of the regularizer, summed over the optimiser steps since the last log line.

    It also counts the labels of each task since the start of training. All values are scalar tensors of this process.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begins a training."""
        self.num_labels: dict[str, torch.Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self.last: dict[str, torch.Tensor] = {}  # those of the last batch
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps: dict[str, torch.Tensor] = {}  # how many optimiser steps had any loss of this name

    def count_labels(self, divisors: Mapping[str, torch.Tensor], tasks: Mapping[str, Task]) -> None:
        """Adds the labels of one optimiser step; `divisors` come from [`divisors_of`]."""
        for name in tasks:
            self.num_labels[name] = self.num_labels.get(name, 0) + divisors[name]

    def add(self, losses: Mapping[str, torch.Tensor], divisors: Mapping[str, torch.Tensor]) -> None:
        """Adds the losses of one micro-batch, each already divided by its number in `divisors`."""
        self.last = {name: loss.detach() for name, loss in losses.items()}
        for name, loss in self.last.items():
            steps = (divisors[name] > 0) / divisors["regularization"]  # each batch is a part of its step
            self._sums[name] = self._sums.get(name, 0) + loss
            self._num_steps[name] = self._num_steps.get(name, 0) + steps

    def take_logs(self, accelerator: Accelerator) -> dict[str, float]:
        """`<name>_loss` -> its mean over the steps since the last call that had any, and over all processes."""
        if not self._sums:
            return {}
        means = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="mean").tolist()
        steps = {name: steps.item() for name, steps in self._num_steps.items()}
        logs = {
            f"{name}_loss": mean / steps[name] for name, mean in zip(self._sums, means, strict=True) if steps[name] > 0
        }
        self._forget()
        return logs

    def state(self) -> dict[str, torch.Tensor]:
        """The state for a resumed training, by names for [`load`]."""
        parts = {"losses": self._sums, "num_steps": self._num_steps, "num_labels": self.num_labels}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sums, self._num_steps, self.num_labels = (
            {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
            for part in ("losses/", "num_steps/", "num_labels/")
        )
