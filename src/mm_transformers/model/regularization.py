"""The regulariser: lambda * sum_j Omega(theta_j) over the task layers, and the encoders if requested."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import nn

from .label_cells import is_finite_number
from .modalities import ENCODERS


class Omega(NamedTuple):
    """
    One kind of penalty.

    Args:
        measure: a matrix in float32, less its starting point -> its penalty.
        is_from_start: whether all matrices have their starting point, or only linear probes.
    """

    measure: Callable[[torch.Tensor], torch.Tensor]
    is_from_start: bool = False

    def starts(self, name: str) -> bool:
        """Whether the penalty of the parameter of this name is that of its distance from the starting point."""
        return self.is_from_start or _IS_PROBE in name


_PENALTIES = {
    "l2": Omega(lambda difference: difference.square().sum()),
    "l1": Omega(lambda difference: difference.abs().sum()),
    "l2_sp": Omega(lambda difference: difference.square().sum(), is_from_start=True),
}
# All penalties use the distance of linear probes from their start; for other matrices only L2-SP does.
_IS_PROBE = ".probe.linear."
_ENCODERS = tuple(f"{name}_model" for name, encoder in ENCODERS.items() if encoder.own is None)  # pretrained


class Penalty(NamedTuple):
    """
    The penalty of some parameters.

    Args:
        omega: the kind of penalty.
        weight: lambda.
        parameters: name in the model -> parameter.
    """

    omega: Omega
    weight: float
    parameters: dict[str, nn.Parameter]


def check_regularization(spec: Optional[dict[str, Any]], tasks: dict[str, Any]) -> None:
    """
    Checks `config.regularization`.

    Args:
        spec: `config.regularization`.
        tasks: name -> [`Task`].

    Raises:
        ValueError: if `spec` is neither `None` nor `{"kind": ..., "weight": ..., "tasks": {...}, "encoders": {...}}`,
            or names an unknown task, or one without its own layers.
    """
    if spec is None:
        return
    if not isinstance(spec, dict) or not {"kind", "weight"} <= set(spec) <= {"kind", "weight", "tasks", "encoders"}:
        raise ValueError(
            'regularization must be {"kind": "l2", "l1" or "l2_sp", "weight": lambda}, and optionally other values '
            f'for "tasks" and "encoders", but is {spec!r}.'
        )
    unknown = sorted(set(spec.get("tasks") or {}) - set(tasks))
    if unknown:
        raise ValueError(f"regularization names the task {unknown[0]!r}, but the tasks are {', '.join(tasks)}.")
    for name in spec.get("tasks") or {}:
        if tasks[name].needs_decoder:
            raise ValueError(
                f"regularization names the task {name!r}, which has no layers except the decoder; the decoder "
                'belongs to "encoders".'
            )
    parts = {"": spec, " of the encoders": spec.get("encoders")}
    parts.update({f" of task {name!r}": part for name, part in (spec.get("tasks") or {}).items()})
    for where, part in parts.items():
        if part is None:
            continue
        if not isinstance(part, dict) or (where and not set(part) <= {"kind", "weight"}):
            raise ValueError(f'The regularization{where} must hold "kind" or "weight" or both, but is {part!r}.')
        name, weight = part.get("kind", spec["kind"]), part.get("weight", spec["weight"])
        if name not in _PENALTIES:
            raise ValueError(
                f"The kind of the regularization{where} must be one of {', '.join(_PENALTIES)}, but is {name!r}."
            )
        if not is_finite_number(weight) or weight < 0:
            raise ValueError(f"The weight of the regularization{where} must be a number >= 0, but is {weight!r}.")


def penalties(model: Any, spec: Optional[dict[str, Any]]) -> Iterator[Penalty]:
    """
    The penalties: the trained matrices of each task, and of the encoders. Biases are left out, as in weight decay.

    Args:
        model ([`MMTransformerForMultiTask`]): The model.
    """
    if spec is None:
        return
    groups: dict[Optional[str], dict[str, nn.Parameter]] = {name: {} for name in [*model.tasks, None]}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not parameter.requires_grad:
            continue
        if name.startswith("heads."):
            groups[_task_of(name)][name] = parameter
        elif name.startswith(tuple(f"model.{encoder}." for encoder in _ENCODERS)):
            groups[None][name] = parameter
    for task, parameters in groups.items():
        part = (spec.get("tasks") or {}).get(task, {}) if task is not None else spec.get("encoders")
        if part is not None and parameters:
            omega = _PENALTIES[part.get("kind", spec["kind"])]
            yield Penalty(omega, part.get("weight", spec["weight"]), parameters)


def _task_of(name: str) -> str:
    """The task in `heads.<task>...`; with trained adapters, in `heads.modules_to_save.<adapter>.<task>...`."""
    parts = name.split(".")
    return parts[3 if parts[1] == "modules_to_save" else 2 if parts[1] == "original_module" else 1]


def take_starting_point(model: Any, spec: Optional[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Copies, in float32, of all parameters with a penalty on the distance from now: L2-SP, and linear probes."""
    return {
        name: parameter.detach().float().clone()
        for penalty in penalties(model, spec)
        for name, parameter in penalty.parameters.items()
        if penalty.omega.starts(name)
    }


def regularization_loss(model: Any, spec: dict[str, Any], starting_point: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The sum over the tasks (and the encoders) of lambda times the penalty of their matrices, in float32.

    The penalty is the squares (l2), the absolute values (l1), or the squared distances from the starting point (l2_sp,
    Li et al. 2018, https://arxiv.org/abs/1802.01483). For linear probes, l2 and l1 also use the distance from the
    starting point.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    shard = torch.zeros((), device=device)
    for omega, weight, parameters in penalties(model, spec):
        for name, parameter in parameters.items():
            start: Any = 0.0
            if omega.starts(name):
                if starting_point[name].device != parameter.device:
                    starting_point[name] = starting_point[name].to(parameter.device)
                start = starting_point[name]
            if hasattr(parameter, "to_local"):
                # Under FSDP, outside of the layer that it belongs to: this process has, and trains, a part of it.
                start = _as_sharded(start, parameter) if torch.is_tensor(start) else start
                shard = shard + weight * omega.measure(parameter.to_local().float() - start)
            else:
                total = total + weight * omega.measure(parameter.float() - start)
    if dist.is_available() and dist.is_initialized() and any(hasattr(p, "to_local") for p in model.parameters()):
        whole = shard.detach().clone()
        dist.all_reduce(whole)
        # The value covers all parts, the gradient only this one.
        shard = shard + (whole - shard).detach()
    return total + shard


def _as_sharded(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()
