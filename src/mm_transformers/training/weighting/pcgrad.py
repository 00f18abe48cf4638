"""Projected gradients that do not conflict."""

from typing import ClassVar

import torch

from .base import TaskWeighting, WeightedTasks, check_option, register_weighting


@register_weighting
class PCGradWeighting(TaskWeighting):
    """
    PCGrad (Yu et al. 2020, https://arxiv.org/abs/2001.06782): removes conflicts between the gradients of tasks.

    Two gradients conflict if `g_i . g_j < 0`. Then `g_i` loses its part along `g_j`:
    `g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j`. This is done for all other tasks j in random order, and the results are
    summed.

    It applies to the parameters that tasks share. Task layers keep their gradients, as does the decoder if one task
    alone writes. With several processes, gradients are averaged over them first, and then projected.

    It costs a backward pass and a copy of the gradients per task.

    Args:
        seed (`int`, *optional*, defaults to 0): The seed of the order.
    """

    kind: ClassVar[str] = "pcgrad"
    merges_gradients: ClassVar[bool] = True

    def __init__(self, tasks: WeightedTasks, *, seed: int = 0):
        super().__init__(tasks)
        self.seed = int(check_option(self.kind, "seed", seed))

    def merge(self, products: torch.Tensor, step: int) -> torch.Tensor:
        # All results are sums of the gradients, so their coefficients are enough: row i is the current
        # gradient i. The order depends on seed and step only, so a resumed training has the same order.
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        coefficients = torch.eye(len(products), dtype=products.dtype)
        for i in range(len(products)):
            for j in torch.randperm(len(products), generator=generator).tolist():
                along = coefficients[i] @ products[:, j]
                if i != j and along < 0:
                    coefficients[i, j] -= along / products[j, j]
        return coefficients.sum(0)
