"""The Trainer of transformers, for models with several tasks and batches with any number of images."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, cast

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Sampler, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    GenerationConfig,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    SaveStrategy,
    TrainOutput,
    has_length,
)
from transformers.utils import logging

from ..data.collator import MMDataCollator
from ..data.feature_cache import FeatureCache
from ..data.image_groups import SharedImageSampler, images_of
from ..data.mixture import DataMixture, check_sources
from ..data.mixture_rows import MixedRows
from ..data.sources import ROWS_PER_SOURCE, rows_of
from ..data.splitting import Part, split_for_validation
from ..model.answers import unwrapped
from ..model.generation import repeatable, stop_at_end
from ..model.input_checks import check_finite_weights
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.pairs import PairTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.regularization import penalties, take_starting_point
from ..model.safe_writing import drop_link, saved_aside
from .arguments import MMTrainingArguments
from .card.card_file import write_trainer_card
from .checkpoints.adapters import has_own_adapters, load_adapters
from .checkpoints.callback_states import restore_callbacks
from .checkpoints.folders import rotate
from .checkpoints.links import check_links, make_room_for_metrics, prepare_push
from .checkpoints.lock import locked_for_all
from .checkpoints.resume_point import check_same_weights, checkpoint_to_resume
from .checkpoints.running_losses import load_losses, save_losses
from .checkpoints.staging import staged_checkpoint, staging_folder
from .checkpoints.starting_point import load_starting_point, save_starting_point
from .divergence import check_finite
from .learning_rates import never_decays, set_learning_rates
from .linear_start.linear_models import LinearModel
from .linear_start.probe_start import Start, probes_of, start_probes
from .linear_start.refit import Refit
from .linear_start.start_average import StartAverage, TolerantEarlyStopping, is_as_good
from .linear_start.study import Study
from .linear_start.verdict import Verdict, with_measured
from .metrics import MultiTaskMetrics, WithLosses
from .metrics.mismatches import Unlabelled, WithMismatches
from .metrics.written_answers import generation_options, losses_of_rows, with_texts
from .objective.balancing import TaskBalancing
from .objective.step_losses import StepLosses, divisors_of
from .objective.task_options import balance_tasks, prepare_tasks
from .rows.kept_loaders import KeptLoaders
from .rows.loader_inputs import LoaderInputs, SamplerFn
from .rows.row_order import order_of_rows, tell_changes
from .rows.source_counts import RowCounts
from .rows.stream_shares import IS_REPEATED, gather_once, unlabel_repeated_rows
from .setup_checks import (
    check_adapters,
    check_arguments,
    check_best_metric,
    check_columns,
    check_direction,
    check_lengths,
    check_parts,
    check_rows_per_image,
    check_tuning,
)
from .sharding import check_sharding, gather_for_method
from .thresholds import tune_thresholds
from .torch_errors import clear_errors


logger = logging.get_logger(__name__)


@dataclass
class Run:
    """
    The state of one run of the training loop. A training has several runs if it tries smaller batch sizes.

    Args:
        to_restore: the checkpoint whose losses are still to be restored.
        last_step_seen: the step after which the Trainer last logged, evaluated and saved.
        was_stopped_early: whether early stopping had ended the resumed training.
        knows_all_losses: whether all losses of a resumed training are known, from its beginning.
        has_started: whether the start was measured.
    """

    to_restore: Optional[str] = None
    last_step_seen: int = -1
    was_stopped_early: bool = False
    knows_all_losses: bool = False
    has_started: bool = False


class MMTrainer(Trainer):
    """
    [`~transformers.Trainer`] for a [`MMTransformerForMultiTask`], with rows of plain columns.

    Rows:

    - `data_collator` defaults to [`MMDataCollator`], which reads the images. So an error about bad data names the row.
    - Without an `eval_dataset`, [`MMTrainingArguments`] hold out a grouped and stratified share of the training rows.
    - With a `feature_cache`, completely frozen encoders run once per distinct item, before the first batch.

    Start and end:

    - Tasks with a new linear probe start as the best linear model of the mean encoder outputs; see [`start_probes`].
      This start is measured and saved as a checkpoint, and may be chosen as the best weights.
    - With [`MMTrainingArguments`], evaluations and the final model have the mean of the weights at the start and after
      training; see `start_share`. Checkpoints hold the weights of training.
    - With [`MMTrainingArguments`], the weights with the best validation loss are kept, and training stops early. If
      rows are few, the model is then trained again on all of them; see `refit`.
    - `verdicts` compares each task on the validation rows with three others: its linear start, a linear model of the
      text alone and the majority. One line per task is logged.

    Loss:

    - The loss of a task is its mean over all of its labels in an optimiser step, also under gradient accumulation.
    - The regularizer enters once per step. Its parameters have no weight decay.
    - The gates of the fusion have ten times the learning rate, and no weight decay.
    - Logs hold `<task>_loss` and `regularization_loss`: the means over the optimiser steps that had labels of the task.

    Evaluation:

    - `compute_metrics` defaults to [`MultiTaskMetrics`]. Losses are exact means over all labels; a task without labels
      has none.
    - Tasks that write do so, and their metrics compare texts. `generation_num_beams`, `generation_max_length` and
      `predict_with_generate` of [`~transformers.Seq2SeqTrainingArguments`] apply.

    Checkpoints: a training may be killed at any moment. `train(resume_from_checkpoint=True)` resumes from the newest
    complete checkpoint, or starts from scratch without one. The result is the same as without the interruption. A
    checkpoint is complete or absent: it is written to another folder and renamed. Old ones are renamed before they are
    deleted.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, kwargs:
            As in [`~transformers.Trainer`]. `args` defaults to `MMTrainingArguments("tmp_trainer")`. `processing_class`
            is the [`MMTransformerProcessor`]; it defaults to that of the `data_collator`. In `args`,
            `remove_unused_columns` and `accelerator_config.dispatch_batches` are set to `False`: the collator chooses
            the columns, and a batch of images cannot be cut along with its rows. `ddp_find_unused_parameters` defaults
            to `False`: every parameter takes part in every step. `train_dataset` may be a [`DataMixture`] of several
            data sets, or a dict of them. Then the logs hold the number of rows of each since the last log
            (`rows_<name>`). Each data set may also be a [`DataSource`].
        feature_cache ([`FeatureCache`], `str` or `Path`, *optional*): The cache, or its folder.

    Raises:
        ValueError: if several GPUs would be used by `nn.DataParallel`, if there is neither a `processing_class` nor a
            `data_collator`, or if the model has no tasks. Also if a data set lacks the text column or all of the tasks'
            columns (for several, as in [`DataMixture`]). Also for options that would be ignored: label smoothing,
            `compute_loss_func`, `batch_eval_metrics`.

    Example:

    ```python
    >>> trainer = MMTrainer(model, MMTrainingArguments("out"), processing_class=processor, train_dataset=rows)
    >>> trainer.train()
    ```
    """

    control: TrainerControl
    _tr_loss: torch.Tensor
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any  # an `MMDataCollator`, but a user may give another callable
    gather_function: Any
    preprocess_logits_for_metrics: Any

    def __init__(
        self,
        model: Optional[nn.Module] = None,
        args: Optional[TrainingArguments] = None,
        data_collator: Optional[Callable[[list[Any]], dict[str, Any]]] = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Optional[MMTransformerProcessor] = None,
        compute_metrics: Optional[Callable[[EvalPrediction], dict[str, float]]] = None,
        feature_cache: FeatureCache | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else MMTrainingArguments("tmp_trainer")
        check_arguments(args)
        if isinstance(args, MMTrainingArguments):
            args.reopen()  # another trainer may have set them
        if processing_class is None and isinstance(data_collator, MMDataCollator):
            processing_class = data_collator.processor
        check_parts(data_collator, processing_class, train_dataset, kwargs.get("compute_loss_func"))
        if isinstance(train_dataset, dict):
            train_dataset = DataMixture(train_dataset)
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter takes part in every step
        args.accelerator_config.dispatch_batches = False
        self._is_saving = False
        self._run = Run()
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
        self._check_model()
        if data_collator is None:
            self.data_collator = MMDataCollator(self.processing_class, self.model.config)
        if self.processing_class is not None:
            # As transformers does when training begins; evaluation may come before.
            stop_at_end(self.fused_model, self.processing_class.tokenizer)
        self._refit: Optional[Refit] = None
        self._parts: list[Part] = []  # held-out rows, and the remaining rows
        self.refitted: Optional[str] = None  # the second training on all rows, if any
        self._settle_arguments(self.optimizer is not None or kwargs.get("optimizer_cls_and_kwargs") is not None)
        self.feature_cache = FeatureCache.of(feature_cache)
        if self.feature_cache is not None:
            self.feature_cache.modalities(self.fused_model, self.data_collator)
        check_direction(args)
        if compute_metrics is None:
            self.compute_metrics: Any = MultiTaskMetrics(self.model.config, processing_class)
            check_best_metric(args, self.fused_model.tasks.values(), self.eval_dataset)
        self._check_rows()
        if self.train_dataset is not None:
            self._prepare_tasks()
        self._start = Start()
        self._keeps_start = False
        self._average: Optional[StartAverage] = None
        self._trained_from: Optional[StartAverage] = None
        self.verdicts: list[Verdict] = []
        self.study: Study | None = None
        # `num_items_in_batch` holds the divisors of the whole optimiser step, so no further division is needed.
        self.model_accepts_loss_kwargs = True
        self._has_trained = self._has_evaluated = False  # the latter before training
        self._eval_dataloaders: dict[str, DataLoader[Any]] = {}  # those that the Trainer keeps
        self._kept = KeptLoaders(self._eval_dataloaders)
        self._balancing: Optional[TaskBalancing] = None
        self._rows_per_epoch: Optional[int] = None
        self._losses = StepLosses()
        self._counts = RowCounts(list(train_dataset.sources) if isinstance(train_dataset, DataMixture) else [])

    def _check_model(self) -> None:
        """
        Checks the model.

        Raises:
            ValueError: if it cannot be trained, or not in this way.
        """
        if not hasattr(self.fused_model, "tasks"):
            found = type(self.fused_model).__name__
            raise ValueError(f"MMTrainer trains a model with tasks, MMTransformerForMultiTask, not {found}.")
        if self.train_dataset is not None and self.args.train_batch_size * self.args.world_size == 1:
            alone = [task.name for task in self.fused_model.tasks.values() if task.needs_other_rows]
            if alone:
                raise ValueError(
                    f"Task {alone[0]!r} compares the rows of a batch, but a batch has only one row: set "
                    "per_device_train_batch_size to 2 or more (accumulating gradients does not help)."
                )
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator.state.fsdp_plugin, self.fused_model)
        if self.train_dataset is not None and hasattr(self.model, "get_base_model"):
            check_adapters(self.fused_model)

    def _check_rows(self) -> None:
        """
        Checks the rows.

        Raises:
            ValueError: if rows lack columns, or cannot be read in the order of the arguments.
        """
        check_sources(self.train_dataset, self.eval_dataset, self.data_collator, self.args)
        if isinstance(self.data_collator, MMDataCollator):
            for name, datasets in {"train": self.train_dataset, "eval": self.eval_dataset}.items():
                for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
                    check_columns(dataset, name, self.data_collator)
            check_lengths(self.train_dataset, self.args)
            if self.train_dataset is not None:
                is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
                check_tuning(self.args, self.fused_model, self.eval_dataset, is_sharded)
            check_rows_per_image(self.train_dataset, self.data_collator, self.args)

    @property
    def fused_model(self) -> MMTransformerForMultiTask:
        """The unwrapped model, with its adapters."""
        model: MMTransformerForMultiTask = unwrapped(self.accelerator.unwrap_model(self.model))
        return model

    @property
    def linear_models(self) -> dict[str, LinearModel]:
        """Task -> the linear model with which the last training started; empty if that was resumed."""
        return self._start.models

    def _settle_arguments(self, has_own_optimizer: bool) -> None:
        """Holds out validation rows, and sets the arguments that depend on the rows and the device."""
        args = self.args
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # torch pins no memory then, and warns at each loader
        if not isinstance(args, MMTrainingArguments):
            if probes_of(self.fused_model) and self.train_dataset is not None:
                logger.warning_once(
                    f"These are plain {type(args).__name__}, so all parts have the learning rate "
                    f"{args.learning_rate:g}. MMTrainingArguments has defaults for pretrained encoders, validation "
                    "rows, early stopping and the best weights."
                )
            return
        if self.train_dataset is None:
            return
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
            self.add_callback(TolerantEarlyStopping(args.early_stopping_patience, is_tolerant=self._is_tolerant))

    def _prepare_tasks(self) -> None:
        if isinstance(self.data_collator, MMDataCollator):
            prepare_tasks(
                self.fused_model, self.train_dataset, self.data_collator, self.data_collator, self.compute_metrics
            )

    # Rows and batches

    def rows_of(self, dataset: Any) -> tuple[Any, Any]:
        """As [`rows_of`]; held-out rows are numbered as in the data set of the user."""
        places = next((part.places for part in self._parts if part.rows is dataset), None)
        return rows_of(dataset, self.data_collator, places)

    def collator_for(self, rows: Any) -> MMDataCollator:
        """The collator for these rows; with a feature cache, the outputs of frozen encoders are stored before."""
        if self.feature_cache is not None:
            batch_size, num_workers = self.args.eval_batch_size, self.args.dataloader_num_workers
            self.data_collator = self.feature_cache.prepare(
                self.fused_model, self.data_collator, rows, batch_size, num_workers
            )
        return self.data_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Optional[Sampler[int]]:
        args = self.args
        if getattr(args, "rows_per_image", 1) > 1:
            rows, _ = self.rows_of(self.train_dataset if train_dataset is None else train_dataset)
            seed = args.seed if args.data_seed is None else args.data_seed
            column = self.data_collator.media["images"]
            sampler: Any = SharedImageSampler(images_of(rows, column), args.rows_per_image, seed)
        else:
            sampler = super()._get_train_sampler(train_dataset)
        self._rows_per_epoch = None if sampler is None else len(sampler)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Optional[Sampler[int]]:
        # In the order of the rows, also if training groups them by length: `predict` answers row by row.
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """
        As [`~transformers.Trainer.get_eval_dataloader`], with loaders that are kept during a training.

        With `dataloader_persistent_workers`, the loader of a data set is kept for its next evaluation. This holds while
        data set, collator and feature cache are the same objects. Outside of a training no loader is kept, so changes
        in place take effect.
        """
        if not self.is_in_train:
            self._kept.forget()
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if isinstance(eval_dataset, str):
            rows = self.eval_dataset[name]
        else:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
        self._kept.keep_if_same(
            name, rows, getattr(self.data_collator, "uncached", self.data_collator), self.feature_cache
        )
        loader = super().get_eval_dataloader(eval_dataset)
        if not self.is_in_train:
            self._kept.forget()
        return loader

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Optional[SamplerFn] = None,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        is_training = kwargs.get("is_training", False)
        drop_last = self.args.dataloader_drop_last
        # Training may leave out the last rows of an epoch, evaluation and `predict` may not.
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            inputs = self._loader_inputs(dataset, batch_size, sampler_fn, is_training)
            # The stock method uses the collator of the trainer.
            collator, self.data_collator = self.data_collator, inputs.collator
            try:
                loader = super()._get_dataloader(inputs.rows, description, batch_size, inputs.sampler_fn, **kwargs)
            finally:
                self.data_collator = collator
        finally:
            self.args.dataloader_drop_last = drop_last
        inputs.took(loader)
        if isinstance(inputs.rows, MixedRows):
            self._rows_per_epoch = len(inputs.rows.sampler)
        return loader

    def _loader_inputs(
        self, dataset: Any, batch_size: int, sampler_fn: Optional[SamplerFn], is_training: bool
    ) -> LoaderInputs:
        if isinstance(self.data_collator, MMDataCollator) and isinstance(dataset, DataMixture):
            rows = dataset.rows(self.data_collator, batch_size, self.args)
            return LoaderInputs.of_mixture(rows, self.collator_for(rows))
        if isinstance(self.data_collator, MMDataCollator):
            rows, original = self.rows_of(dataset)
            collator = self.collator_for(rows)
            collator = collator if is_training else collator.with_references()
            inputs = LoaderInputs.of_rows(rows, original, collator, sampler_fn)
        else:
            inputs = LoaderInputs(dataset, self.data_collator, sampler_fn)
        inputs.share(batch_size, self.args.world_size, self.accelerator.split_batches, is_training)
        return inputs

    # Loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if 0 < len(batches) < num_batches:
            # Their gradients would stay until the next step, without the weights of its labels.
            logger.warning_once(
                f"The stream ended with {len(batches)} of the {num_batches} batches of an optimiser step; these are "
                "left out, since the number of labels of a step must be known before the step."
            )
            batches = []
        if batches and self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            size = self._train_batch_size  # the result of `auto_find_batch_size`, if used
            if self.accelerator.split_batches:
                size //= self.args.world_size
            unlabel_repeated_rows(
                batches[-1], self._rows_per_epoch or 0, size, self.args.process_index, self.args.world_size
            )
        self._counts.take_rows(batches)
        divisors = self._get_num_items_in_batch(batches, device)
        self._losses.count_labels(divisors, self.fused_model.tasks)
        if self._balancing is not None:
            self._balancing.start_step(batches, divisors, self.state.global_step)
        return batches, divisors

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> dict[str, torch.Tensor]:
        return divisors_of(self.fused_model.tasks, batch_samples, self.accelerator, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self._balancing is not None:
            self._balancing.before_forward(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # In fp16 a batch may overflow: its step is skipped, and training continues.
        if not self.args.fp16 and not torch.isfinite(loss):
            losses = {"all tasks together": loss, **self._losses.last}
            self._check_finite(losses, "loss", self.state.global_step + 1)
        if self._balancing is not None:
            self._balancing.after_backward()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if model.training:
            if self._balancing is not None:
                loss = self._balancing.loss(outputs.losses)
            self._losses.add(outputs.losses, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _losses_of(
        self, model: nn.Module, batch: dict[str, Any], divisors: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        with self.compute_loss_context_manager():
            return model(**self._prepare_inputs(batch), num_items_in_batch=divisors).losses

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._losses.take_logs(self.accelerator))
            if self._balancing is not None:
                logs.update(self._balancing.logs())
            logs.update(self._counts.rows_since_last(self.accelerator))
        if "train_loss" in logs and self._run.knows_all_losses:
            # Releases of transformers divide by different numbers of steps after resuming.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _check_finite(self, numbers: Mapping[str, Any], what: str, step: Optional[int] = None) -> None:
        trial = getattr(self, "_trial", None)
        step = self.state.global_step if step is None else step
        check_finite(numbers, what, step, lambda: self._get_output_dir(trial), trial)

    def _check_weights(self) -> None:
        # The last step may have broken them, after its loss was computed.
        self._check_finite({name: p for name, p in self.fused_model.named_parameters() if p.requires_grad}, "weight")

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        fused = self.fused_model
        parts = penalties(fused, fused.config.regularization)
        regularized = {id(parameter) for part in parts for parameter in part.parameters.values()}
        free = {name for name, p in model.named_parameters() if never_decays(name) or id(p) in regularized}
        return [name for name in names if name not in free]

    def create_optimizer(self, model: Optional[nn.Module] = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            set_learning_rates(optimizer, self.fused_model, self.args)
        return optimizer

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Optional[list[str]] = None,
    ) -> TrainOutput:
        """
        As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str | bool`, *optional*):
                `True` takes the newest complete checkpoint in `args.output_dir`. Without one, training starts from
                scratch. So the same command starts a training and continues it.

        Raises:
            ValueError: if the given checkpoint is not complete, or another process trains into this folder.
            OSError: if a checkpoint cannot be written; earlier ones stay unchanged.
        """
        self._begin_training()
        if self.args.push_to_hub:
            check_links(self.args.output_dir)
        with ExitStack() as held:
            if self.args.save_strategy != SaveStrategy.NO:
                held.enter_context(locked_for_all(self.args.output_dir, self.args.process_index))
            checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args, lambda: self.fused_model.tasks)
            with clear_errors(checkpoint):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        output = output._replace(training_loss=output.metrics["train_loss"])
        self._tell_verdicts()
        if getattr(self.args, "tune_thresholds", False) and trial is None:
            self._tune_thresholds()
        if self._refit is not None and self._trained_from is not None and trial is None:
            self._start.models = self._refit.run(self, self._trained_from, self._start.tasks)
            self.refitted, self._trained_from = self._refit.how, None
            self._losses.num_labels = {}  # the second training has reported missing labels
        for name, count in self._losses.num_labels.items():
            if count == 0:
                logger.warning(f"No training row has a label of task {name!r}, so its head was not trained.")
        self._report_bad_files()
        return output

    def _tune_thresholds(self) -> None:
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        parts = [(self.rows_of(dataset)[0], dataset) for dataset in sets]
        rows: ConcatDataset[Any] = ConcatDataset([part for part, _ in parts])
        found = tune_thresholds(
            self.fused_model, self.collator_for(rows), rows, self.args.eval_batch_size,
            self.args.dataloader_num_workers, holders=[self.data_collator, self.compute_metrics],
        )  # fmt: skip
        if self.is_world_process_zero():
            for name, thresholds in found.items():
                shown = ", ".join(f"{label} {value:.2f}" for label, value in list(thresholds.items())[:20])
                logger.warning(f"{name}: thresholds chosen on the validation rows: {shown}.")

    def _begin_training(self) -> None:
        wraps = self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        # accelerate does not prepare a model again that another trainer has prepared for evaluation.
        has_evaluated = self._has_evaluated or (wraps and getattr(self.model, "_is_accelerate_prepared", False))
        if has_evaluated and self.args.world_size > 1:
            raise ValueError(
                "This trainer, or another with the same model, has evaluated before training, so the processes would "
                "not exchange gradients. Evaluate with another trainer and another model, or set eval_on_start=True "
                "in the training arguments."
            )
        self._has_trained = True
        self._kept.forget()
        self._start, self._average, self._trained_from = Start(), None, None
        self._losses.begin()
        self._counts.reset()
        if self.feature_cache is not None and self.args.eval_strategy != "no":
            # Values that cannot be stored are an error now, not after the first epoch.
            evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for dataset in evaluated.values():
                self.collator_for(self.rows_of(dataset)[0])
        if self.refitted is not None:
            logger.warning(
                "The model was already trained on the held-out rows, so they cannot choose the best weights: "
                "give an eval_dataset."
            )
        self.refitted = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Only here the model is certainly the trained one: a `model_init` makes a new one for each trial.
        fused, checkpoint = self.fused_model, kwargs.get("resume_from_checkpoint")
        if fused.config.calibration is not None:
            logger.warning("Training changes the probabilities, so the calibration of the model is removed.")
            fused.config.calibration, fused.oddness = None, None
        self._run = Run(to_restore=checkpoint)
        check_finite_weights(fused)
        # A model of `model_init` has not seen the training rows.
        self._prepare_tasks()
        if checkpoint is not None:
            self._start = Start.load(checkpoint)
        elif getattr(self.args, "probe_start", None) is not False and not self._start.models:
            # With auto_find_batch_size a training begins several times, but has only one start.
            self._start = start_probes(self)
        balance_tasks(fused, self._start.label_counts, self.data_collator, self.compute_metrics)
        self._keeps_start = bool(self._start.models) and self.args.load_best_model_at_end and checkpoint is None
        self._begin_average(checkpoint)
        fused.starting_point = take_starting_point(fused, fused.config.regularization)
        self.stop_balancing()
        balancing = TaskBalancing(fused, self.args, self.accelerator, self.callback_handler, self._losses_of)
        if balancing.is_needed:
            self._balancing = balancing
            self.add_callback(balancing)
        return super()._inner_training_loop(*args, **kwargs)

    def stop_balancing(self) -> None:
        """Drops the task weighting of an earlier training."""
        self.remove_callback(TaskBalancing)
        self._balancing = None

    def _begin_average(self, checkpoint: Optional[str]) -> None:
        """Begins the average for models that started as linear models, now or in the resumed training."""
        share = getattr(self.args, "start_share", 0.0)
        if self._average is not None:  # a smaller batch size is tried
            if checkpoint is None:
                self._average.begin_anew()
        elif (share != 0 or self._refit is not None) and (checkpoint is not None or self._start.models):
            self._average = StartAverage.of(self.accelerator.unwrap_model(self.model), share, checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 0 and self._run.to_restore is None and not self._run.has_started:
            self._run.has_started = True
            if self._keeps_start:
                # The start counts as a checkpoint: it is kept if trained weights are worse on the validation rows.
                trial = kwargs.get("trial")
                metrics = self._evaluate(trial, kwargs.get("ignore_keys_for_eval"), skip_scheduler=True)
                self._determine_best_metric(metrics, trial)
                self._save_checkpoint(self.model, trial)
        self._restore_losses()
        if self.state.global_step >= self.state.max_steps or self._run.was_stopped_early:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Called after each step, and at the end of an epoch a second time. A checkpoint due at the last step of an
        # epoch is written then, since a resumed training would leave out what else happens there.
        is_epoch_end = self.state.global_step == self._run.last_step_seen
        self._run.last_step_seen = self.state.global_step
        should_save, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        self.control.should_save |= should_save
        ends_now = self.control.should_epoch_stop or self.control.should_training_stop
        ends_now = ends_now or (self.state.epoch is not None and float(self.state.epoch).is_integer())
        if self.control.should_save and (is_epoch_end or not ends_now):
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        # Before callbacks see the end of the training.
        best = self.state.best_model_checkpoint
        if best is None or not self.args.load_best_model_at_end:
            self._check_weights()
            self._take_average()
        self._restore_losses()
        if not (self.args.should_save and best is not None and self.args.save_total_limit == 1):
            return super()._finalize_training(trial, *args, **kwargs)
        # The Trainer would delete checkpoints in their place, and all files with a similar name.
        rotate(self._get_output_dir(trial), 1, {best})
        self.args.save_total_limit = None
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = 1

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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if self._chooses_best and self.args.load_best_model_at_end and name not in metrics:
            logger.warning_once(
                f"The evaluation computes no {name}, since no validation row has a label. The last weights are kept."
            )
            return False
        lowest = self.state.best_metric
        if self._is_tolerant() and lowest is not None and is_as_good(metrics[name], lowest):
            self.state.best_metric = min(metrics[name], lowest)
            self.state.best_global_step = self.state.global_step
            return True
        return super()._determine_best_metric(metrics, trial)

    @property
    def _chooses_best(self) -> bool:
        return isinstance(self.args, MMTrainingArguments) and self.args.chooses_best

    def _is_tolerant(self) -> bool:
        """Whether the latest of nearly equal validation losses counts as the best; see [`is_as_good`]."""
        by_loss = self.args.load_best_model_at_end and self.args.metric_for_best_model in ("loss", "eval_loss")
        return self._chooses_best and by_loss and self._average is not None and self._average.share > 0

    def _tell_verdicts(self) -> None:
        self.verdicts = with_measured(self._start.verdicts, self.state, self.args.load_best_model_at_end)
        told_later = self.study is not None and self.study.rows is not None  # on other rows, by the caller
        for verdict in self.verdicts if self.is_world_process_zero() else []:
            if not told_later:
                logger.warning(str(verdict))
            config = self.fused_model.config
            if not verdict.others_help and config.modalities and config.reads_text:
                others = " and ".join(config.modalities)
                logger.warning(f"{verdict.task}: {others} did not help on the validation rows; text alone is as good.")

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return staging_folder(folder) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        run_dir, step = self._get_output_dir(trial), self.state.global_step
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        wait = self.accelerator.wait_for_everyone
        with staged_checkpoint(run_dir, step, self.args.should_save, wait) as staged:
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
            best_step = self.state.best_global_step
            if best_step is not None:
                # As in the Trainer, but with the final place of the checkpoint.
                best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{best_step}")
                if best_step == step or os.path.exists(best):
                    self.state.best_model_checkpoint = best
            if not self.args.save_only_model:
                self._save_losses(staged)
            wait()  # each process writes its own files
            if self.args.should_save:
                # Again, because the best checkpoint has moved since this was written.
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, {folder, self.state.best_model_checkpoint or folder})

    def _save_losses(self, folder: Path) -> None:
        losses = {"loss": self._tr_loss.detach(), **self._losses.state()}
        # Each process has its own, since only their means are logged.
        gathered = self.accelerator.gather({name: loss.reshape(1) for name, loss in losses.items()})
        if self.args.should_save:
            numbers = {
                "last_logged_step": self._globalstep_last_logged,
                "total_loss": self._total_loss_scalar,
                **order_of_rows(self.train_dataset, self.args, self._train_batch_size),
            }
            save_losses(folder, gathered, numbers, self.fused_model.tasks.values())

    def _restore_losses(self) -> None:
        checkpoint, self._run.to_restore = self._run.to_restore, None
        saved = None if checkpoint is None else load_losses(checkpoint, self.args)
        if saved is None:
            return
        self._tr_loss = saved.losses["loss"]
        self._losses.load(saved.losses)
        tell_changes(saved.numbers, order_of_rows(self.train_dataset, self.args, self._train_batch_size))
        self._globalstep_last_logged = int(saved.numbers["last_logged_step"])
        self._total_loss_scalar = float(saved.numbers["total_loss"])
        self._run.knows_all_losses = True

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled and not _internal_call:
            # The stock method leaves it out if checkpoints are saved as shards of FSDP.
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

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict[str, Any]] = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with saved_aside(folder) as staged:
            card = folder / "README.md"
            if card.is_file() and not card.is_symlink():  # PEFT renews an existing card
                shutil.copy2(card, staged)
            super()._save(str(staged), state_dict)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        if self.is_world_process_zero():
            for name in (split, "all"):
                make_room_for_metrics(Path(self.args.output_dir, f"{name}_results.json"))
        super().save_metrics(split, metrics, combined)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            drop_link(os.path.join(self.args.output_dir, TRAINER_STATE_NAME))
        super().save_state()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            if self._balancing is not None:
                self._balancing.save(output_dir)
            save_starting_point(self.fused_model, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        if checkpoint is not None:
            # First, since another objective has other parameter groups, which the optimiser would reject.
            load_starting_point(self.fused_model, checkpoint)
            if self._balancing is not None:
                self._balancing.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Optional[nn.Module] = None) -> None:
        model = self.model if model is None else model
        if has_own_adapters(model):
            load_adapters(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A checkpoint with other weights does not fit this model; the Trainer would only warn.
        check_same_weights(load_result, self.accelerator.unwrap_model(self.model))

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        callbacks, is_restored = self.callback_handler.callbacks, self.args.restore_callback_states_from_checkpoint
        self._run.was_stopped_early |= restore_callbacks(callbacks, self.state, is_restored)
        for callback in callbacks:
            if isinstance(callback, TolerantEarlyStopping):
                callback.is_tolerant = self._is_tolerant  # the Trainer creates new callbacks

    # Sharing

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes the card of the model, `README.md`, into `args.output_dir`.

        In an existing card, the generated parts are renewed and a person's text stays.

        Args:
            language, license, tags, dataset_tags: For the Hub; never guessed. `dataset_tags` are ids of data sets, and
                `dataset` their names.
            model_name (`str`, *optional*): The model name in the example; the Hub id or the folder by default.
            kwargs: The other arguments of [`~transformers.Trainer.create_model_card`]; the encoders and tasks are
                known.
        """
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or model_name or self.args.hub_model_id
        write_trainer_card(
            self, self.args.output_dir, name,
            language=language, license=license, tags=tags, datasets=dataset_tags or dataset,
        )  # fmt: skip

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.push_to_hub`].

        Raises:
            ValueError: if a link in the folder would upload a file from elsewhere.
        """
        check_links(self.args.output_dir)
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._is_saving:
            return  # it uploads in the background, so the folder must be in its final place
        if self.args.hub_strategy != HubStrategy.END:
            self.create_model_card()
        prepare_push(checkpoint_folder, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Optional[list[str]] = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.refitted is not None and (eval_dataset is None or eval_dataset is self.eval_dataset):
            logger.warning(
                "The model was finally trained on these rows too (refit), so these metrics are optimistic. Evaluate "
                "other rows, or train with refit=False."
            )
            self.state.log_history[-1]["trained_on"] = True
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        self._check_finite({name: value for name, value in metrics.items() if name.endswith("_loss")}, "value")
        return metrics

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if has_length(dataloader) and len(dataloader) == 0:
            raise ValueError("The data set to evaluate or predict has no rows.")
        with clear_errors(), nullcontext() if self._average is None else self._average.applied():
            return self._evaluated(dataloader, *args, **kwargs)

    def _evaluated(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._has_evaluated = self._has_evaluated or not self._has_trained
        loss_only = kwargs.get("prediction_loss_only")
        loss_only = self.args.prediction_loss_only if loss_only is None else loss_only
        prefix, tasks = kwargs.get("metric_key_prefix", "eval"), self.fused_model.tasks
        own, own_logits, gather = self.compute_metrics, self.preprocess_logits_for_metrics, self.gather_function
        if loss_only:
            self.compute_metrics, self.preprocess_logits_for_metrics = WithLosses(self.fused_model.config), None
        elif not isinstance(own, MultiTaskMetrics) and own_logits is None:
            self.compute_metrics = WithLosses(self.fused_model.config, own)
        has_losses = isinstance(self.compute_metrics, (MultiTaskMetrics, WithLosses))
        of_pairs = [cast(PairTask, task) for task in tasks.values() if task.needs_mismatches]
        if of_pairs and self.preprocess_logits_for_metrics is None and isinstance(self.data_collator, MMDataCollator):
            self.compute_metrics = WithMismatches(
                of_pairs, dataloader.dataset, self.data_collator, self._logits_of, self.compute_metrics
            )
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = own, own_logits
            self.gather_function = gather
        losses = {name: output.metrics.get(f"{prefix}_{name}_loss") for name in tasks}
        if any(loss is not None for loss in losses.values()):
            # The stock loop reports the mean of batch means, which is not the exact mean.
            total = sum(tasks[name].loss_weight * loss for name, loss in losses.items() if loss is not None)
            output.metrics[f"{prefix}_loss"] = total + self._regularization()
        elif has_losses and isinstance(output.label_ids, Mapping):
            output.metrics.pop(f"{prefix}_loss", None)  # rows without labels have none
        self._report_bad_files()
        return output._replace(predictions=None, label_ids=None) if loss_only else output

    def _logits_of(self, rows: Any) -> dict[str, Any]:
        """The logits of rows without labels, during an evaluation."""
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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Optional[list[str]] = None,
    ) -> tuple[Any, Any, Any]:
        fused = self.fused_model
        if IS_REPEATED in inputs:
            self.gather_function = gather_once(self.accelerator, inputs.pop(IS_REPEATED))
        inputs.pop(ROWS_PER_SOURCE, None)
        references = inputs.pop("references", {})
        writes = fused.config.has_decoder and getattr(self.args, "predict_with_generate", True)
        if prediction_loss_only or not writes:
            # The loss of all rows is not the mean of the losses of batches, so it is computed from the answers.
            loss, answers, labels = super().prediction_step(model, inputs, False, ignore_keys)
            if prediction_loss_only and labels is not None:
                for name in [name for name in answers if fused.tasks[name].needs_decoder]:
                    answers[name] = {"losses": losses_of_rows(fused.tasks[name], answers[name], labels[name])}
            return loss, answers, labels
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        if self.is_fsdp_enabled:
            gather_for_method(fused, "forward_and_write")
        options = repeatable(fused, generation_options(self.args, self._generation_config, self.is_fsdp_enabled))
        # Not through the wrapped model, which otherwise sets the precision.
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            outputs, written = fused.forward_and_write(labels, options, **inputs)
            answers = with_texts(outputs.logits or {}, written, fused.tasks, labels, references)
        return None if labels is None else outputs.loss.detach(), answers, labels

    @cached_property
    def _generation_config(self) -> Optional[GenerationConfig]:
        given = getattr(self.args, "generation_config", None)
        return given if given is None else Seq2SeqTrainer.load_generation_config(given)

    def _regularization(self) -> float:
        fused = self.fused_model
        with torch.no_grad():
            return 0.0 if fused.config.regularization is None else float(fused.regularization_loss())

    def _report_bad_files(self) -> None:
        count = getattr(self.data_collator, "num_bad_files", 0)
        if count:
            logger.warning(f"Reading a file has failed {count:,} times so far; these files were treated as missing.")
