"""What an ablation has found, as values, tables and a figure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from ...model.tasks import Task
from ...training.metrics import less_is_better, task_of_metric
from .calibration import Calibration
from .tables import Table, as_markdown
from .views import shown_name


# The metric by which a task is told in a few words; otherwise its first.


class Contribution(NamedTuple):
    """
    What the modalities contribute to one task.

    Args:
        metric: in which it is measured, such as `topic_accuracy`.
        shapley: modality -> its Shapley value, more than 0 where it makes the answers better. They sum to how much
            better the score with all is than that with none.
        perceptual: modality -> the share of the score that is lost when it is that of another row.
        score, additive: of the model, and of the nearest sum of a function of the text and one of the rest (EMAP), on
            the same rows; `None` where that was not worked out.
        num_rows: how many rows these two are of.
        less_is_better: whether a smaller value of the metric is a better one.
    """

    metric: str
    shapley: dict[str, float]
    perceptual: dict[str, float]
    score: Optional[float] = None
    additive: Optional[float] = None
    num_rows: int = 0
    less_is_better: bool = False

    @property
    def interaction(self) -> Optional[float]:
        """How much better the model is than the nearest sum: what it owes to the interaction of its modalities."""
        if self.score is None or self.additive is None:
            return None
        return self.additive - self.score if self.less_is_better else self.score - self.additive


@dataclass
class Ablation:
    """
    Args:
        variants: what the rows were given ("all", "text only", "without sound", "nothing", "image shuffled") -> name of
            a metric (`<task>_<metric>`) -> value; of what was shuffled, the mean.
        spreads: of what was shuffled, the standard deviation over the permutations.
        majority: task -> share of the most frequent label, for tasks that choose one of several.
        contributions: task -> what each modality contributes to its main metric.
        calibration: task -> how sure and how right answers are, of tasks that choose.
        slices: column -> value -> variant -> metric -> value.
        tasks: name -> task.
        num_rows: that were scored.
    """

    variants: dict[str, dict[str, float]]
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    num_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `None` where there is no number."""
        found = {
            "num_rows": self.num_rows,
            "variants": self.variants,
            "spreads": self.spreads,
            "majority_class_accuracy": self.majority,
            "contributions": {
                name: {**value._asdict(), "interaction": value.interaction}
                for name, value in self.contributions.items()
            },
            "calibration": {name: value._asdict() for name, value in self.calibration.items()},
            "slices": self.slices,
        }
        return _without_nan(found)

    def to_markdown(self, width: int = 80) -> str:
        """
        Tables: each task in its main metric, what each modality contributes, interaction and calibration, slices.

        Args:
            width (`int`, *optional*, defaults to 80): Columns that would make a line longer than this go to a table of
                their own. A name is never cut.
        """
        parts = [as_markdown(table, width) for table in self.tables()]
        if self.note:
            parts.append(self.note)
        return "\n\n".join(parts)

    @property
    def note(self) -> str:
        """On which rows interaction was measured, in a sentence; "" where it was not."""
        counts = {found.num_rows for found in self.contributions.values() if found.interaction is not None}
        if not counts:
            return ""
        count = max(counts)
        rows = (
            f"all {count:,} rows" if count == self.num_rows else f"{count:,} of {self.num_rows:,} rows, drawn at random"
        )
        return f"What is owed to interaction was measured on {rows}."

    def tables(self) -> list[Table]:
        """The same as cells, of any width."""
        found = [self._scores_table()]
        if self.contributions:
            found += [self._contributions_table(), self._interactions_table()]
        return [*found, *(self._slices_table(column, values) for column, values in self.slices.items())]

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure`: scores, contributions, reliability."""
        from .plotting import plot_ablation

        return plot_ablation(self)

    def _scores_table(self) -> Table:
        rows = []
        for name in self.tasks:
            metric = main_metric(name, next(iter(self.variants.values())), self.tasks)
            if metric is not None:
                shown = [self._shown(variant, metric) for variant in self.variants]
                majority = f"{self.majority[name]:.3f}" if name in self.majority else ""
                rows.append([name, self._metric_name(name, metric), *shown, majority])
        return Table(["task", "metric", *self.variants, "majority class"], rows, num_keys=2)

    def _metric_name(self, task: str, metric: str) -> str:
        found = self.contributions.get(task)
        less = less_is_better(metric) if found is None else found.less_is_better
        return metric.removeprefix(f"{task}_").replace("_", " ") + (" (less is better)" if less else "")

    def _shown(self, variant: str, metric: str) -> str:
        value, spread = self.variants[variant].get(metric), self.spreads.get(variant, {}).get(metric)
        return "" if value is None else f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"

    def _contributions_table(self) -> Table:
        rows = []
        for task, found in self.contributions.items():
            for name, value in found.shapley.items():
                lost = f"{100 * found.perceptual[name]:.0f}%" if name in found.perceptual else ""
                rows.append([task, shown_name(name), f"{value:+.3f}", lost])
        return Table(["task", "modality", "Shapley value", "lost with that of another row"], rows, num_keys=2)

    def _interactions_table(self) -> Table:
        rows = []
        for task, found in self.contributions.items():
            owed = "" if found.interaction is None else f"{found.interaction:+.3f}"
            error = f"{self.calibration[task].ece:.3f}" if task in self.calibration else ""
            rows.append([task, owed, error])
        return Table(["task", "owed to interaction", "calibration error"], rows, num_keys=1)

    def _slices_table(self, column: str, values: dict[str, dict[str, dict[str, float]]]) -> Table:
        rows = []
        for value, variants in values.items():
            for task in self.tasks:
                metric = main_metric(task, variants[next(iter(variants))], self.tasks)
                if metric is not None:
                    rows.append([value, task, *(f"{m[metric]:.3f}" if metric in m else "" for m in variants.values())])
        return Table([column, "task", *next(iter(values.values()))], rows, num_keys=2)


def main_metric(task: str, measured: Mapping[str, float], tasks: Mapping[str, Task]) -> Optional[str]:
    """
    The name of a task's main metric among the measured ones; its loss if there is no other, `None` without any.

    Args:
        task: the name of the task.
        measured: `{task}_{metric}` -> value.
        tasks: name -> task, of the whole model.
    """
    own = [name for name in measured if task_of_metric(name, tasks) == task]
    wanted = [tasks[task].main_metric, *tasks[task].default_metrics]
    preferred = [f"{task}_{metric}" for metric in wanted if f"{task}_{metric}" in own]
    others = [name for name in own if name != f"{task}_loss"]
    return next(iter([*preferred, *others, *own]), None)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
