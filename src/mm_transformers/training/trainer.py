"""The Trainer of transformers, for models with several tasks and batches with any number of images."""

from collections import defaultdict
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..data.collator import ROW_KEY, MMDataCollator
from ..model.regularization import regularized_parameters
from .metrics import MultiTaskMetrics


logger = logging.get_logger(__name__)

# A gate starts at 0 and is all that learns at first; see Flamingo (https://arxiv.org/abs/2204.14198), section 2.2.
GATE_LEARNING_RATE_FACTOR = 10.0


class MMTrainer(Trainer):
    """
    [`~transformers.Trainer`] with what a [`MMTransformerForMultiTask`] needs:

    - `data_collator` and `compute_metrics` default to [`MMDataCollator`] and [`MultiTaskMetrics`];
    - the loss of each task is its mean over all the labels of an optimiser step, also under gradient accumulation, and
      the regularizer enters once per step; what the regularizer covers has no weight decay;
    - logs hold the loss of each task (`<task>_loss`, `regularization_loss`), evaluation holds exact means;
    - the gates of the fusion learn ten times as fast and without weight decay;
    - in evaluation, tasks that write do so, and their metrics compare texts; `generation_num_beams`,
      `generation_max_length` and `predict_with_generate` of [`~transformers.Seq2SeqTrainingArguments`] are heeded;
    - messages about bad data name the row of the data set.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, kwargs:
            As [`~transformers.Trainer`] takes them. `processing_class` is the [`MMTransformerProcessor`]. In `args`,
            `remove_unused_columns` and `accelerator_config.dispatch_batches` are set to `False`: columns are chosen by
            the collator, and a batch of images cannot be cut along with its rows.

    Raises:
        ValueError: if several GPUs would be used by `nn.DataParallel`, if there is neither a `processing_class` nor a
            `data_collator`, if a data set lacks the text column or all of the tasks' columns, or if `args` asks for
            label smoothing, which is not for the Trainer to say where tasks are of several kinds.
    """

    def __init__(
        self,
        model: Optional[nn.Module] = None,
        args: Optional[TrainingArguments] = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        **kwargs,
    ):
        args = args if args is not None else TrainingArguments("tmp_trainer")
        if args.n_gpu > 1:
            raise ValueError(
                f"This process sees {args.n_gpu} GPUs, and nn.DataParallel cannot split a batch of images: start one "
                "process per GPU by `accelerate launch`, or show it one GPU by CUDA_VISIBLE_DEVICES=0."
            )
        if args.label_smoothing_factor != 0:
            raise ValueError(
                "label_smoothing_factor has no meaning for all kinds of tasks, so MMTrainer does not take it; write "
                "the loss that you want as a task kind of your own."
            )
        if data_collator is None and processing_class is None:
            raise ValueError(
                "MMTrainer needs a model and its processor: MMTrainer(model, args, processing_class=processor)."
            )
        args.remove_unused_columns = False
        args.accelerator_config.dispatch_batches = False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        # Only now is there a model, if it comes from `model_init`.
        if data_collator is None:
            self.data_collator = MMDataCollator(processing_class, self.model.config)
        if compute_metrics is None:
            self.compute_metrics = MultiTaskMetrics(self.model.config, processing_class)
        if isinstance(self.data_collator, MMDataCollator):
            for name, datasets in {"train": train_dataset, "eval": eval_dataset}.items():
                for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
                    _check_columns(dataset, name, self.data_collator)
        # `num_items_in_batch` holds the divisors of the whole optimiser step, so nothing is left to be divided.
        self.model_accepts_loss_kwargs = True
        # Summed over the optimiser steps since the last log.
        self._losses: dict[str, torch.Tensor] = defaultdict(float)  # type: ignore[arg-type]
        self._num_steps = 0

    # Data

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        if isinstance(self.data_collator, MMDataCollator) and not _is_iterable(dataset):
            original = dataset
            dataset = _NumberedRows(_undecoded(dataset, self.data_collator.image_column))
            if sampler_fn is not None:
                return super()._get_dataloader(
                    dataset, description, batch_size, sampler_fn=lambda _: sampler_fn(original), **kwargs
                )
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn=sampler_fn, **kwargs)

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> dict[str, torch.Tensor]:
        self._num_steps += 1
        tasks = self.model.config.get_tasks()
        counts = torch.zeros(len(tasks), device=device)
        for batch in batch_samples:
            for i, (name, task) in enumerate(tasks.items()):
                if name in batch.get("labels", {}):
                    counts[i] += task.num_labelled(batch["labels"][name]).to(device)
        # Gradients are averaged over processes, so each divides by its share of the labels of all.
        counts = self.accelerator.reduce(counts, reduction="mean")
        divisors = dict(zip(tasks, counts, strict=True))
        divisors["regularization"] = torch.tensor(float(max(len(batch_samples), 1)), device=device)
        return divisors

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if model.training:
            for name, loss in outputs.losses.items():
                self._losses[name] += loss.detach()
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._num_steps > 0:
            losses = torch.stack(list(self._losses.values())) / self._num_steps
            losses = self.accelerator.reduce(losses, reduction="mean")
            logs.update({f"{name}_loss": value for name, value in zip(self._losses, losses.tolist(), strict=True)})
            self._losses.clear()
            self._num_steps = 0
        super().log(logs, *args, **kwargs)

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        regularized = set()
        if self.model.config.regularization is not None:
            regularized = {id(p) for p in regularized_parameters(self.accelerator.unwrap_model(model).heads)}
        free = {name for name, p in model.named_parameters() if _is_gate(name) or id(p) in regularized}
        return [name for name in names if name not in free]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            parameters = (self.model if model is None else model).named_parameters()
            gates = {id(p): p for name, p in parameters if _is_gate(name) and p.requires_grad}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gates]
            if gates:
                rate = self.args.learning_rate * GATE_LEARNING_RATE_FACTOR
                optimizer.add_param_group({"params": list(gates.values()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    # Evaluation

    def train(self, *args, **kwargs):
        self._losses.clear()
        self._num_steps = 0
        output = super().train(*args, **kwargs)
        self._report_bad_images()
        return output

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        tasks = self.model.config.get_tasks()
        losses = {name: output.metrics.get(f"{prefix}_{name}_loss") for name in tasks}
        if any(loss is not None for loss in losses.values()):
            # The stock loop reports the mean of the means of batches, which is not the mean.
            total = sum(tasks[name].loss_weight * loss for name, loss in losses.items() if loss is not None)
            output.metrics[f"{prefix}_loss"] = total + self._regularization()
        elif isinstance(self.compute_metrics, MultiTaskMetrics) and output.predictions is not None:
            output.metrics.pop(f"{prefix}_loss", None)  # of rows without labels there is none
        self._report_bad_images()
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        fused = self.accelerator.unwrap_model(model)
        writes = fused.config.has_decoder and getattr(self.args, "predict_with_generate", True)
        if prediction_loss_only or not writes:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        mask = inputs["attention_mask"]
        with torch.no_grad(), self.compute_loss_context_manager():
            # Once for the loss and all that is written.
            encoded = fused.model(**inputs)
            outputs = fused(encoder_outputs=encoded, attention_mask=mask, labels=labels)
            answers = dict(outputs.logits)
            for name, task in fused.tasks.items():
                if task.needs_decoder:
                    pairs = zip(outputs.logits[name], labels[name], strict=True)
                    answers[name] = {
                        "generated_ids": fused.generate(name, encoded, mask, **self._generation_options()),
                        "losses": torch.stack([task.loss(logits[None], row[None])[0] for logits, row in pairs]),
                    }
        return outputs.loss.detach(), answers, labels

    def _generation_options(self) -> dict[str, Any]:
        options = {
            "num_beams": getattr(self.args, "generation_num_beams", None),
            "max_length": getattr(self.args, "generation_max_length", None),
        }
        return {name: value for name, value in options.items() if value is not None}

    def _regularization(self) -> float:
        model = self.accelerator.unwrap_model(self.model)
        with torch.no_grad():
            return float(model.regularization_loss()) if model.config.regularization is not None else 0.0

    def _report_bad_images(self) -> None:
        count = getattr(self.data_collator, "num_bad_images", 0)
        if count:
            logger.warning(f"{count:,} images could not be read so far and were treated as absent.")


class _NumberedRows(Dataset):
    """Rows that know their number, for messages."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], ROW_KEY: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if hasattr(self.dataset, "__getitems__"):
            rows = self.dataset.__getitems__(indices)
        else:
            rows = [self.dataset[index] for index in indices]
        return [{**row, ROW_KEY: index} for row, index in zip(rows, indices, strict=True)]


def _is_gate(name: str) -> bool:
    return name.endswith("gate_alpha")


def _is_iterable(dataset) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _undecoded(dataset, column: str):
    """Cells of `datasets.Image` as bytes or path: what is shared is then seen, and what is broken has its row named."""
    import datasets

    if not isinstance(dataset, datasets.Dataset) or column not in dataset.column_names or dataset.format["type"]:
        return dataset
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return dataset


def _check_columns(dataset, name: str, collator: MMDataCollator) -> None:
    columns = getattr(dataset, "column_names", None)
    if not columns:
        return
    shown = ", ".join(repr(column) for column in columns)
    if collator.text_column not in columns:
        raise ValueError(
            f"The {name} data set has no column {collator.text_column!r} (its columns are {shown}); name the column of "
            "your texts by data_collator=MMDataCollator(processor, model.config, text_column=...)."
        )
    missing = [task for task in collator.tasks.values() if task.column not in columns]
    if missing and len(missing) == len(collator.tasks):
        raise ValueError(f"The {name} data set has a column for none of the tasks (its columns are {shown}).")
    for task in missing:
        logger.warning(f"The {name} data set has no column {task.column!r}: task {task.name!r} has no labels there.")
