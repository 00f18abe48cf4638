"""Compares a trained model with simple models on held-out rows: one line per task."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Optional

import torch
from transformers import TrainerState

from ...model.task_base import Task
from ..metrics import headline, is_known_error, metric_named, result_names


@dataclass
class Verdict:
    """
    The scores of one task on held-out rows.

    Args:
        task: its name.
        metric: the name of its first metric; all numbers below are of this metric.
        linear: the linear model with which the task started.
        text_alone: a linear model of the text alone; `None` if the model reads no texts.
        majority: a constant answer: the most frequent label, or the mean of the training rows.
        num_rows: the number of labelled held-out rows (or words).
        model: the trained model, with the kept weights. `None` if it was not measured.
        kept_start: whether the start is kept, since no trained weights were better.
        rows: which rows: "validation", "test" or "out-of-fold".
    """

    task: str
    metric: str
    linear: float
    text_alone: Optional[float]
    majority: float
    num_rows: int
    model: Optional[float] = None
    kept_start: bool = False
    rows: str = "validation"

    @property
    def less_is_better(self) -> bool:
        return is_known_error(self.metric)

    @property
    def gain(self) -> float:
        """The gain of the model over the linear start; negative if it is worse."""
        assert self.model is not None
        return (self.linear - self.model) if self.less_is_better else (self.model - self.linear)

    @property
    def others_help(self) -> bool:
        """Whether model or start is better than a linear model of the text alone."""
        if self.text_alone is None:
            return True
        known = [self.linear, *([] if self.model is None else [self.model])]
        return min(known) < self.text_alone if self.less_is_better else max(known) > self.text_alone

    def shown(self, value: Optional[float]) -> str:
        """A score as people read it: shares in percent."""
        return shown_score(self.metric, value)

    def __str__(self) -> str:
        alone = "" if self.text_alone is None else f"text alone {self.shown(self.text_alone)}, "
        line = (
            f"{self.task}: {self.shown(self.model)} {self.metric} on {self.num_rows:,} {self.rows} labels (linear "
            f"start {self.shown(self.linear)}, {alone}majority {self.shown(self.majority)})"
        )
        return f"{line}; {self.note}" if self.note else line

    @property
    def note(self) -> str:
        """What is to say of a task that training did not improve."""
        if self.kept_start:
            return "no trained weights were better than the linear start, so the start is kept"
        return "this task ended below its linear start" if self.model is not None and self.gain < 0 else ""


def shown_score(metric: str, value: Optional[float]) -> str:
    """A score of a metric as people read it: shares in percent."""
    if value is None:
        return "not measured"
    known = metric_named(metric)
    scale = None if is_known_error(metric) else 1.0
    scale = scale if known is None else known.scale
    return f"{value:.4g}" if scale is None else f"{100 * value / scale:.1f}"


def verdict_of(
    task: Task,
    labels: torch.Tensor,
    linear: torch.Tensor,
    text_alone: Optional[torch.Tensor],
    majority: torch.Tensor,
) -> Optional[Verdict]:
    """
    The scores of the simple models of a task.

    Args:
        labels: of the validation rows (or words), none missing.
        linear, text_alone, majority: the logits of the simple models for them.

    Returns:
        `None` if the task has no metric, or no label.
    """
    if len(labels) == 0 or not task.metric_names:
        return None

    def score(logits: torch.Tensor) -> float:
        return headline(task, logits, labels)

    alone = None if text_alone is None else score(text_alone)
    return Verdict(task.name, result_names(task)[0], score(linear), alone, score(majority), len(labels))


def with_measured(verdicts: Mapping[str, Verdict], state: TrainerState, has_best: bool) -> list[Verdict]:
    """
    The verdicts with the scores of the trained model.

    Args:
        verdicts: task -> the scores at the start.
        state: of the training that has ended.
        has_best: whether the weights of the best step are kept, not those of the last one.
    """
    best = state.best_global_step
    step = best if best is not None and has_best else state.global_step
    measured = [entry for entry in state.log_history if "eval_loss" in entry]
    values: dict[str, float] = next((entry for entry in reversed(measured) if entry["step"] == step), {})
    return [
        replace(verdict, model=values.get(f"eval_{name}_{verdict.metric}"), kept_start=best == 0)
        for name, verdict in verdicts.items()
    ]
