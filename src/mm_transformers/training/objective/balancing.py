"""Applies a task weighting: from the losses of the tasks to the gradient of an optimiser step."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ..sharding import share_out_again
from ..weighting import StepSignals, WeightedTasks, build_weighting
from .task_gradients import TaskGradientsCallback


logger = logging.get_logger(__name__)

STATE_NAME = "task_weighting.safetensors"


class TaskBalancing(TrainerCallback):
    """
    Collects the signals of a [`TaskWeighting`] in each optimiser step, and applies its weights.

    The signals cover all micro-batches and processes. [`MMTrainer`] calls [`start_step`], then [`before_forward`],
    [`loss`] and [`after_backward`] for each micro-batch. The rest follows as a callback after the step of the
    optimiser.

    Args:
        fused ([`MMTransformerForMultiTask`]): The model, not wrapped.
        args (`TrainingArguments`): Those of the training.
        accelerator (`Accelerator`): Runs the backward passes.
        handler (`CallbackHandler`): Its callbacks of the class [`TaskGradientsCallback`] get the gradients.
        losses_of: returns the losses of a wrapped model for one micro-batch and the divisors of its step, a dict from
            task to scalar tensor.

    Raises:
        ValueError: if the weighting is unknown, or does not work with the way of training.
    """

    def __init__(
        self,
        fused: MMTransformerForMultiTask,
        args: TrainingArguments,
        accelerator: Accelerator,
        handler: CallbackHandler,
        losses_of: Callable[[nn.Module, dict[str, Any], Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    ):
        self.fused, self.args, self.accelerator, self.handler = fused, args, accelerator, handler
        self.losses_of, self.is_fsdp = losses_of, getattr(accelerator.state, "fsdp_plugin", None) is not None
        self.tasks = fused.tasks
        scales = [task.likelihood_scale for task in self.tasks.values()]
        tasks = WeightedTasks(list(self.tasks), scales, args.learning_rate)
        self.weighting = build_weighting(fused.config.task_weighting, tasks)
        self.loss_weights = torch.tensor([task.loss_weight for task in self.tasks.values()])
        self.weights: Optional[torch.Tensor] = None
        self._check()

    @property
    def is_needed(self) -> bool:
        """Whether the model alone cannot apply the weighting."""
        return not self.is_static or bool(self._observers)

    @property
    def is_static(self) -> bool:
        return self.weighting.is_constant

    def _check(self) -> None:
        args, kind = self.args, self.weighting.kind
        if not (self.weighting.needs_gradients or self.weighting.merges_gradients or self._observers):
            return
        what = f"task_weighting={kind!r}" if not self.is_static else "TaskGradientsCallback"
        checkpointing = (args.gradient_checkpointing and args.gradient_checkpointing_kwargs) or {}
        obstacles = {
            "FSDP": self.is_fsdp,
            "DeepSpeed": getattr(self.accelerator.state, "deepspeed_plugin", None) is not None,
            "torch_compile": args.torch_compile,
            "reentrant checkpointing": checkpointing.get("use_reentrant", False),
        }
        for name, is_there in obstacles.items():
            if is_there:
                raise ValueError(
                    f"{what} needs the gradient of each task, and does not work with {name}; use "
                    "task_weighting='static', 'uncertainty' or 'famo' there."
                )

    @property
    def _observers(self) -> list[TaskGradientsCallback]:
        return [c for c in self.handler.callbacks if isinstance(c, TaskGradientsCallback)]

    # The course of one optimiser step

    def start_step(self, batches: list[dict[str, Any]], divisors: dict[str, torch.Tensor], step: int) -> None:
        """
        Starts an optimiser step.

        Args:
            batches: all micro-batches of this process.
            divisors: task -> its number of labels in the step, as for the model.
            step: number of the optimiser steps before.
        """
        self.batches, self.divisors, self.step = batches, divisors, step
        self.labelled = torch.stack([divisors[name] for name in self.tasks]).cpu() > 0
        self.losses = torch.zeros(len(self.tasks))
        self.gradients: Optional[torch.Tensor] = None
        self.signals: Optional[StepSignals] = None
        self.rng_state: list[torch.Tensor] = []
        self.done = 0
        self.observed_by = [observer for observer in self._observers if self.step % observer.every == 0]

    def before_forward(self, model: nn.Module) -> None:
        self.model = model.train()
        if self.done == 0:
            self.rng_state = _rng_state(self.args.device)
            if self.weighting.looks_ahead and len(self.batches) > 1:
                self._look_ahead()
            elif not self.weighting.looks_ahead and not self.weighting.merges_gradients:
                self.weights = self.weighting.weights(None)

    def loss(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor for the backward pass of one micro-batch. Its value is the weighted sum of the losses."""
        self.done += 1
        stack = torch.stack([losses[name] for name in self.tasks])
        regularization = losses.get("regularization", 0.0)
        if self.weighting.merges_gradients:
            return self._loss_of_merged(stack, regularization)
        if self.signals is None:
            self._collect(stack)
            if self.weighting.looks_ahead:
                self.weights = self.weighting.weights(self._take_signals())
        return (stack * self._total_weights(stack)).sum() + regularization

    def after_backward(self) -> None:
        """Call it after each micro-batch; the last call ends the step."""
        if self.done < len(self.batches):
            return
        if self.weighting.merges_gradients:
            self._merge()
        elif self.signals is None and not (self.is_static and not self.observed_by):
            self._take_signals()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.signals is None or self.accelerator.optimizer_step_was_skipped:
            return
        if self.weighting.needs_losses_after:
            with _forked_rng(args.device, self.rng_state):
                after = torch.stack([self._losses_only(batch) for batch in self.batches]).sum(0)
            if self.is_fsdp:
                share_out_again(self.model)
            self.signals = self.signals._replace(losses_after=self._reduce(after).float().cpu())
        if not self.weighting.merges_gradients:
            self.weighting.update(self.signals)
        self.batches = []

    def _total_weights(self, like: torch.Tensor) -> torch.Tensor:
        assert self.weights is not None
        return (self.weights * self.loss_weights).to(like.device)

    def _forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """(num_tasks,) the losses of one micro-batch."""
        losses = self.losses_of(self.model, batch, self.divisors)
        return torch.stack([losses[name] for name in self.tasks])

    def _losses_only(self, batch: dict[str, Any]) -> torch.Tensor:
        # Only training compares rows with those of other processes, and it needs gradients.
        compares = any(task.compares_rows for task in self.tasks.values())
        with torch.set_grad_enabled(compares), self.accelerator.no_sync(self.model):
            return self._forward(batch).detach()

    def _look_ahead(self) -> None:
        """Computes the signals of a step of several micro-batches first; the real pass has the same dropout."""
        with _forked_rng(self.args.device):
            for batch in self.batches:
                if self._needs_gradients:
                    with self.accelerator.no_sync(self.model):
                        self._collect(self._forward(batch))
                else:
                    self._collect(self._losses_only(batch))
        self.weights = self.weighting.weights(self._take_signals())

    # Signals

    @property
    def _needs_gradients(self) -> bool:
        return self.weighting.needs_gradients or bool(self.observed_by)

    def _collect(self, stack: torch.Tensor) -> None:
        """Adds one micro-batch to the signals."""
        self.losses = self.losses + stack.detach().float().cpu()
        if self._needs_gradients:
            parameters = probe_parameters(self.fused)
            gradients = torch.stack([_flat(rows) for rows in self._gradients_of(stack, parameters)])
            self.gradients = gradients if self.gradients is None else self.gradients + gradients

    def _take_signals(self) -> StepSignals:
        losses = self._reduce(self.losses.to(self.args.device)).cpu()
        gradients = None
        if self.gradients is not None:
            # If the loss scale was too large, the optimiser skips this step, and the weighting does not learn from it.
            gradients = self._reduce(self.gradients).nan_to_num(0.0, 0.0, 0.0)
            self.gradients = None
            self._show((gradients @ gradients.T).double().cpu())
        # A task with weight 0 must not affect the balance of the others.
        self.signals = StepSignals(losses, self.labelled & (self.loss_weights > 0), gradients)
        return self.signals

    def _show(self, products: torch.Tensor) -> None:
        for observer in self.observed_by:
            observer.record([name for name, seen in zip(self.tasks, self.labelled, strict=True) if seen],
                            products[self.labelled][:, self.labelled])  # fmt: skip

    def _reduce(self, values: torch.Tensor) -> torch.Tensor:
        # Losses are scaled so that their mean over processes is the loss.
        return self.accelerator.reduce(values, reduction="mean")

    def _gradients_of(self, stack: torch.Tensor, parameters: list[nn.Parameter]) -> list[list[torch.Tensor]]:
        """
        For each task, the gradients of its loss by the parameters, float32; 0 if it does not depend on them.

        The graph is kept.
        """
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        rows = []
        for loss, seen in zip(stack, self.labelled, strict=True):
            found: Any = [None] * len(parameters)
            if seen:
                found = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(found, parameters, strict=True)
            rows.append(
                [torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() / scale for g, p in pairs]
            )
        return rows

    # Merged gradients

    def _loss_of_merged(self, stack: torch.Tensor, regularization: Any) -> torch.Tensor:
        own, shared = own_and_shared(self.fused)
        stack = stack * self.loss_weights.to(stack.device)
        rows = self._gradients_of(stack, own + shared)
        self.losses = self.losses + stack.detach().float().cpu()
        if self.gradients is None:
            self.gradients = torch.stack([_flat(row) for row in rows])
        else:
            for total, row in zip(self.gradients, rows, strict=True):
                total += _flat(row)
        # The gradients were computed without backward hooks. This pass touches every parameter, so that waiting
        # code continues, and adds the gradient of the regularizer alone.
        touched = sum((parameter.sum() * 0.0 for parameter in own + shared), start=regularization * 1.0)
        return touched + (stack.sum().detach() + regularization - touched).detach()

    def _merge(self) -> None:
        assert self.gradients is not None
        gradients, self.gradients = self._reduce(self.gradients), None
        own, shared = own_and_shared(self.fused)
        num_own = sum(parameter.numel() for parameter in own)
        common = gradients[:, num_own:]
        products = (common @ common.T).double().cpu()
        self._show(products)
        self.weights = self.weighting.merge(products.nan_to_num(0.0), self.step).float()
        merged = torch.cat([gradients[:, :num_own].sum(0), self.weights.to(common) @ common])
        scaler = self.accelerator.scaler
        merged *= scaler.get_scale() if scaler is not None else 1.0  # the optimiser will divide by it
        for parameter, gradient in zip(own + shared, merged.split([p.numel() for p in own + shared]), strict=True):
            parameter.grad.add_(gradient.view_as(parameter))

    def logs(self) -> dict[str, float]:
        """The weight of each task in the last step, and the recorded gradient values."""
        found: dict[str, float] = {}
        for observer in self._observers:
            found.update(observer.take())
        if not self.is_static and self.weights is not None:
            found.update(
                {f"{name}_weight": value for name, value in zip(self.tasks, self.weights.tolist(), strict=True)}
            )
        return found

    # Saving

    def save(self, folder: str) -> None:
        state = self.weighting.state_dict()
        if state:
            metadata = {"kind": self.weighting.kind, "tasks": json.dumps(list(self.tasks))}
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
            save_file(tensors, Path(folder, STATE_NAME), metadata)

    def load(self, folder: str) -> None:
        """
        Loads the state of the weighting from a checkpoint.

        Raises:
            ValueError: if the checkpoint holds the state of another weighting, or of other tasks.
        """
        path = Path(folder, STATE_NAME)
        if not path.is_file():
            if self.weighting.state_dict():
                logger.warning(f"{folder} has no state of task_weighting={self.weighting.kind!r}, which starts anew.")
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["kind"] != self.weighting.kind or json.loads(metadata["tasks"]) != list(self.tasks):
                raise ValueError(
                    f"{folder} was trained with task_weighting={metadata['kind']!r} for the tasks "
                    f"{', '.join(json.loads(metadata['tasks']))}, and cannot be resumed with {self.weighting.kind!r} "
                    f"for {', '.join(self.tasks)}."
                )
            self.weighting.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def own_and_shared(fused: MMTransformerForMultiTask) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters of a model: those of one task alone, and all others."""
    ids = {id(p) for p in fused.heads.parameters()}
    if sum(task.needs_decoder for task in fused.tasks.values()) == 1:
        encoder = {id(p) for p in fused.model.text_encoder.parameters()}  # the decoder may share its embeddings
        ids |= {id(p) for p in fused.model.text_model.parameters()} - encoder
    trained = [p for p in fused.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in ids], [p for p in trained if id(p) not in ids]


def probe_parameters(fused: MMTransformerForMultiTask) -> list[nn.Parameter]:
    """
    The parameters of the last layer that all tasks share, where the gradients of tasks are compared.

    This is the last layer of the fusion, or of the text encoder in a text-only model.
    """
    root: nn.Module = fused.model.fusion if fused.model.fusion is not None else fused.model.text_encoder
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    modules: list[nn.Module] = [*(layers[-1] for layers in lists), root, fused.model]
    for module in modules:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parameters:
            return parameters
    raise ValueError("All parameters that the tasks share are frozen, so there are no gradients to compare.")


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _rng_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _forked_rng(device: torch.device, start: Sequence[torch.Tensor] = ()) -> Iterator[None]:
    """Isolates random numbers within the block; they may start from an earlier state."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if start:
            torch.set_rng_state(start[0])
            for state in start[1:]:
                torch.cuda.set_rng_state(state, device)
        yield
