"""Fits a training into a time."""

import copy
import time
from collections.abc import Mapping, Sized
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.sources import ROWS_PER_SOURCE, rows_of


# The share of the time for training; the rest is for the start, the evaluations and the report.
TRAINING_SHARE = 0.6
# An evaluation of a row takes this share of a training step of a row.
_EVALUATION_COST = 0.35
# The share of the time for frozen encoders, which read each row once.
_ENCODING_SHARE = 0.45
_FEWEST_ROWS = 32
# The time of a step is measured on so few rows if a whole batch takes longer than this.
_FEW_ROWS, _QUICK_SECONDS = 4, 1.0


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


def seconds_per_row(trainer: Any, training: bool = True) -> float:
    """
    The seconds of a training step for one row, without the optimiser; measured on a copy of the model.

    Args:
        trainer ([`MMTrainer`]): before its training.
        training: `False` measures the encoders alone, without gradients.
    """
    collator, args = trainer.data_collator, trainer.args
    rows, _ = rows_of(trainer.train_dataset, collator)
    sizes = [min(size, len(rows)) for size in (_FEW_ROWS, _FEW_ROWS, args.train_batch_size)]
    model = copy.deepcopy(trainer.fused_model).train(training)
    per_row, first = 0.0, 0
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.set_grad_enabled(training):
        for i, size in enumerate(sizes):
            numbers = [(first + place) % len(rows) for place in range(size)]
            start = time.perf_counter()
            inputs = dict(collator([rows[number] for number in numbers]))
            inputs.pop(ROWS_PER_SOURCE, None)
            inputs = send_to_device(inputs, model.device)
            if training:
                model(**inputs).loss.backward()
            else:
                inputs.pop("labels", None)
                model.model.encode_rows(**inputs)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds, first = time.perf_counter() - start, first + size
            per_row = seconds / size
            # The first batch is slower than the others. A whole batch is measured only where that is quick.
            if i == 1 and per_row * sizes[-1] > _QUICK_SECONDS:
                break
    return per_row


def epochs_within(trainer: Any, per_row: float, seconds: float) -> float:
    """
    The number of epochs that fit into a time: a whole number, or below 1 if not even one fits.

    Args:
        trainer ([`MMTrainer`]): before its training.
        per_row: the result of [`seconds_per_row`].
    """
    held_out = 0 if trainer.eval_dataset is None else len(trainer.eval_dataset)
    per_epoch = per_row * (len(trainer.train_dataset) + _EVALUATION_COST * held_out)
    fitting = seconds * TRAINING_SHARE / max(per_epoch, 1e-9)
    return float(int(fitting)) if fitting >= 1 else fitting


def rows_within(splits: Mapping[str, Sized], per_row: float, seconds: float) -> dict[str, int]:
    """
    Split -> the number of its rows that the encoders can read in a time, for splits with more of them.

    Held-out rows get up to half of the time.

    Args:
        splits: split -> its rows.
        per_row: the seconds of the encoders for one row.
    """
    most = int(seconds * _ENCODING_SHARE / max(per_row, 1e-9))
    held_out = [name for name in splits if name != "train"]
    counts = {name: len(splits[name]) for name in splits}
    if held_out:
        each = max(most // 2 // len(held_out), _FEWEST_ROWS)
        counts |= {name: min(counts[name], each) for name in held_out}
    left = most - sum(counts[name] for name in held_out)
    counts["train"] = min(counts["train"], max(left, _FEWEST_ROWS))
    return {name: count for name, count in counts.items() if count < len(splits[name])}
