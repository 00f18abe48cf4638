"""Norms and cosines of the gradients of the tasks, for the logs."""

import torch
from transformers import TrainerCallback


class TaskGradientsCallback(TrainerCallback):
    """
    Logs the norms and similarities of the tasks' gradients, every so many steps of [`MMTrainer`].

    - `gradient_norm_<a>`: the norm of the gradient of the mean loss of task a.
    - `gradient_cosine_<a>_<b>`: 1 if two tasks have the same direction, -1 if they have opposite ones.
    - `gradient_similarity_<a>_<b>`: `2 |a| |b| / (|a|^2 + |b|^2)`, 1 if both norms are equal.

    The last one is from Yu et al. 2020 (https://arxiv.org/abs/2001.06782).

    Gradients are those of the whole optimiser step, at the last layer that all tasks share, without `loss_weight`. With
    PCGrad they cover all parameters that the tasks share. A measured step costs a short backward pass per task; other
    steps cost nothing. Tasks without a label in the step are left out. The values are in the next line of the log.

    Args:
        every (`int`, *optional*, defaults to 100): Number of optimiser steps between two measurements.

    Raises:
        ValueError: if `every` is less than 1.

    Example:

    ```python
    >>> trainer = MMTrainer(model, args, processing_class=processor, train_dataset=rows)
    >>> trainer.add_callback(TaskGradientsCallback(every=50))
    ```
    """

    def __init__(self, every: int = 100):
        if every < 1:
            raise ValueError(f"every must be at least 1, but is {every}.")
        self.every = every
        self._values: dict[str, float] = {}

    def record(self, names: list[str], products: torch.Tensor) -> None:
        """
        Records the gradients of one step.

        Args:
            names: of the tasks that have labels.
            products (num_tasks, num_tasks) float64: inner products of their gradients.
        """
        norms = products.diagonal().clamp(min=0).sqrt()
        self._values = {f"gradient_norm_{name}": norm for name, norm in zip(names, norms.tolist(), strict=True)}
        for i, first in enumerate(names):
            for j in range(i + 1, len(names)):
                size = norms[i] * norms[j]
                if size > 0:
                    pair = f"{first}_{names[j]}"
                    self._values[f"gradient_cosine_{pair}"] = (products[i, j] / size).item()
                    self._values[f"gradient_similarity_{pair}"] = (2 * size / (norms[i] ** 2 + norms[j] ** 2)).item()

    def take(self) -> dict[str, float]:
        """The recorded values since the last call."""
        values, self._values = self._values, {}
        return values
