"""The results of an ablation, as values, tables and a figure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from ...model.tasks import Task
from ...training.metrics import less_is_better, metric_named, task_of_metric
from ..reliability import Reliability, draw_reliability
from .encoded_rows import shown_name
from .tables import Table, as_markdown


if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Contribution(NamedTuple):
    """
    The contributions of the modalities to one task.

    Args:
        metric: of the score, such as `topic_accuracy`.
        shapley: modality -> its Shapley value, positive if it improves the answers. They sum to the gain of the score
            with all modalities over the score with none.
        perceptual: modality -> the share of the score that is lost when it comes from another row.
        score, additive: of the model, and of the nearest sum of a function of the text and one of the rest (EMAP), on
            the same rows; `None` if not computed.
        num_rows: the number of rows of these two.
        less_is_better: whether a smaller value of the metric is better.
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
        """The gain of the model over the nearest sum: the contribution of the interaction of modalities."""
        if self.score is None or self.additive is None:
            return None
        return self.additive - self.score if self.less_is_better else self.score - self.additive


@dataclass
class Ablation:
    """
    The results of an ablation.

    Args:
        variants: the inputs of the rows ("all", "text only", "without sound", "nothing", "image shuffled") -> name of a
            metric (`<task>_<metric>`) -> value; for shuffled variants, the mean.
        spreads: for shuffled variants, the standard deviation over the permutations.
        majority: task -> share of the most frequent label, for tasks that choose one of several.
        contributions: task -> the contributions of the modalities to its main metric.
        columns: task -> column of numbers or categories -> the gain of the main metric by this column: the score with
            all inputs over the score without the column, positive if it improves the answers. Of more than 30 columns,
            the 30 whose removal changes the answers most. Empty with `num_hidden_layers`.
        calibration: task -> the calibration of its answers, for tasks that choose.
        slices: column -> value -> variant -> metric -> value.
        tasks: name -> task.
        num_rows: the number of scored rows.
        num_columns: the number of columns that could be left out one by one.
    """

    variants: dict[str, dict[str, float]]
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    calibration: dict[str, Reliability] = field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    num_rows: int = 0
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    num_columns: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `None` for missing numbers."""
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
            "columns": self.columns,
            "num_columns": self.num_columns,
        }
        return _without_nan(found)

    def to_markdown(self, width: int = 80) -> str:
        """
        Tables: each task in its main metric, contributions of modalities, interaction and calibration, slices.

        Args:
            width (`int`, *optional*, defaults to 80): The longest line; further columns go to a separate table. Names
                are never cut.
        """
        parts = [as_markdown(table, width) for table in self.tables()]
        if self.note:
            parts.append(self.note)
        return "\n\n".join(parts)

    @property
    def note(self) -> str:
        """The rows on which interaction was measured, and the columns that were, if not all; "" if all were."""
        return " ".join(filter(None, (self._rows_note, self._columns_note)))

    @property
    def _columns_note(self) -> str:
        measured = max(map(len, self.columns.values()), default=0)
        if not 0 < measured < self.num_columns:
            return ""
        return (
            f"Of the {self.num_columns:,} columns, the {measured} were left out one by one whose removal changes the "
            "answers to some random rows most."
        )

    @property
    def _rows_note(self) -> str:
        counts = {found.num_rows for found in self.contributions.values() if found.interaction is not None}
        if not counts:
            return ""
        count = max(counts)
        rows = (
            f"all {count:,} rows" if count == self.num_rows else f"{count:,} of {self.num_rows:,} rows, drawn at random"
        )
        return f"The effect of interactions was measured on {rows}."

    def tables(self) -> list[Table]:
        """The tables of [`to_markdown`] as cells, of any width."""
        found = [self._scores_table()]
        if self.contributions:
            found += [self._contributions_table(), self._interactions_table()]
        if any(self.columns.values()):
            found.append(self._columns_table())
        return [*found, *(self._slices_table(column, values) for column, values in self.slices.items())]

    def plot(self) -> "Figure":
        """A `matplotlib.figure.Figure`: scores, contributions, reliability."""
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):  # "$" in a name must not begin a formula
            return _figure(self)

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
        return Table(["task", "modality", "Shapley value", "lost with the input of another row"], rows, num_keys=2)

    def _interactions_table(self) -> Table:
        rows = []
        for task, found in self.contributions.items():
            owed = "" if found.interaction is None else f"{found.interaction:+.3f}"
            error = f"{self.calibration[task].ece:.3f}" if task in self.calibration else ""
            rows.append([task, owed, error])
        return Table(["task", "effect of interactions", "calibration error"], rows, num_keys=1)

    def _columns_table(self) -> Table:
        rows = [
            [task, column, f"{gain:+.3f}"]
            for task, gains in self.columns.items()
            for column, gain in sorted(gains.items(), key=lambda item: -item[1])
        ]
        return Table(["task", "column", "gain"], rows, num_keys=2)

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
    own_task = tasks[task]
    wanted = [*([] if own_task.metrics is not None else [own_task.main_metric]), *own_task.metric_names]
    preferred = [f"{task}_{metric}" for metric in wanted if f"{task}_{metric}" in own]
    others = [name for name in own if name != f"{task}_loss"]
    return next(iter([*preferred, *others, *own]), None)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(ablation: Ablation) -> "Figure":
    from matplotlib.figure import Figure

    tasks = list(ablation.contributions)
    height = 2.6 * (1 + bool(ablation.calibration)) + 0.5
    # Not by pyplot, which would keep the figure open.
    figure = Figure(figsize=(max(9.0, 2.2 + 1.8 * len(tasks)), height), layout="constrained")
    grid = figure.add_gridspec(1 + bool(ablation.calibration), 3)
    _draw_scores(figure.add_subplot(grid[0, :2]), ablation, tasks)
    _draw_shapley(figure.add_subplot(grid[0, 2]), ablation, tasks)
    if ablation.calibration:
        shown = list(ablation.calibration)[:3]
        for column, task in enumerate(shown):
            found = ablation.calibration[task]
            title = f"{task}: calibration error {found.ece:.3f}"
            draw_reliability(figure.add_subplot(grid[1, column]), {task: found}, title)
    return figure


def _scale(metric: str) -> float:
    """The value of a metric that stands for 100%; 1 for numbers that are no shares."""
    known = metric_named(metric)
    return 1.0 if known is None or known.scale is None else known.scale


def _label(metric: str) -> str:
    return metric.replace("_", " ") + (f" / {_scale(metric):g}" if _scale(metric) != 1 else "")


def _draw_scores(axes: Any, ablation: Ablation, tasks: list[str]) -> None:
    from matplotlib import color_sequences

    variants = list(ablation.variants)
    width = 0.8 / max(len(variants), 1)
    colors = color_sequences["tab10"]
    for number, variant in enumerate(variants):
        metrics = [ablation.contributions[task].metric for task in tasks]
        values = [ablation.variants[variant].get(metric, np.nan) / _scale(metric) for metric in metrics]
        spreads = [ablation.spreads.get(variant, {}).get(metric, 0.0) / _scale(metric) for metric in metrics]
        places = np.arange(len(tasks)) + (number - (len(variants) - 1) / 2) * width
        color = "#999999" if variant == "nothing" else colors[number % 10]
        axes.bar(places, values, width * 0.92, yerr=spreads if any(spreads) else None, label=variant, color=color)
    for place, task in enumerate(tasks):
        if task in ablation.majority:
            axes.hlines(ablation.majority[task], place - 0.45, place + 0.45, colors="black", linestyles="dotted")
    axes.set_xticks(range(len(tasks)), [_label(ablation.contributions[task].metric) for task in tasks])
    axes.set_title("all inputs, some inputs, inputs of other rows (dotted: majority class)", fontsize=9)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(1.0, axes.get_ylim()[1]) * 1.22)
    axes.legend(fontsize=7, ncols=len(variants), loc="upper center", columnspacing=1.0, handlelength=1.2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shapley(axes: Any, ablation: Ablation, tasks: list[str]) -> None:
    from matplotlib import color_sequences

    names = list(next(iter(ablation.contributions.values())).shapley) if tasks else []
    for number, name in enumerate(names):
        found = [ablation.contributions[task] for task in tasks]
        values = [one.shapley[name] / _scale(one.metric) for one in found]
        places = np.arange(len(tasks)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.barh(places, values, 0.74 / len(names), label=shown_name(name), color=color_sequences["Set2"][number])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("Shapley value of each modality (> 0: it helps)", fontsize=9)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
