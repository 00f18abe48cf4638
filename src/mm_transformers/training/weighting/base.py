"""The base class of task weightings, and their registry."""

import inspect
import math
import numbers
from typing import Any, ClassVar, NamedTuple, Optional

import torch

from ...model.registry import registered


WEIGHTINGS: dict[str, type["TaskWeighting"]] = {}

# A task with a smaller loss has nothing left to learn; its logarithm, or its ratio to another, would be unbounded.
SMALLEST_LOSS = 1e-8


class WeightedTasks(NamedTuple):
    """
    The tasks of a weighting.

    Args:
        names: of the tasks.
        likelihood_scales: for each task, the factor that turns its loss into a negative log-likelihood.
        learning_rate: that of the training arguments.
    """

    names: list[str]
    likelihood_scales: list[float]
    learning_rate: float


class StepSignals(NamedTuple):
    """
    The measurements of one optimiser step, over all its micro-batches and all processes.

    Args:
        losses (num_tasks,) float32: the mean loss of each task, without its `loss_weight`; 0 without labels.
        labelled (num_tasks,) bool: the tasks that have a label in this step, and a `loss_weight` other than 0.
        gradients (num_tasks, num_parameters) float32: the gradients of `losses` at the probe block; only with
            `needs_gradients`. This is the only tensor on the device of the model.
        losses_after (num_tasks,) float32: the losses of the same batches after the step; only with
            `needs_losses_after`.
    """

    losses: torch.Tensor
    labelled: torch.Tensor
    gradients: Optional[torch.Tensor] = None
    losses_after: Optional[torch.Tensor] = None

    @property
    def can_improve(self) -> torch.Tensor:
        """(num_tasks,) bool: the labelled tasks with a finite logarithm of the loss."""
        return self.labelled & (self.losses > SMALLEST_LOSS)


class TaskWeighting:
    """
    Sets the weight of the loss of each task, step by step. The weight is multiplied by the task's `loss_weight`.

    A kind subclasses it, sets `kind`, implements [`weights`] and, if it learns, [`update`], and is decorated with
    [`register_weighting`]. The keyword-only arguments of its `__init__` are its options. The tensors of [`state_dict`]
    are saved and resumed. They are equal in all processes, since the signals are.
    """

    kind: ClassVar[str]
    # True if the weights of a step depend on the signals of that same step. With gradient accumulation, the
    # micro-batches of the step then run forward once more, before it.
    looks_ahead: ClassVar[bool] = False
    # True if the weights are those of the tasks, so that the model itself applies them.
    is_constant: ClassVar[bool] = False
    # True if the signals need the gradients at the probe block, the last layer that all tasks share.
    needs_gradients: ClassVar[bool] = False
    # True if the signals need the losses of the same batches after the step: one more forward pass.
    needs_losses_after: ClassVar[bool] = False
    # True if [`merge`] replaces [`weights`]: a backward pass for each task.
    merges_gradients: ClassVar[bool] = False

    def __init__(self, tasks: WeightedTasks):
        self.tasks = tasks

    def weights(self, step: Optional[StepSignals]) -> torch.Tensor:
        """
        (num_tasks,) float32, the weights of the next step.

        Args:
            step: its signals, if the kind looks ahead; else `None`.
        """
        return torch.ones(len(self.tasks.names))

    def update(self, step: StepSignals) -> None:
        """Learns from a step, after it."""

    def merge(self, products: torch.Tensor, step: int) -> torch.Tensor:
        """
        (num_tasks,): the factor of each task's gradient in the shared parameters.

        Args:
            products (num_tasks, num_tasks) float64: inner products of the gradients of the tasks there.
            step: number of the optimiser step.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


def register_weighting(cls: type[TaskWeighting]) -> type[TaskWeighting]:
    """
    Class decorator that registers a weighting, so that `config.task_weighting` can name it.

    Raises:
        ValueError: if `kind` is missing or is already taken by another class.
    """
    return registered(WEIGHTINGS, "task weighting")(cls)


def build_weighting(spec: str | dict[str, Any] | None, tasks: WeightedTasks) -> TaskWeighting:
    """
    The weighting of `config.task_weighting`: `"famo"`, or `{"kind": "famo", "learning_rate": 0.01}`; `None` is
    `"static"`.

    Raises:
        ValueError: if the kind or one of its options is unknown, or the options are not a dict of these.
    """
    if not isinstance(spec, (str, dict, type(None))):
        raise ValueError(f'task_weighting must be a kind or {{"kind": ..., options}}, but is {spec!r}.')
    options = dict(spec) if isinstance(spec, dict) else {"kind": spec or "static"}
    kind = options.pop("kind", None)
    if kind not in WEIGHTINGS:
        raise ValueError(
            f"Unknown task_weighting {kind!r}; known are {', '.join(sorted(WEIGHTINGS))}. Import the module of your "
            "own kind (with @register_weighting) before you use it."
        )
    parameters = inspect.signature(WEIGHTINGS[kind].__init__).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"task_weighting {kind!r} has no option {unknown[0]!r}; its options are "
            f"{', '.join(known) if known else 'none'}."
        )
    return WEIGHTINGS[kind](tasks, **options)


def check_option(kind: str, name: str, value: Any, minimum: float = 0.0, below: float = math.inf) -> float:
    """
    The value of an option as a number.

    Raises:
        ValueError: if it is not a number in [minimum, below).
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not minimum <= value < below:
        upper = "" if below == math.inf else f" and less than {below}"
        raise ValueError(f"task_weighting {kind!r}: {name} must be at least {minimum}{upper}, but is {value!r}.")
    return float(value)
