"""Saves the losses since the last log line and of the whole training, which `trainer_state.json` lacks."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME

from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.task_base import Task, task_from_dict


LOSSES_NAME = "running_losses.safetensors"


class RunningLosses(NamedTuple):
    """
    The losses of one process.

    Args:
        losses: name -> scalar tensor of this process.
        numbers: name -> number as a text.
    """

    losses: dict[str, torch.Tensor]
    numbers: dict[str, str]


def save_losses(
    folder: Path, losses: Mapping[str, torch.Tensor], numbers: Mapping[str, float], tasks: Iterable[Task]
) -> None:
    """
    Saves the running losses of all processes.

    Args:
        folder: of the checkpoint.
        losses: name -> (processes,), since only their means are logged.
        numbers: name -> number that is equal in all processes.
        tasks: of the model; a checkpoint of adapters has no config with the tasks.
    """
    metadata = {name: repr(number) for name, number in numbers.items()}
    metadata["tasks"] = json.dumps([task.to_dict() for task in tasks])
    save_file({name: loss.cpu().contiguous() for name, loss in losses.items()}, folder / LOSSES_NAME, metadata)


def load_losses(folder: str, args: TrainingArguments) -> RunningLosses | None:
    """The losses of [`save_losses`] for this process; `None` if there is no such file."""
    path = Path(folder, LOSSES_NAME)
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        numbers, by_process = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    losses = {}
    for name, values in by_process.items():
        # If the number of processes has changed, only the mean can be restored.
        is_own = len(values) == args.world_size
        losses[name] = (values[args.process_index] if is_own else values.mean()).to(args.device)
    return RunningLosses(losses, numbers)


def tasks_in(checkpoint: str) -> dict[str, Task]:
    """The tasks of the model in a checkpoint, by name; none if the checkpoint does not store them."""
    if os.path.isfile(os.path.join(checkpoint, CONFIG_NAME)):
        return MMTransformerConfig.from_pretrained(checkpoint).get_tasks()
    tasks = []
    if os.path.isfile(os.path.join(checkpoint, LOSSES_NAME)):
        with safe_open(os.path.join(checkpoint, LOSSES_NAME), framework="pt") as file:
            tasks = [task_from_dict(task) for task in json.loads(file.metadata().get("tasks", "[]"))]
    return {task.name: task for task in tasks}
