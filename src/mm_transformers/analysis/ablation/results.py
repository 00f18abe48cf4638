"""What an ablation has found, as values, tables and a figure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from ...model.tasks import Task
from ...training.card.sections import markdown_table
from ...training.metrics import task_of_metric
from .calibration import Calibration
from .views import shown_name


# The metric by which a task is told in a few words.
_MAIN_METRICS = ("accuracy", "f1_micro", "pearson", "bleu", "text_to_image_recall_at_1")


class Contribution(NamedTuple):
    """
    What the modalities contribute to one task.

    Args:
        metric: in which it is measured, such as `topic_accuracy`.
        shapley: modality -> its Shapley value; they sum to the score of all less that of none.
        perceptual: modality -> the share of the score that is lost when it is that of another row.
        score, additive: of the model, and of the nearest sum of a function of the text and one of the rest, on the same
            rows; `None` where that was not worked out. The difference is owed to interaction.
    """

    metric: str
    shapley: dict[str, float]
    perceptual: dict[str, float]
    score: Optional[float] = None
    additive: Optional[float] = None


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
            "contributions": {name: value._asdict() for name, value in self.contributions.items()},
            "calibration": {name: value._asdict() for name, value in self.calibration.items()},
            "slices": self.slices,
        }
        return _without_nan(found)

    def to_markdown(self) -> str:
        """Tables: each task in its main metric, what each modality contributes, calibration, slices."""
        parts = [self._scores_table()]
        if self.contributions:
            parts.append(self._contributions_table())
        parts += [self._slices_table(column, values) for column, values in self.slices.items()]
        return "\n\n".join(parts)

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure`: scores, contributions, reliability."""
        from .plotting import plot_ablation

        return plot_ablation(self)

    def _scores_table(self) -> str:
        rows = []
        for name in self.tasks:
            metric = main_metric(name, next(iter(self.variants.values())), self.tasks)
            if metric is not None:
                shown = [self._shown(variant, metric) for variant in self.variants]
                majority = f"{self.majority[name]:.3f}" if name in self.majority else ""
                rows.append([name, metric.removeprefix(f"{name}_").replace("_", " "), *shown, majority])
        return markdown_table(["task", "metric", *self.variants, "majority class"], rows)

    def _shown(self, variant: str, metric: str) -> str:
        value, spread = self.variants[variant].get(metric), self.spreads.get(variant, {}).get(metric)
        return "" if value is None else f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"

    def _contributions_table(self) -> str:
        names = list(next(iter(self.contributions.values())).shapley)
        rows = []
        for task, found in self.contributions.items():
            lost = [f"{100 * found.perceptual[n]:.0f}%" if n in found.perceptual else "" for n in names]
            owed = "" if found.score is None or found.additive is None else f"{found.score - found.additive:+.3f}"
            error = f"{self.calibration[task].ece:.3f}" if task in self.calibration else ""
            rows.append([task, *(f"{found.shapley[n]:+.3f}" for n in names), *lost, owed, error])
        header = [
            "task",
            *(f"Shapley value of {shown_name(n)}" for n in names),
            *(f"lost with another {shown_name(n)}" for n in names),
            "owed to interaction",
            "calibration error",
        ]
        return markdown_table(header, rows)

    def _slices_table(self, column: str, values: dict[str, dict[str, dict[str, float]]]) -> str:
        rows = []
        for value, variants in values.items():
            for task in self.tasks:
                metric = main_metric(task, variants[next(iter(variants))], self.tasks)
                if metric is not None:
                    rows.append([value, task, *(f"{m[metric]:.3f}" if metric in m else "" for m in variants.values())])
        return markdown_table([column, "task", *next(iter(values.values()))], rows)


def main_metric(task: str, measured: Mapping[str, float], tasks: Iterable[str]) -> Optional[str]:
    """The name of the metric by which a task is told; its loss if there is nothing else, `None` without any."""
    own = [name for name in measured if task_of_metric(name, tasks) == task]
    preferred = [f"{task}_{metric}" for metric in _MAIN_METRICS if f"{task}_{metric}" in own]
    others = [name for name in own if name != f"{task}_loss"]
    return next(iter([*preferred, *others, *own]), None)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
