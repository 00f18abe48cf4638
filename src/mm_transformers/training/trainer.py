"""The Trainer of transformers, for models with several tasks and batches with any number of images."""

import itertools
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from operator import is_not
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import EarlyStoppingCallback, GenerationConfig, Seq2SeqTrainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, has_length
from transformers.utils import logging

from ..data.collator import MMDataCollator
from ..data.feature_cache import FeatureCache
from ..data.image_groups import SharedImageSampler, images_of
from ..data.mixture import DataMixture, check_sources
from ..data.mixture_rows import MixedStream
from ..data.sources import StreamOfSource, is_iterable, rows_of
from ..data.splitting import Part, split_for_validation
from ..model.input_checks import check_finite_weights
from ..model.regularization import penalties, take_starting_point
from .arguments import MMTrainingArguments
from .card.card_file import write_trainer_card
from .checkpoints import newest_complete_checkpoint
from .checkpoints.adapters import has_own_adapters, load_adapters
from .checkpoints.resuming import ResumableTrainer, clear_errors
from .checkpoints.starting_point import load_starting_point, save_starting_point
from .learning_rates import never_decays, set_learning_rates
from .linear_start.linear_models import LinearModel
from .linear_start.probe_start import Start, probes_of, start_probes
from .linear_start.refit import Refit
from .linear_start.start_average import StartAverage, TolerantEarlyStopping, is_as_good
from .linear_start.verdict import Verdict
from .metrics import MultiTaskMetrics, WithLosses
from .metrics.mismatches import Unlabelled, WithMismatches
from .objective.balancing import TaskBalancing
from .objective.task_options import balance_tasks, prepare_tasks
from .rows.source_counts import RowCounts
from .rows.stream_shares import IS_REPEATED, ShareOfStream, WithoutRepeats, gather_once
from .setup_checks import (
    check_adapters,
    check_arguments,
    check_best_metric,
    check_columns,
    check_direction,
    check_lengths,
    check_rows_per_image,
)
from .sharding import gather_for_method, layer_classes


logger = logging.get_logger(__name__)


class MMTrainer(ResumableTrainer):
    """
    [`~transformers.Trainer`] with what a [`MMTransformerForMultiTask`] needs:

    - `data_collator` and `compute_metrics` default to [`MMDataCollator`] and [`MultiTaskMetrics`];
    - tasks whose linear probe is new start as the best linear model of the mean encoder outputs (see [`start_probes`]);
      the start is measured and saved like a checkpoint, and takes part in the choice of the best weights;
    - with [`MMTrainingArguments`], evaluations during such a training, and the model at its end, have the mean of the
      weights at the start and after training (see `start_share`); checkpoints hold the weights of training;
    - with [`MMTrainingArguments`], a grouped and stratified share of the training rows is held out if there is no
      `eval_dataset`, the weights with the best validation loss are kept, and training stops early; if rows are few,
      all of them are then trained on, from the start again (see `refit`);
    - after training, `verdicts` compares each task with its linear start, a linear model of the text alone and the
      majority, on the validation rows; one line per task is logged;
    - the loss of each task is its mean over all the labels of an optimiser step, also under gradient accumulation, and
      the regularizer enters once per step; what the regularizer covers has no weight decay;
    - logs hold the loss of each task (`<task>_loss`, `regularization_loss`), its mean over the optimiser steps in which
      the task had labels;
    - losses of an evaluation are exact means over all its labels, and absent where nothing is labelled;
    - the gates of the fusion learn ten times as fast and without weight decay;
    - in evaluation, tasks that write do so, and their metrics compare texts; `generation_num_beams`,
      `generation_max_length` and `predict_with_generate` of [`~transformers.Seq2SeqTrainingArguments`] are heeded;
    - with a `feature_cache`, encoders that are frozen as a whole run once per distinct item, before the first batch of
      a data set, and never again;
    - images of a data set are read by the collator, so that messages about bad data name the row, and how many images
      could not be read is told at the end;
    - it may be killed at any moment: `train(resume_from_checkpoint=True)` goes on from the newest complete checkpoint,
      or starts from scratch where there is none, and ends as if nothing had happened.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, kwargs:
            As [`~transformers.Trainer`] takes them. `args` defaults to `MMTrainingArguments("tmp_trainer")`.
            `processing_class` is the [`MMTransformerProcessor`]; it defaults to that of the `data_collator`. In `args`,
            `remove_unused_columns` and `accelerator_config.dispatch_batches` are set to `False`: columns are chosen by
            the collator, and a batch of images cannot be cut along with its rows. `ddp_find_unused_parameters`
            defaults to `False`: every parameter takes part in every step. `train_dataset` may be a [`DataMixture`] of
            several data sets, or a dict of them; then the logs hold how many rows of each there were since the last
            log (`rows_<name>`). Where a data set is taken, a [`DataSource`] is too.
        feature_cache ([`FeatureCache`], `str` or `Path`, *optional*): The cache, or its folder.

    Raises:
        ValueError: if several GPUs would be used by `nn.DataParallel`, if there is neither a `processing_class` nor a
            `data_collator`, if the model has no tasks, if a data set lacks the text column or all of the tasks'
            columns (for several, as [`DataMixture`] says), or if something is asked for that would be ignored: label
            smoothing, `compute_loss_func`, `batch_eval_metrics`.
    """

    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    gather_function: Any
    _eval_dataloaders: dict[str, Any]
    preprocess_logits_for_metrics: Any

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
        args = args if args is not None else MMTrainingArguments("tmp_trainer")
        check_arguments(args)
        if isinstance(args, MMTrainingArguments):
            args.reopen()  # another trainer may have settled them
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("MMTrainer takes no compute_loss_func: the loss of a task is its method `loss`.")
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
        if isinstance(train_dataset, dict) and not hasattr(train_dataset, "column_names"):
            train_dataset = DataMixture(train_dataset)
        if isinstance(train_dataset, dict):  # a DatasetDict, whose splits are not all to be trained on
            raise ValueError(f"train_dataset must be one split, not all of {', '.join(map(repr, train_dataset))}.")
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter takes part in every step
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
        if not hasattr(self.fused_model, "tasks"):
            found = type(self.fused_model).__name__
            raise ValueError(f"MMTrainer trains a model with tasks, MMTransformerForMultiTask, not {found}.")
        if train_dataset is not None and args.train_batch_size * args.world_size == 1:
            alone = [task.name for task in self.fused_model.tasks.values() if task.kind == "retrieval"]
            if alone:
                raise ValueError(
                    f"Task {alone[0]!r} tells the pairs of a batch apart, but a batch holds one row: set "
                    "per_device_train_batch_size to 2 or more (accumulating gradients does not help)."
                )
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version == 1:
                raise ValueError("MMTrainer shards by FSDP2: set fsdp_version: 2 in the config of accelerate.")
            if plugin.transformer_cls_names_to_wrap is None:
                plugin.transformer_cls_names_to_wrap = layer_classes(self.fused_model)
        if train_dataset is not None and hasattr(self.model, "get_base_model"):
            check_adapters(self.fused_model)
        if data_collator is None:
            self.data_collator = MMDataCollator(processing_class, self.model.config)
        self._refit: Optional[Refit] = None
        self._parts: list[Part] = []  # rows that are held out here, and those that are left
        self.refitted: Optional[str] = None  # how the model was trained again on all rows
        has_own_optimizer = self.optimizer is not None or kwargs.get("optimizer_cls_and_kwargs") is not None
        train_dataset, eval_dataset = self._with_validation_rows(has_own_optimizer)
        self.feature_cache = FeatureCache.of(feature_cache)
        if self.feature_cache is not None:
            self.feature_cache.modalities(self.fused_model, self.data_collator)
        check_direction(args)
        if compute_metrics is None:
            self.compute_metrics: Any = MultiTaskMetrics(self.model.config, processing_class)
            check_best_metric(args, self.fused_model.tasks.values(), eval_dataset)
        check_sources(train_dataset, eval_dataset, self.data_collator, args)
        if isinstance(self.data_collator, MMDataCollator):
            for name, datasets in {"train": train_dataset, "eval": eval_dataset}.items():
                for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
                    check_columns(dataset, name, self.data_collator)
            check_lengths(train_dataset, args)
            check_rows_per_image(train_dataset, self.data_collator, args)
        if self.train_dataset is not None and isinstance(self.data_collator, MMDataCollator):
            prepare_tasks(
                self.fused_model, self.train_dataset, self.data_collator, self.data_collator, self.compute_metrics
            )
        self._start = Start()
        self._keeps_start = False
        self._average: Optional[StartAverage] = None
        self._trained_from: Optional[StartAverage] = None
        self.verdicts: list[Verdict] = []
        # `num_items_in_batch` holds the divisors of the whole optimiser step, so nothing is left to be divided.
        self.model_accepts_loss_kwargs = True
        # Of each task, and of the regularizer, since the last log: losses, summed over the optimiser steps, and the
        # number of steps that had any.
        self._has_trained = self._has_evaluated = False  # the latter before training
        self._eval_dataloaders = {}  # of transformers: name -> the loader that is kept
        self._loaders_read: dict[str, tuple] = {}  # name -> its rows, collator and feature cache
        self._balancing: Optional[TaskBalancing] = None
        self._rows_per_epoch: Optional[int] = None
        self._forget_losses()
        names = list(train_dataset.sources) if isinstance(train_dataset, DataMixture) else []
        self._counts = RowCounts(names)
        self._num_labels = {}

    @property
    def fused_model(self) -> Any:
        """The model itself, whatever wraps it, adapters included."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def linear_models(self) -> dict[str, LinearModel]:
        """Task -> the linear model with which the last training started; empty if that was resumed."""
        return self._start.models

    # Data

    def _with_validation_rows(self, has_own_optimizer: bool) -> tuple[Any, Any]:
        """Training and validation rows: the latter as given, or held out if the arguments leave that to the trainer."""
        args = self.args
        if not isinstance(args, MMTrainingArguments):
            if probes_of(self.fused_model) and self.train_dataset is not None:
                logger.warning_once(
                    f"These are plain {type(args).__name__}, which are taken as they are: one learning rate of "
                    f"{args.learning_rate:g} for all parts. MMTrainingArguments has defaults for pretrained encoders, "
                    "validation rows, early stopping and the best weights."
                )
            return self.train_dataset, self.eval_dataset
        if self.train_dataset is None:
            return None, self.eval_dataset
        if self.eval_dataset is None and args.wants_validation_rows and isinstance(self.data_collator, MMDataCollator):
            parts = split_for_validation(self.train_dataset, self.data_collator, args.validation_fraction, args.seed)
            if parts is not None:
                self._refit = Refit.of(self, MMTrainer, has_own_optimizer)
                num_rows = len(self.train_dataset)
                self.train_dataset, self.eval_dataset = (part.rows for part in parts)
                self._parts = list(parts)
                logger.warning(
                    f"No eval_dataset: {len(self.eval_dataset):,} of {num_rows:,} training rows are held out for "
                    "validation."
                )
        args.settle(
            has_validation=self.eval_dataset is not None,
            has_one_loss=not isinstance(self.eval_dataset, dict),
            has_epochs=has_length(self.train_dataset),
        )
        has_one = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        if args.load_best_model_at_end and args.early_stopping_patience and not has_one:
            self.add_callback(TolerantEarlyStopping(args.early_stopping_patience, trainer=self))
        return self.train_dataset, self.eval_dataset

    def rows_of(self, dataset: Any) -> tuple[Any, Any]:
        """As [`rows_of`]; held-out rows are numbered as in the data set of the user."""
        places = next((part.places for part in self._parts if part.rows is dataset), None)
        return rows_of(dataset, self.data_collator, places)

    def collator_for(self, rows: Any) -> Any:
        """The collator for these rows; with a feature cache, what frozen encoders give of them is stored first."""
        self._store_features(rows)
        return self.data_collator

    def _get_train_sampler(self, train_dataset=None):
        if getattr(self.args, "rows_per_image", 1) > 1:
            dataset = self.train_dataset if train_dataset is None else train_dataset
            sampler: Any = self._shared_image_sampler(dataset)
        else:
            sampler = super()._get_train_sampler(train_dataset)
        self._rows_per_epoch = None if sampler is None else len(sampler)
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        # In the order of the rows, also if training groups them by length: `predict` answers row by row.
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def _shared_image_sampler(self, dataset: Any) -> SharedImageSampler:
        rows, _ = self.rows_of(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        column = self.data_collator.media["images"]
        return SharedImageSampler(images_of(rows, column), self.args.rows_per_image, seed)

    def get_eval_dataloader(self, eval_dataset=None):
        """
        As [`~transformers.Trainer.get_eval_dataloader`]. With `dataloader_persistent_workers`, the loader of a data set
        is kept during a training, for its next evaluation, as long as data set, collator and feature cache are the same
        objects. Outside of a training none is kept, so whatever has changed in place is seen.
        """
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if isinstance(eval_dataset, str):
            rows = self.eval_dataset[name]
        else:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
        # transformers keeps one loader per name, and one for all data sets without a name.
        read = (rows, getattr(self.data_collator, "uncached", self.data_collator), self.feature_cache)
        if not self.is_in_train or any(map(is_not, self._loaders_read.get(name, (None,)), read)):
            self._eval_dataloaders.pop(name, None)
        loader = super().get_eval_dataloader(eval_dataset)
        self._loaders_read[name] = read
        if not self.is_in_train:
            self._forget_eval_dataloaders()
        return loader

    def _forget_eval_dataloaders(self) -> None:
        self._eval_dataloaders.clear()
        self._loaders_read.clear()

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        drop_last = self.args.dataloader_drop_last
        # Training may leave out the last rows of an epoch, evaluation and `predict` may not.
        self.args.dataloader_drop_last = drop_last and kwargs.get("is_training", False)
        try:
            return self._make_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _make_dataloader(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        if not isinstance(self.data_collator, MMDataCollator):
            return self._shared_dataloader(dataset, description, batch_size, sampler_fn=sampler_fn, **kwargs)
        if isinstance(dataset, DataMixture):
            rows = dataset.rows(self.data_collator, batch_size, self.args)
            self._store_features(rows)
            loader = super()._get_dataloader(rows, description, batch_size, lambda rows: rows.sampler, **kwargs)
            if isinstance(rows, MixedStream):
                rows.read_own_part(loader.dataset)
            else:
                self._rows_per_epoch = len(rows.sampler)
            return loader
        rows, original = self.rows_of(dataset)
        self._store_features(rows)

        def sampler_of(_: Any) -> Any:
            sampler = sampler_fn(original)
            if hasattr(sampler, "set_epoch"):
                # Once batches are skipped on several processes, accelerate finds the data set, but not the sampler.
                rows.set_epoch = sampler.set_epoch
            return sampler

        wrapped = None if sampler_fn is None else sampler_of
        collator = self.data_collator
        if not kwargs.get("is_training", False):
            self.data_collator = collator.with_references()
        try:
            return self._shared_dataloader(rows, description, batch_size, sampler_fn=wrapped, **kwargs)
        finally:
            self.data_collator = collator

    def _shared_dataloader(self, rows, description, batch_size, **kwargs):
        """The stock loader; of a stream, each of several processes reads a [`ShareOfStream`]."""
        if isinstance(rows, StreamOfSource):
            rows.rows_per_turn = batch_size * (1 if self.accelerator.split_batches else self.args.world_size)
        if self.args.world_size == 1 or not isinstance(rows, IterableDataset):
            return super()._get_dataloader(rows, description, batch_size, **kwargs)
        share, collator = ShareOfStream(rows), self.data_collator
        self.data_collator = WithoutRepeats(collator, tells=not kwargs.get("is_training", False))
        try:
            loader = super()._get_dataloader(share, description, batch_size, **kwargs)
        finally:
            self.data_collator = collator
        share.read_own_part(loader.dataset)
        return loader

    def _store_features(self, rows: Any) -> None:
        """What frozen encoders say of these rows is in the cache from now on, and the collator takes it from there."""
        if self.feature_cache is not None:
            batch_size, num_workers = self.args.eval_batch_size, self.args.dataloader_num_workers
            self.data_collator = self.feature_cache.prepare(
                self.fused_model, self.data_collator, rows, batch_size, num_workers
            )

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if 0 < len(batches) < num_batches:
            # Their gradients would wait, unweighted by the labels of what follows, for the next step.
            logger.warning_once(
                f"The stream ended with {len(batches)} of the {num_batches} batches of an optimiser step; such a rest "
                "is left out, since what a step is made of must be known before it."
            )
            batches = []
        divisors = self._get_num_items_in_batch(batches, device)
        if self._balancing is not None:
            self._balancing.start_step(batches, divisors)
        return batches, divisors

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._balancing is not None:
            self._balancing.before_forward(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # In fp16 a batch may overflow: its step is left out, and training goes on.
        if not self.args.fp16 and not torch.isfinite(loss):
            self._check_finite({"all tasks together": loss, **self._step_losses}, "loss", self.state.global_step + 1)
        if self._balancing is not None:
            self._balancing.after_backward()
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> dict[str, torch.Tensor]:
        tasks = self.fused_model.tasks
        if batch_samples and self.accelerator.gradient_state.end_of_dataloader:
            self._unlabel_repeated_rows(batch_samples[-1])
        self._counts.take_rows(batch_samples)
        counts = torch.zeros(len(tasks), device=device)
        for batch in batch_samples:
            for i, (name, task) in enumerate(tasks.items()):
                if name in batch.get("labels", {}):
                    counts[i] += task.num_labelled(batch["labels"][name]).to(device)
        # Gradients are averaged over processes, so each divides by its share of the labels of all.
        counts = self.accelerator.reduce(counts, reduction="mean")
        divisors = dict(zip(tasks, counts, strict=True))
        for name, count in divisors.items():
            self._num_labels[name] = self._num_labels.get(name, 0) + count
        divisors["regularization"] = torch.tensor(float(max(len(batch_samples), 1)), device=device)
        return divisors

    def _unlabel_repeated_rows(self, batch: dict[str, Any]) -> None:
        """
        Under several processes the last batches of an epoch are filled up with its first rows, so that all processes
        have as many; these must not count twice.
        """
        if self.args.dataloader_drop_last:
            return
        size = self._train_batch_size  # the one that has been found, with `auto_find_batch_size`
        if self.accelerator.split_batches:
            size //= self.args.world_size
        num_left = (self._rows_per_epoch or 0) % (size * self.args.world_size)
        if self.args.world_size > 1 and num_left > 0:
            num_own = min(max(num_left - size * self.args.process_index, 0), size)
            for labels in batch.get("labels", {}).values():
                labels[num_own:] = torch.nan if labels.is_floating_point() else -100

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if model.training:
            self._step_losses = {name: value.detach() for name, value in outputs.losses.items()}
            if self._balancing is not None:
                loss = self._balancing.loss(outputs.losses)
            for name, value in outputs.losses.items():
                # Each of the batches of a step is a part of it.
                steps = (num_items_in_batch[name] > 0) / num_items_in_batch["regularization"]
                self._losses[name] = self._losses.get(name, 0) + value.detach()
                self._num_steps[name] = self._num_steps.get(name, 0) + steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._losses:
            losses = self.accelerator.reduce(torch.stack(list(self._losses.values())), reduction="mean").tolist()
            for name, loss in zip(self._losses, losses, strict=True):
                if self._num_steps[name] > 0:
                    logs[f"{name}_loss"] = loss / self._num_steps[name].item()
            self._forget_losses()
            if self._balancing is not None:
                logs.update(self._balancing.logs())
        if "loss" in logs:
            logs.update(self._counts.rows_since_last(self.accelerator))
        super().log(logs, *args, **kwargs)

    def _forget_losses(self) -> None:
        self._losses, self._num_steps, self._step_losses = {}, {}, {}

    def _check_finite(self, losses: dict[str, Any], what: str, step: Optional[int] = None) -> None:
        """
        Raises:
            ValueError: if a number is NaN or infinite: nothing can be learned any more, and nothing be scored.
        """
        bad = [name for name, loss in losses.items() if not torch.isfinite(torch.as_tensor(loss)).all()]
        if bad:
            good = newest_complete_checkpoint(self._get_output_dir(getattr(self, "_trial", None)))
            step = self.state.global_step if step is None else step
            kept = "there is no checkpoint before it" if good is None else f"{good} is the newest checkpoint before it"
            message = (
                f"Training has diverged: at step {step} the {what} of {bad[-1]} is NaN or "
                f"infinite ({kept}). Try a smaller learning rate, more warm-up, or float32 or bf16 in place of fp16."
            )
            if isinstance(getattr(self, "_trial", None), getattr(sys.modules.get("optuna"), "Trial", ())):
                raise sys.modules["optuna"].TrialPruned(message)  # the search goes on
            raise ValueError(message)

    def _evaluate(self, *args, **kwargs):
        metrics = super()._evaluate(*args, **kwargs)
        losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
        self._check_finite(losses, "value")
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        self._check_weights()
        super()._save_checkpoint(model, trial)

    def _check_weights(self) -> None:
        # The last step may have broken them, after its loss was computed.
        self._check_finite(
            {name: parameter for name, parameter in self.fused_model.named_parameters() if parameter.requires_grad},
            "weight",
        )

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        fused = self.fused_model
        parts = penalties(fused, fused.config.regularization)
        regularized = {id(parameter) for part in parts for parameter in part.parameters.values()}
        free = {name for name, p in model.named_parameters() if never_decays(name) or id(p) in regularized}
        return [name for name in names if name not in free]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            set_learning_rates(optimizer, self.fused_model, self.args)
        return optimizer

    # Training

    def train(self, *args, **kwargs):
        wraps = self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        # accelerate leaves a model as it is once another trainer has prepared it for evaluation.
        has_evaluated = self._has_evaluated or (wraps and getattr(self.model, "_is_accelerate_prepared", False))
        if has_evaluated and self.args.world_size > 1:
            raise ValueError(
                "This trainer, or another with the same model, has evaluated before training, after which the "
                "processes would train apart from each other: evaluate with a trainer and a model of its own, or set "
                "eval_on_start=True in the training arguments."
            )
        self._has_trained = True
        self._forget_eval_dataloaders()
        self._start, self._average, self._trained_from = Start(), None, None
        self._forget_losses()
        self._num_labels = {}
        self._counts.reset()
        if self.feature_cache is not None and self.args.eval_strategy != "no":
            # What cannot be stored is told before hours are spent, not after the first epoch.
            evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for dataset in evaluated.values():
                self._store_features(self.rows_of(dataset)[0])
        if self.refitted is not None:
            logger.warning(
                "The held-out rows were trained on before and cannot choose the best weights: give an eval_dataset."
            )
        self.refitted = None
        output = super().train(*args, **kwargs)
        self._tell_verdicts()
        is_trial = kwargs.get("trial", args[1] if len(args) > 1 else None) is not None
        if self._refit is not None and self._trained_from is not None and not is_trial:
            self._start.models = self._refit.run(self, self._trained_from, self._start.tasks)
            self.refitted, self._trained_from = self._refit.how, None
            self._num_labels = {}  # the second training has told which are missing
        for name, count in self._num_labels.items():
            if count == 0:
                logger.warning(f"No training row has a label of task {name!r}, so its head was not trained.")
        self._report_bad_files()
        return output

    def _inner_training_loop(self, *args, **kwargs):
        # Only here is the model surely the one that is trained: a `model_init` makes a new one for each trial.
        fused = self.fused_model
        check_finite_weights(fused)
        is_resumed = kwargs.get("resume_from_checkpoint") is not None
        if isinstance(self.data_collator, MMDataCollator):
            # A model of `model_init` has not seen the training rows.
            prepare_tasks(fused, self.train_dataset, self.data_collator, self.data_collator, self.compute_metrics)
        if not is_resumed and getattr(self.args, "probe_start", None) is not False and not self._start.models:
            # With auto_find_batch_size a training begins several times, and has started only the first time.
            self._start = self._started(start_probes(self))
        elif is_resumed:
            self._start = Start.load(kwargs["resume_from_checkpoint"])
        balance_tasks(fused, self._start.label_counts, self.data_collator, self.compute_metrics)
        self._keeps_start = bool(self._start.models) and self.args.load_best_model_at_end and not is_resumed
        self._average = self._start_average(kwargs.get("resume_from_checkpoint"))
        fused.starting_point = take_starting_point(fused, fused.config.regularization)
        self.stop_balancing()
        balancing = TaskBalancing(self)
        self._balancing = balancing if balancing.is_needed else None
        if self._balancing is not None:
            self.add_callback(self._balancing)
        return super()._inner_training_loop(*args, **kwargs)

    def stop_balancing(self) -> None:
        """Forgets the weighting of tasks of a training before."""
        self.remove_callback(TaskBalancing)
        self._balancing = None

    def _start_average(self, checkpoint: Optional[str]) -> Optional[StartAverage]:
        """For models that started as linear models, now or in the training that goes on."""
        share = getattr(self.args, "start_share", 0.0)
        if self._average is not None:  # a smaller batch size is tried
            if checkpoint is None:
                self._average.begin_anew()
            return self._average
        if (share == 0 and self._refit is None) or (checkpoint is None and not self._start.models):
            return None
        average = StartAverage(self.accelerator.unwrap_model(self.model), share)
        return average if checkpoint is None or average.load(checkpoint) else None

    def _finalize_training(self, *args, **kwargs):
        # Before callbacks see the end of the training.
        loads_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if not loads_best:
            self._check_weights()
            self._take_average()
        return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        model = self.model if model is None else model
        if has_own_adapters(model):
            load_adapters(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_own_adapters(self.model):
            load_adapters(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        self._take_average()

    def _take_average(self) -> None:
        if self._average is not None:
            self._average.apply()
            self._trained_from = self._average if self._refit is not None else None
            self._average = None

    def _started(self, start: Start) -> Start:
        if start.models and self.is_world_process_zero():
            names = ", ".join(f"{name} ({model.num_items:,} labels)" for name, model in start.models.items())
            logger.warning(f"Started as linear models of the mean encoder outputs: {names}.")
        return start

    def on_start(self, trial: Any, ignore_keys_for_eval: Any) -> None:
        """The start counts as a checkpoint: it is kept if trained weights are worse on the validation rows."""
        if self._keeps_start:
            metrics = self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            self._determine_best_metric(metrics, trial)
            self._save_checkpoint(self.model, trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if self._chooses_best and self.args.load_best_model_at_end and name not in metrics:
            logger.warning_once(
                f"The evaluation gives no {name}, since no validation row has a label: the last weights are kept."
            )
            return False
        lowest = self.state.best_metric
        if self.is_tolerant and lowest is not None and is_as_good(metrics[name], lowest):
            self.state.best_metric = min(metrics[name], lowest)
            self.state.best_global_step = self.state.global_step
            return True
        return super()._determine_best_metric(metrics, trial)

    @property
    def _chooses_best(self) -> bool:
        return isinstance(self.args, MMTrainingArguments) and self.args.chooses_best

    @property
    def is_tolerant(self) -> bool:
        """Whether of nearly equal validation losses the latest counts as the best; see [`is_as_good`]."""
        by_loss = self.args.load_best_model_at_end and self.args.metric_for_best_model in ("loss", "eval_loss")
        return self._chooses_best and by_loss and self._average is not None and self._average.share > 0

    def _tell_verdicts(self) -> None:
        state, best = self.state, self.state.best_global_step
        measured = [entry for entry in state.log_history if "eval_loss" in entry]
        step = best if best is not None and self.args.load_best_model_at_end else state.global_step
        values: dict[str, Any] = next((entry for entry in reversed(measured) if entry["step"] == step), {})
        self.verdicts = []
        for name, verdict in self._start.verdicts.items():
            verdict = replace(verdict, model=values.get(f"eval_{name}_{verdict.metric}"), kept_start=best == 0)
            self.verdicts.append(verdict)
            if self.is_world_process_zero():
                logger.warning(str(verdict))
                if not verdict.others_help and self.fused_model.config.modalities:
                    others = " and ".join(self.fused_model.config.modalities)
                    logger.warning(f"{name}: {others} did not help on the validation rows; text alone is as good.")

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False):
        if self.is_fsdp_enabled and not _internal_call:
            # The stock method leaves it out where checkpoints are saved in shards, by FSDP's own files.
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir, state_dict=state)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)
        if self._is_saving and self.args.should_save and output_dir is not None:
            # A resumed training needs them, also if its checkpoint has no optimiser.
            self._start.save(output_dir)
            if self._average is not None:
                self._average.save(output_dir)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TolerantEarlyStopping):
                callback.trainer = self  # restored ones know none

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            if self._balancing is not None:
                self._balancing.save(output_dir)
            save_starting_point(self.fused_model, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        if checkpoint is not None:
            # First, since another objective has other groups of parameters, of which the optimiser would complain.
            load_starting_point(self.fused_model, checkpoint)
            if self._balancing is not None:
                self._balancing.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    # Sharing

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """
        Writes the card of the model, `README.md`, into `args.output_dir`; in one that is there, what was generated is
        renewed and what a person wrote stays.

        Args:
            language, license, tags, dataset_tags: For the Hub; never guessed. `dataset_tags` are ids of data sets, of
                which `dataset` gives the names.
            model_name (`str`, *optional*): How the example calls the model; the Hub id or the folder by default.
            kwargs: What else [`~transformers.Trainer.create_model_card`] takes; the encoders and tasks are known.
        """
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or model_name or self.args.hub_model_id
        said: dict[str, Any] = {
            "language": language,
            "license": license,
            "tags": tags,
            "datasets": dataset_tags or dataset,
        }
        write_trainer_card(self, self.args.output_dir, name, **said)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.refitted is not None and (eval_dataset is None or eval_dataset is self.eval_dataset):
            logger.warning(
                "The model was trained on these rows in the end (refit), so this does not tell how good it is: "
                "evaluate other rows, or train with refit=False."
            )
            self.state.log_history[-1]["trained_on"] = True
        return metrics

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if has_length(dataloader) and len(dataloader) == 0:
            raise ValueError("There is nothing to evaluate or predict: the data set has no rows.")
        with clear_errors(), nullcontext() if self._average is None else self._average.applied():
            return self._evaluated(dataloader, *args, **kwargs)

    def _evaluated(self, dataloader, *args, **kwargs):
        self._has_evaluated = self._has_evaluated or not self._has_trained
        loss_only = kwargs.get("prediction_loss_only")
        loss_only = self.args.prediction_loss_only if loss_only is None else loss_only
        prefix, tasks = kwargs.get("metric_key_prefix", "eval"), self.fused_model.tasks
        own, own_logits = self.compute_metrics, self.preprocess_logits_for_metrics
        if loss_only:
            self.compute_metrics, self.preprocess_logits_for_metrics = WithLosses(self.fused_model.config), None
        elif not isinstance(own, MultiTaskMetrics) and own_logits is None:
            self.compute_metrics = WithLosses(self.fused_model.config, own)
        has_losses = isinstance(self.compute_metrics, (MultiTaskMetrics, WithLosses))
        self.compute_metrics = self._with_mismatches(dataloader, self.compute_metrics)
        gather = self.gather_function
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = own, own_logits
            self.gather_function = gather
        losses = {name: output.metrics.get(f"{prefix}_{name}_loss") for name in tasks}
        if any(loss is not None for loss in losses.values()):
            # The stock loop reports the mean of the means of batches, which is not the mean.
            total = sum(tasks[name].loss_weight * loss for name, loss in losses.items() if loss is not None)
            output.metrics[f"{prefix}_loss"] = total + self._regularization()
        elif has_losses and isinstance(output.label_ids, Mapping):
            output.metrics.pop(f"{prefix}_loss", None)  # of rows without labels there is none
        self._report_bad_files()
        return output._replace(predictions=None, label_ids=None) if loss_only else output

    def _with_mismatches(self, dataloader: Any, measure: Any) -> Any:
        tasks = [task for task in self.fused_model.tasks.values() if task.needs_mismatches]
        has_own_logits = self.preprocess_logits_for_metrics is not None
        if not tasks or has_own_logits or not isinstance(self.data_collator, MMDataCollator):
            return measure
        if is_iterable(dataloader.dataset):
            logger.warning_once(
                f"The evaluation rows are a stream, so task {tasks[0].name!r} judges mismatched pairs of rows of one "
                "batch: its metrics depend on the batch size."
            )
            return measure
        return WithMismatches(tasks, dataloader.dataset, self.data_collator, self._logits_of, measure)

    def _logits_of(self, rows: Any) -> dict[str, Any]:
        """The logits of rows without labels, while an evaluation is going on."""
        loader = DataLoader(
            rows, self.args.eval_batch_size, collate_fn=Unlabelled(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
        )  # fmt: skip
        handler = self.callback_handler
        callbacks, handler.callbacks = handler.callbacks, []  # a progress bar shows the evaluation, not this
        evaluated = handler.eval_dataloader
        try:
            loader = self.accelerator.prepare(loader)
            return super().evaluation_loop(loader, "Mismatched pairs", prediction_loss_only=True).predictions
        finally:
            handler.callbacks, handler.eval_dataloader = callbacks, evaluated

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        fused = self.fused_model
        if IS_REPEATED in inputs:
            self.gather_function = gather_once(self.accelerator, inputs.pop(IS_REPEATED))
        references = inputs.pop("references", {})
        writes = fused.config.has_decoder and getattr(self.args, "predict_with_generate", True)
        if prediction_loss_only or not writes:
            # The loss of all rows is not the mean of the losses of batches, so it is computed from the answers.
            loss, answers, labels = super().prediction_step(model, inputs, False, ignore_keys)
            if prediction_loss_only and labels is not None:
                long = [name for name in answers if fused.tasks[name].needs_decoder]
                answers |= {name: {"losses": self._losses_of_rows(name, answers[name], labels[name])} for name in long}
            return loss, answers, labels
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        if self.is_fsdp_enabled:
            gather_for_method(fused, "forward_and_write")
        # Not through the wrapped model, which is what otherwise sees to the precision.
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            outputs, written = fused.forward_and_write(labels, self._generation_options(), **inputs)
            answers = dict(outputs.logits)
            for name, ids in written.items():
                answers[name] = {"generated_ids": ids}
                if labels is not None:
                    answers[name]["losses"] = self._losses_of_rows(name, outputs.logits[name], labels[name])
                if name in references:
                    answers[name]["references"] = references[name]
        return None if labels is None else outputs.loss.detach(), answers, labels

    def _losses_of_rows(self, name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        task = self.fused_model.tasks[name]
        return torch.stack([task.loss(logits[i : i + 1], labels[i : i + 1])[0] for i in range(len(labels))])

    @cached_property
    def _given_generation_config(self) -> Optional[GenerationConfig]:
        given = getattr(self.args, "generation_config", None)
        return given if given is None else Seq2SeqTrainer.load_generation_config(given)

    def _generation_options(self) -> dict[str, Any]:
        options = {
            "num_beams": getattr(self.args, "generation_num_beams", None),
            "max_length": getattr(self.args, "generation_max_length", None),
            # Where processes share layers out, all go on until the last has finished its texts.
            "synced_gpus": True if self.is_fsdp_enabled else None,
        }
        options["generation_config"] = self._given_generation_config
        return {name: value for name, value in options.items() if value is not None}

    def _regularization(self) -> float:
        with torch.no_grad():
            return (
                float(self.fused_model.regularization_loss())
                if self.fused_model.config.regularization is not None
                else 0.0
            )

    def _report_bad_files(self) -> None:
        count = getattr(self.data_collator, "num_bad_files", 0)
        if count:
            logger.warning(f"{count:,} times so far a file could not be read; it was treated as absent.")
