"""The regulariser of the task layers: lambda * sum_j Omega(theta_j)."""

import math
import numbers
from typing import Any, Optional

import torch
from torch import nn


_PENALTIES = {
    "l2": lambda parameter: parameter.float().square().sum(),
    "l1": lambda parameter: parameter.float().abs().sum(),
}


def check_regularization(spec: Optional[dict[str, Any]]) -> None:
    """
    Raises:
        ValueError: if `spec` is neither `None` nor `{"kind": "l2" | "l1", "weight": number >= 0}`.
    """
    if spec is None:
        return
    if not isinstance(spec, dict) or set(spec) != {"kind", "weight"} or spec["kind"] not in _PENALTIES:
        raise ValueError(f'regularization must be {{"kind": "l2" or "l1", "weight": lambda}} or None, but is {spec!r}.')
    weight = spec["weight"]
    if not isinstance(weight, numbers.Real) or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"The weight of the regularization must be a number >= 0, but is {weight!r}.")


def regularized_parameters(heads: nn.Module) -> list[nn.Parameter]:
    """The matrices of the task layers that are trained. Biases are left out, as in weight decay."""
    return [p for p in heads.parameters() if p.ndim >= 2 and p.requires_grad]


def regularization_loss(heads: nn.Module, spec: dict[str, Any]) -> torch.Tensor:
    """lambda * sum over the tasks of the squares (l2) or absolute values (l1) in their task layers, in float32."""
    penalty = _PENALTIES[spec["kind"]]
    nothing = next(heads.parameters()).new_zeros((), dtype=torch.float32)
    return spec["weight"] * sum((penalty(p) for p in regularized_parameters(heads)), start=nothing)
