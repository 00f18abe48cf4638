"""
Training again on all rows: held-out rows choose how long to train, and are training rows after that.

The same is the default of scikit-learn's
[`GridSearchCV`](https://scikit-learn.org/stable/modules/generated/sklearn.model_selection.GridSearchCV.html) (`refit`).
"""

import gc
from dataclasses import replace
from typing import Any

import torch
from transformers import DefaultFlowCallback, EarlyStoppingCallback
from transformers.utils import logging

from .balancing import TaskBalancing
from .linear_models import LinearModel
from .probe_start import probes_of
from .start_average import StartAverage


logger = logging.get_logger(__name__)

# More rows gain little by the few that were held out, and a second training of them costs much.
MAX_ROWS = 2_000
# Whose callbacks report to services, which know the first training.
INTEGRATIONS = "transformers.integrations"


class Refit:
    """
    Args:
        rows: all training rows, before some were held out.
        tasks: the tasks as they were given; training decides some of their options.
    """

    def __init__(self, rows: Any, tasks: dict[str, Any]):
        self.rows = rows
        self.options = {
            name: {option: getattr(task, option) for option in task.decided_by_training} for name, task in tasks.items()
        }

    def run(self, trainer: Any, start: StartAverage, tasks: list[str]) -> dict[str, LinearModel]:
        """
        Takes the model back to its start, and trains it on all rows for as many epochs as its best weights had.

        Args:
            trainer ([`MMTrainer`]): Whose training has ended.
            start: the start of that training.
            tasks: those that started as linear models.

        Returns:
            Task -> the linear model of all rows.
        """
        args, state = trainer.args, trainer.state
        step = state.best_global_step if args.load_best_model_at_end else None
        step = state.global_step if step is None else step
        epochs = args.num_train_epochs * step / max(state.max_steps, 1)
        logger.warning(
            f"Now again from the start, on all {len(self.rows):,} training rows"
            f"{f', for {epochs:.3g} epochs' if step and args.max_steps <= 0 else f', for {step} steps'}: the held-out "
            "rows have done their work. What was measured above is the model without them. refit=False leaves this out."
        )
        self._take_back(trainer, start, tasks)
        once = {
            "num_train_epochs": epochs,
            "max_steps": step if args.max_steps > 0 and step else -1,
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
        others = (DefaultFlowCallback, EarlyStoppingCallback, TaskBalancing)
        again.callback_handler.callbacks = [
            DefaultFlowCallback(),
            *(
                callback
                for callback in trainer.callback_handler.callbacks
                if not isinstance(callback, others) and not type(callback).__module__.startswith(INTEGRATIONS)
            ),
        ]
        again.train()
        trainer.data_collator = again.data_collator  # which knows more cached features
        return again.linear_models

    def _take_back(self, trainer: Any, start: StartAverage, tasks: list[str]) -> None:
        # Otherwise each gradient would also go into the averages of the first training.
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
