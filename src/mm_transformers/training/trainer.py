"""The Trainer of transformers, for models with several tasks and batches with any number of images."""

from typing import Any, Optional

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..data.collator import ROW_KEY, MMDataCollator
from ..data.feature_cache import FeatureCache
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
    - logs hold the loss of each task (`<task>_loss`, `regularization_loss`), its mean over the optimiser steps in which
      the task had labels;
    - with [`MultiTaskMetrics`], which is the default, evaluation holds exact means, and no loss where nothing is
      labelled;
    - the gates of the fusion learn ten times as fast and without weight decay;
    - in evaluation, tasks that write do so, and their metrics compare texts; `generation_num_beams`,
      `generation_max_length` and `predict_with_generate` of [`~transformers.Seq2SeqTrainingArguments`] are heeded;
    - with a `feature_cache`, encoders that are frozen as a whole run once per distinct item, before the first batch of
      a data set, and never again;
    - images of a data set are read by the collator, so that messages about bad data name the row, and how many images
      could not be read is told at the end.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, kwargs:
            As [`~transformers.Trainer`] takes them. `processing_class` is the [`MMTransformerProcessor`]; it defaults
            to that of the `data_collator`. In `args`,
            `remove_unused_columns` and `accelerator_config.dispatch_batches` are set to `False`: columns are chosen by
            the collator, and a batch of images cannot be cut along with its rows.
        feature_cache ([`FeatureCache`], `str` or `Path`, *optional*): The cache, or its folder.

    Raises:
        ValueError: if several GPUs would be used by `nn.DataParallel`, if there is neither a `processing_class` nor a
            `data_collator`, if the model has no tasks, if a data set lacks the text column or all of the tasks'
            columns, or if something is asked for that would be ignored: label smoothing, `compute_loss_func`,
            `batch_eval_metrics`.
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
        feature_cache=None,
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
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("MMTrainer takes no compute_loss_func: the loss of a task is its method `loss`.")
        if args.batch_eval_metrics:
            raise ValueError("MMTrainer computes metrics over all rows at once; leave out batch_eval_metrics.")
        if processing_class is None and isinstance(data_collator, MMDataCollator):
            processing_class = data_collator.processor
        if data_collator is None and processing_class is None:
            raise ValueError(
                "MMTrainer needs a model and its processor: MMTrainer(model, args, processing_class=processor)."
            )
        if data_collator is None and not hasattr(processing_class, "tokenizer"):
            raise ValueError(
                f"processing_class must be an MMTransformerProcessor, but is a {type(processing_class).__name__}: make "
                "one by MMTransformerProcessor.from_encoders(text=..., vision=...)."
            )
        if isinstance(train_dataset, dict):
            raise ValueError(f"train_dataset must be one split, not all of {', '.join(map(repr, train_dataset))}.")
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
        if not hasattr(self._fused, "tasks"):
            raise ValueError(
                f"MMTrainer trains a model with tasks, MMTransformerForMultiTask, not {type(self._fused).__name__}."
            )
        if train_dataset is not None and args.train_batch_size * args.world_size == 1:
            alone = [task.name for task in self._fused.tasks.values() if task.kind == "retrieval"]
            if alone:
                raise ValueError(
                    f"Task {alone[0]!r} tells the pairs of a batch apart, but a batch holds one row: set "
                    "per_device_train_batch_size to 2 or more (accumulating gradients does not help)."
                )
        if data_collator is None:
            self.data_collator = MMDataCollator(processing_class, self.model.config)
        self.feature_cache = FeatureCache.of(feature_cache)
        if self.feature_cache is not None:
            self.feature_cache.modalities(self._fused, self.data_collator)
        if compute_metrics is None:
            self.compute_metrics = MultiTaskMetrics(self.model.config, processing_class)
        if isinstance(self.data_collator, MMDataCollator):
            for name, datasets in {"train": train_dataset, "eval": eval_dataset}.items():
                for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
                    _check_columns(dataset, name, self.data_collator)
            _check_lengths(train_dataset, args)
        # `num_items_in_batch` holds the divisors of the whole optimiser step, so nothing is left to be divided.
        self.model_accepts_loss_kwargs = True
        # Of each task, and of the regularizer, since the last log: losses, summed over the optimiser steps, and the
        # number of steps that had any.
        self._losses: dict[str, torch.Tensor] = {}
        self._num_steps: dict[str, torch.Tensor] = {}

    @property
    def _fused(self) -> Any:
        """The model itself, whatever wraps it, adapters included."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # Data

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        if isinstance(self.data_collator, MMDataCollator):
            original = dataset
            dataset = self._prepare_rows(dataset)
            if _is_iterable(dataset):
                return super()._get_dataloader(dataset, description, batch_size, sampler_fn=sampler_fn, **kwargs)
            dataset = _NumberedRows(dataset)
            if sampler_fn is not None:
                return super()._get_dataloader(
                    dataset, description, batch_size, sampler_fn=lambda _: sampler_fn(original), **kwargs
                )
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn=sampler_fn, **kwargs)

    def _prepare_rows(self, dataset):
        """Media are left to the collator to decode, and what frozen encoders give is stored."""
        for media in self.data_collator.media.values():
            dataset = _undecoded(dataset, media.column)
        if self.feature_cache is not None:
            batch_size, num_workers = self.args.eval_batch_size, self.args.dataloader_num_workers
            self.data_collator = self.feature_cache.prepare(
                self._fused, self.data_collator, dataset, batch_size, num_workers
            )
        return dataset

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> dict[str, torch.Tensor]:
        tasks = self._fused.tasks
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
                # Each of the batches of a step is a part of it.
                steps = (num_items_in_batch[name] > 0) / num_items_in_batch["regularization"]
                self._losses[name] = self._losses.get(name, 0) + loss.detach()
                self._num_steps[name] = self._num_steps.get(name, 0) + steps
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._losses:
            losses = self.accelerator.reduce(torch.stack(list(self._losses.values())), reduction="mean").tolist()
            for name, loss in zip(self._losses, losses, strict=True):
                if self._num_steps[name] > 0:
                    logs[f"{name}_loss"] = loss / self._num_steps[name].item()
            self._forget_losses()
        super().log(logs, *args, **kwargs)

    def _forget_losses(self) -> None:
        self._losses, self._num_steps = {}, {}

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        regularized = set()
        if self._fused.config.regularization is not None:
            regularized = {id(p) for p in regularized_parameters(self._fused.heads)}
        free = {name for name, p in model.named_parameters() if _never_decays(name) or id(p) in regularized}
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
                rate = optimizer.defaults["lr"] * GATE_LEARNING_RATE_FACTOR
                optimizer.add_param_group({"params": list(gates.values()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    # Evaluation

    def train(self, *args, **kwargs):
        self._forget_losses()
        if self.feature_cache is not None and self.args.eval_strategy != "no":
            # What cannot be stored is told before hours are spent, not after the first epoch.
            evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for dataset in evaluated.values():
                self._prepare_rows(dataset)
        output = super().train(*args, **kwargs)
        self._report_bad_files()
        return output

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        tasks = self._fused.tasks
        losses = {name: output.metrics.get(f"{prefix}_{name}_loss") for name in tasks}
        if any(loss is not None for loss in losses.values()):
            # The stock loop reports the mean of the means of batches, which is not the mean.
            total = sum(tasks[name].loss_weight * loss for name, loss in losses.items() if loss is not None)
            output.metrics[f"{prefix}_loss"] = total + self._regularization()
        elif isinstance(self.compute_metrics, MultiTaskMetrics) and output.predictions is not None:
            output.metrics.pop(f"{prefix}_loss", None)  # of rows without labels there is none
        self._report_bad_files()
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        fused = self._fused
        writes = fused.config.has_decoder and getattr(self.args, "predict_with_generate", True)
        if prediction_loss_only or not writes:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        # Not through the wrapped model, which is what otherwise sees to the precision.
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            # Once for the loss and all that is written.
            encoded = fused.model(**inputs)
            outputs = fused(encoder_outputs=encoded, labels=labels)
            answers = dict(outputs.logits)
            for name, task in fused.tasks.items():
                if task.needs_decoder:
                    ids = fused.generate(name, encoded, **self._generation_options())
                    # What the decoder is given to start with is not of its own writing.
                    answers[name] = {"generated_ids": ids[:, len(fused.decoder_start_ids(task)) :]}
                    if labels is not None:
                        pairs = zip(outputs.logits[name], labels[name], strict=True)
                        losses = [task.loss(logits[None], row[None])[0] for logits, row in pairs]
                        answers[name]["losses"] = torch.stack(losses)
        return None if labels is None else outputs.loss.detach(), answers, labels

    def _generation_options(self) -> dict[str, Any]:
        options = {
            "num_beams": getattr(self.args, "generation_num_beams", None),
            "max_length": getattr(self.args, "generation_max_length", None),
        }
        return {name: value for name, value in options.items() if value is not None}

    def _regularization(self) -> float:
        with torch.no_grad():
            return float(self._fused.regularization_loss()) if self._fused.config.regularization is not None else 0.0

    def _report_bad_files(self) -> None:
        count = getattr(self.data_collator, "num_bad_files", 0)
        if count:
            logger.warning(f"{count:,} times so far a file could not be read; it was treated as absent.")


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


def _never_decays(name: str) -> bool:
    return name.endswith(("gate_alpha", "logit_scale"))


def _is_iterable(dataset) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _undecoded(dataset, column: str):
    """
    Cells of `datasets.Image`, `Video` and `Audio` as bytes or path: what is shared is then seen, and what is broken has
    its row named.
    """
    import datasets

    known = isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.features is not None
    if not known or column not in dataset.features:
        return dataset
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return dataset  # a transform of the user's own, which may want pictures
    feature, kinds = dataset.features[column], (datasets.Image, datasets.Video, datasets.Audio)
    if isinstance(feature, kinds):
        return dataset.cast_column(column, type(feature)(decode=False))
    inner = getattr(feature, "feature", None)
    if isinstance(inner, kinds):
        return dataset.cast_column(column, datasets.List(type(inner)(decode=False)))
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
    media = {kind: column.column for kind, column in collator.media.items()}
    if media and not set(media.values()) & set(columns):
        logger.warning(
            f"The {name} data set has no column {' or '.join(map(repr, media.values()))} (its columns are {shown}), so "
            f"its rows have no {' or '.join(media)}; if they do, name the column by "
            "data_collator=MMDataCollator(..., image_column=...)."
        )
    tasks = collator.tasks.values()
    missing = [task for task in tasks if task.default_cell is None and task.column not in columns]
    if missing and len(missing) == len(tasks):
        raise ValueError(f"The {name} data set has a column for none of the tasks (its columns are {shown}).")
    for task in missing:
        logger.warning(f"The {name} data set has no column {task.column!r}: task {task.name!r} has no labels there.")


def _check_lengths(dataset, args: TrainingArguments) -> None:
    columns = getattr(dataset, "column_names", None)
    wanted = args.length_column_name
    if getattr(args, "train_sampling_strategy", None) == "group_by_length" and columns and wanted not in columns:
        raise ValueError(
            f"Grouping by length needs a column {wanted!r} with the length of each text, for example by "
            f"data.map(lambda row: {{{wanted!r}: len(row['text'])}})."
        )
