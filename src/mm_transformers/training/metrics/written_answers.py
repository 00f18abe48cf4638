"""The answers of one batch of an evaluation in which tasks write texts."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from transformers import GenerationConfig, TrainingArguments

from ...model.task_base import Task


def generation_options(args: TrainingArguments, config: Optional[GenerationConfig], is_sharded: bool) -> dict[str, Any]:
    """
    The options of `generate` from the training arguments.

    Args:
        args: of the trainer; plain `TrainingArguments` have none.
        config: the generation config named by `args`.
        is_sharded: whether processes share the layers of the model. Then all continue until the last has its texts.
    """
    options = {
        "num_beams": getattr(args, "generation_num_beams", None),
        "max_length": getattr(args, "generation_max_length", None),
        "synced_gpus": True if is_sharded else None,
        "generation_config": config,
    }
    return {name: value for name, value in options.items() if value is not None}


def with_texts(
    logits: Mapping[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
    tasks: Mapping[str, Task],
    labels: Optional[Mapping[str, torch.Tensor]],
    references: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """
    Task -> its logits; for tasks that write, the dict of [`MultiTaskMetrics`].

    Args:
        logits: task -> (batch, ...).
        written: task that writes -> (batch, length) token ids.
        labels: task -> labels, if any.
        references: task -> (batch, bytes) the true texts, from [`MMDataCollator.with_references`].
    """
    answers: dict[str, Any] = dict(logits)
    for name, ids in written.items():
        answers[name] = {"generated_ids": ids}
        if labels is not None:
            answers[name]["losses"] = losses_of_rows(tasks[name], logits[name], labels[name])
        if name in references:
            answers[name]["references"] = references[name]
    return answers


def losses_of_rows(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(batch,) the loss of each row, summed over its tokens."""
    return torch.stack([task.loss(logits[i : i + 1], labels[i : i + 1])[0] for i in range(len(labels))])
