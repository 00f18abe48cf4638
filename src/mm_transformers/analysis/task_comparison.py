"""The gain from joint training: each task alone against all of them together, with the same budget."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.markdown import plain_markdown
from ..model.safe_writing import write_atomically
from ..training.metrics import is_measured, less_is_better


# Name of the training on all tasks; no task can have this name.
JOINTLY = "<jointly>"

# Training -> seed -> task -> metric -> value.
Runs = dict[str, dict[str, dict[str, dict[str, float]]]]


class Comparison(NamedTuple):
    """
    One metric of one task.

    Args:
        alone, jointly: its value for each seed, in the same order.
        gain: mean over the seeds of how much better it is jointly; negative if it is worse.
        standard_error: of the gain, from the paired differences; NaN of one seed.
    """

    task: str
    metric: str
    alone: list[float]
    jointly: list[float]
    gain: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """
        Better, worse, or no clear difference.

        No clear difference: the comparison has one seed, or the gain is not significant at level 0.05 by Student's
        paired t test.
        """
        from scipy.stats import t

        num_seeds = len(self.alone)
        if num_seeds < 2 or not abs(self.gain) > t.ppf(0.975, num_seeds - 1) * self.standard_error:
            return "no clear difference"
        return "better" if self.gain > 0 else "worse"


def run_comparison(
    train_and_measure: Callable[[list[str], int], dict[str, dict[str, float]]],
    tasks: Sequence[str],
    seeds: Sequence[int],
    path: Path,
    settings: dict[str, Any],
    writes: bool = True,
) -> Runs:
    """
    Trains on each task alone and on all tasks, once per seed.

    After each training the results are written to `path`. A second call trains only what is missing.

    Args:
        train_and_measure: names of the tasks to train on, seed -> task -> metric -> value.
        settings: the settings of the trainings, to be written into the file.
        writes: whether this process writes the file; one of several does.

    Raises:
        ValueError: if there is only one task, or the file is of other settings.
    """
    if len(tasks) < 2:
        raise ValueError(f"There is only one task, {', '.join(tasks)}, so there is nothing to train jointly.")
    report = {"settings": settings, "runs": {}}
    if path.is_file():
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            is_report = _is_runs(report["runs"])
        except (ValueError, KeyError, TypeError, RecursionError):
            is_report = False
        if not is_report:
            raise ValueError(f"{path} is damaged: it holds no comparison. Remove it, or choose another output folder.")
        if report.get("settings") != json.loads(json.dumps(settings)):
            raise ValueError(
                f"{path} is the result of another comparison. Choose another output folder, or remove that file."
            )
    runs: Runs = report["runs"]
    for seed in seeds:
        for name, trained in [*((task, [task]) for task in tasks), (JOINTLY, list(tasks))]:
            if str(seed) not in runs.setdefault(name, {}):
                runs[name][str(seed)] = train_and_measure(trained, seed)
                if writes:
                    with write_atomically(path) as file:
                        file.write((json.dumps(report, indent=2) + "\n").encode())
    return runs


def _is_runs(value: Any, levels: int = 4) -> bool:
    """Whether the content of a file has the form of `Runs`."""
    if levels == 0:
        return is_measured(value)
    return isinstance(value, dict) and all(_is_runs(inner, levels - 1) for inner in value.values())


def compare(runs: Runs, seeds: Sequence[int]) -> list[Comparison]:
    """One comparison for each metric that a task has both alone and jointly, for all of the seeds."""
    found = []
    for task in (name for name in runs if name != JOINTLY):
        alone = [runs[task][str(seed)].get(task, {}) for seed in seeds]
        jointly = [runs[JOINTLY][str(seed)].get(task, {}) for seed in seeds]
        for metric in alone[0]:
            if all(metric in values for values in [*alone, *jointly]):
                first, second = [v[metric] for v in alone], [v[metric] for v in jointly]
                sign = -1.0 if less_is_better(metric) else 1.0
                differences = [sign * (b - a) for a, b in zip(first, second, strict=True)]
                error = math.nan
                if len(differences) > 1:
                    error = statistics.stdev(differences) / math.sqrt(len(differences))
                found.append(Comparison(task, metric, first, second, statistics.mean(differences), error))
    return found


def draw_comparison(path: Path, comparisons: Sequence[Comparison]) -> None:
    """One panel per metric: a dot for each seed, alone and jointly, joined, and their means."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = min(len(comparisons), 4)
    rows = math.ceil(len(comparisons) / columns)
    matplotlib.rcParams["text.parse_math"] = False  # "$" in a name must not begin a formula
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.8 * rows), layout="constrained", squeeze=False)
    colors = {"better": "#2e7d32", "worse": "#c62828", "no clear difference": "#757575"}
    for axis, comparison in zip(axes.flat, comparisons, strict=False):
        color = colors[comparison.verdict]
        for pair in zip(comparison.alone, comparison.jointly, strict=True):
            axis.plot([0, 1], pair, color=color, alpha=0.35, marker="o", markersize=4, linewidth=1)
        means = [statistics.mean(comparison.alone), statistics.mean(comparison.jointly)]
        axis.plot([0, 1], means, color=color, marker="_", markersize=22, markeredgewidth=2.5, linewidth=2)
        axis.set_xticks([0, 1], ["alone", "jointly"])
        axis.set_xlim(-0.4, 1.4)
        axis.set_title(f"{comparison.task}: {comparison.metric}\n{comparison.verdict}", fontsize=9, color=color)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(comparisons) :]:
        axis.set_visible(False)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """A table: task, metric, alone and jointly as mean ± standard deviation, gain ± standard error, verdict."""
    lines = ["| task | metric | alone | jointly | gain by joint training | |", "|---|---|--:|--:|--:|---|"]
    lines += [f"| {' | '.join(map(plain_markdown, cells))} |" for cells in map(as_cells, comparisons)]
    return "\n".join(lines) + "\n"


def as_cells(comparison: Comparison) -> list[str]:
    error = comparison.standard_error
    gain = f"{comparison.gain:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
    spreads = [_mean_and_spread(comparison.alone), _mean_and_spread(comparison.jointly)]
    return [comparison.task, comparison.metric, *spreads, gain, comparison.verdict]


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
