"""Fits a training into a time."""

import copy
import time
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.sources import ROWS_PER_SOURCE, rows_of


# The share of the time for training; the rest is for the start, the evaluations and the report.
TRAINING_SHARE = 0.6
# An evaluation of a row takes this share of a training step of a row.
_EVALUATION_COST = 0.35


class TimeLimit(TrainerCallback):
    """
    Ends a training at a time, after an evaluation of its weights.

    Args:
        end: the time, of `time.monotonic()`.
    """

    def __init__(self, end: float):
        self.end = end

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if time.monotonic() >= self.end and not control.should_training_stop:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
        return control


def seconds_per_row(trainer: Any) -> float:
    """
    The seconds of a training step for one row, without the optimiser; measured on a copy of the model.

    Args:
        trainer ([`MMTrainer`]): before its training.
    """
    collator, args = trainer.data_collator, trainer.args
    rows, _ = rows_of(trainer.train_dataset, collator)
    size = min(args.train_batch_size, len(rows))
    parts = [range(start, min(start + size, len(rows))) for start in (0, size) if start < len(rows)]
    model = copy.deepcopy(trainer.fused_model).train()
    seconds, count = 0.0, 1
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for part in parts:  # the first one is slower, and counts only if it is alone
            start = time.perf_counter()
            inputs = dict(collator([rows[i] for i in part]))
            inputs.pop(ROWS_PER_SOURCE, None)
            loss = model(**send_to_device(inputs, model.device)).loss
            loss.backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds, count = time.perf_counter() - start, len(part)
    return seconds / count


def epochs_within(trainer: Any, seconds: float) -> float:
    """
    The number of epochs that fit into a time: a whole number, or below 1 if not even one fits.

    Args:
        trainer ([`MMTrainer`]): before its training.
    """
    held_out = 0 if trainer.eval_dataset is None else len(trainer.eval_dataset)
    per_epoch = seconds_per_row(trainer) * (len(trainer.train_dataset) + _EVALUATION_COST * held_out)
    fitting = seconds * TRAINING_SHARE / max(per_epoch, 1e-9)
    return float(int(fitting)) if fitting >= 1 else fitting
