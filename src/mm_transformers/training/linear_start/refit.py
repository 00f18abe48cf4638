"""
Training again on all rows: held-out rows choose how long to train, and are training rows after that.

The same is the default of scikit-learn's
[`GridSearchCV`](https://scikit-learn.org/stable/modules/generated/sklearn.model_selection.GridSearchCV.html) (`refit`).
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from transformers import DefaultFlowCallback, EarlyStoppingCallback, Trainer
from transformers.utils import logging

from ...model.tasks import Task
from .linear_models import LinearModel
from .probe_start import probes_of
from .start_average import StartAverage


logger = logging.get_logger(__name__)

# Larger data sets gain little from the few held-out rows, and a second training costs much.
MAX_ROWS = 2_000
# Modules of callbacks that report to services, which have recorded the first training.
INTEGRATIONS = "transformers.integrations"


class Refit:
    """
    The second training, on all rows.

    Args:
        rows: all training rows, before some were held out.
        tasks: the tasks as given; training determines some of their options.
    """

    def __init__(self, rows: Sequence[Any], tasks: Mapping[str, Task]):
        self.rows = rows
        self.how = ""
        self.options = {
            name: {option: getattr(task, option) for option in task.decided_by_training} for name, task in tasks.items()
        }

    @classmethod
    def of(cls, trainer: Trainer, stock: type, has_own_optimizer: bool) -> Optional["Refit"]:
        """
        The second training of a trainer; `None` if there is none.

        Args:
            trainer: that of the first training, before it holds rows out.
            stock: the class [`MMTrainer`], of which the trainer may be a subclass.
            has_own_optimizer: whether the user gave the optimizer.

        Raises:
            ValueError: if a second training is requested and not possible.
        """
        wanted, kind = trainer.args.refit, type(trainer)
        why_not = None
        if has_own_optimizer:
            why_not = "the optimizer was given, but the second training needs a new one"
        elif trainer.is_deepspeed_enabled:
            why_not = "DeepSpeed cannot train a model twice"
        elif any("__init__" in vars(own) for own in kind.__mro__[: kind.__mro__.index(stock)]):
            why_not = f"{kind.__name__} has its own __init__, so the second trainer cannot be made"
        if wanted and why_not is not None:
            raise ValueError(f"refit=True is not possible: {why_not}.")
        is_default = wanted is None and len(trainer.train_dataset) <= MAX_ROWS and kind is stock
        return (
            cls(trainer.train_dataset, trainer.fused_model.tasks)
            if why_not is None and (wanted or is_default)
            else None
        )

    def run(self, trainer: Trainer, start: StartAverage, tasks: list[str]) -> dict[str, LinearModel]:
        """
        Resets the model to its start, and trains it on all rows.

        The number of epochs is that of the best weights (the number of steps, if `max_steps` is given).

        Args:
            trainer ([`MMTrainer`]): Its training has ended.
            start: the start of that training.
            tasks: the tasks that started as linear models.

        Returns:
            Task -> the linear model of all rows.
        """
        args, state = trainer.args, trainer.state
        step = state.best_global_step if args.load_best_model_at_end else None
        step = state.global_step if step is None else step
        epochs = args.num_train_epochs * step / max(state.max_steps, 1)
        by_steps = args.max_steps > 0
        length = f"{step} steps" if by_steps else f"{epochs:.3g} epoch{'' if epochs == 1 else 's'}"
        self.how = f"on all {len(self.rows):,} training rows, {length}"
        if trainer.is_world_process_zero():
            logger.warning(
                f"Training again from the start, {self.how}, because the held-out rows are no longer needed. All "
                "measurements so far are of the model without these rows. refit=False turns this off."
            )
        self._take_back(trainer, start, tasks)
        once = {
            "num_train_epochs": epochs,
            "max_steps": step if by_steps and step else -1,
            # Below 1, it is a share of all steps.
            "warmup_steps": args.warmup_steps * (step / max(state.max_steps, 1) if args.warmup_steps >= 1 else 1),
            "per_device_train_batch_size": trainer._train_batch_size,
            "auto_find_batch_size": False,
            "validation_fraction": 0.0,
            "eval_strategy": "no",
            "eval_on_start": False,
            "do_eval": False,
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "greater_is_better": None,
            "early_stopping_patience": 0,
            "tune_thresholds": False,
            "push_to_hub": False,
            "report_to": [],
        }
        again = type(trainer)(
            model=trainer.model,
            args=replace(args, **once),
            data_collator=trainer.data_collator,
            train_dataset=self.rows,
            processing_class=trainer.processing_class,
            compute_metrics=trainer.compute_metrics,
            feature_cache=trainer.feature_cache,
        )
        again.callback_handler.callbacks = [
            DefaultFlowCallback(),
            *(
                callback
                for callback in trainer.callback_handler.callbacks
                if not isinstance(callback, (DefaultFlowCallback, EarlyStoppingCallback))
                and not type(callback).__module__.startswith(INTEGRATIONS)
            ),
        ]
        again.train()
        if again.state.global_step < again.state.max_steps:
            logger.warning(
                f"A callback stopped this second training after {again.state.global_step} of {again.state.max_steps} "
                "steps; refit=False turns the second training off."
            )
        trainer.data_collator = again.data_collator  # it has more cached features
        return again.linear_models

    def _take_back(self, trainer: Trainer, start: StartAverage, tasks: list[str]) -> None:
        # Otherwise the moments of the first training would use memory, and each gradient would also enter the
        # averages of its processes.
        trainer.optimizer = trainer.lr_scheduler = None
        handler = trainer.callback_handler
        handler.optimizer = handler.lr_scheduler = handler.train_dataloader = None
        trainer.stop_balancing()
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
        gc.collect()
        start.begin_anew()
        probes = probes_of(start.model)
        for name in tasks:
            for probe in probes[name]:
                torch.nn.init.zeros_(probe.linear.weight)
                torch.nn.init.zeros_(probe.linear.bias)
        for name, options in self.options.items():
            for option, value in options.items():
                setattr(trainer.fused_model.tasks[name], option, value)
