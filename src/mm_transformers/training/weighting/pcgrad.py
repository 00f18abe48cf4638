"""Gradients that no longer contradict each other."""

from typing import ClassVar

import torch

from .base import TaskWeighting, WeightedTasks, check_option, register_weighting


@register_weighting
class PCGradWeighting(TaskWeighting):
    """
    PCGrad (Yu et al. 2020, https://arxiv.org/abs/2001.06782): where the gradients of two tasks point against each
    other, `g_i . g_j < 0`, the part of `g_i` along `g_j` is taken away, `g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j`, for
    all other tasks j in random order; the results are summed. For the parameters that tasks share; task layers, and the
    decoder if one task alone writes, keep their gradients. With several processes, gradients are averaged over them
    first, and then projected.

    It costs a backward pass and a copy of the gradients per task.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the order.
    """

    kind: ClassVar[str] = "pcgrad"
    merges_gradients: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, seed: int = 0):
        super().__init__(tasks)
        self.seed = int(check_option(self.kind, "seed", seed))

    def merge(self, products: torch.Tensor, step: int) -> torch.Tensor:
        # All that arises is a sum of the gradients, so it is enough to follow the coefficients: row i says what has
        # become of gradient i. The order is a function of seed and step, so it survives a resume.
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        coefficients = torch.eye(len(products), dtype=products.dtype)
        for i in range(len(products)):
            for j in torch.randperm(len(products), generator=generator).tolist():
                along = coefficients[i] @ products[:, j]
                if i != j and along < 0:
                    coefficients[i, j] -= along / products[j, j]
        return coefficients.sum(0)
