"""An ablation as a figure."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import color_sequences, rc_context
from matplotlib.figure import Figure

from .views import shown_name


if TYPE_CHECKING:
    from .results import Ablation


_FROM_0_TO_100 = ("bleu", "chrf")


@rc_context({"text.parse_math": False})  # "$" in a name is no formula
def plot_ablation(ablation: "Ablation") -> Figure:
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
            _draw_reliability(figure.add_subplot(grid[1, column]), ablation, task)
    return figure


def _scale(metric: str) -> float:
    """What brings a metric to the scale of the others, 0 to 1."""
    return 0.01 if metric.endswith(_FROM_0_TO_100) else 1.0


def _label(metric: str) -> str:
    return metric.replace("_", " ") + (" / 100" if _scale(metric) != 1 else "")


def _draw_scores(axes: Any, ablation: "Ablation", tasks: list[str]) -> None:
    variants = list(ablation.variants)
    width = 0.8 / max(len(variants), 1)
    colors = color_sequences["tab10"]
    for number, variant in enumerate(variants):
        metrics = [ablation.contributions[task].metric for task in tasks]
        values = [ablation.variants[variant].get(metric, np.nan) * _scale(metric) for metric in metrics]
        spreads = [ablation.spreads.get(variant, {}).get(metric, 0.0) * _scale(metric) for metric in metrics]
        places = np.arange(len(tasks)) + (number - (len(variants) - 1) / 2) * width
        color = "#999999" if variant == "nothing" else colors[number % 10]
        axes.bar(places, values, width * 0.92, yerr=spreads if any(spreads) else None, label=variant, color=color)
    for place, task in enumerate(tasks):
        if task in ablation.majority:
            axes.hlines(ablation.majority[task], place - 0.45, place + 0.45, colors="black", linestyles="dotted")
    axes.set_xticks(range(len(tasks)), [_label(ablation.contributions[task].metric) for task in tasks])
    axes.set_title("with all inputs, with some, with those of other rows (dotted: majority class)", fontsize=9)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(1.0, axes.get_ylim()[1]) * 1.22)
    axes.legend(fontsize=7, ncols=len(variants), loc="upper center", columnspacing=1.0, handlelength=1.2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shapley(axes: Any, ablation: "Ablation", tasks: list[str]) -> None:
    names = list(next(iter(ablation.contributions.values())).shapley) if tasks else []
    for number, name in enumerate(names):
        found = [ablation.contributions[task] for task in tasks]
        values = [one.shapley[name] * _scale(one.metric) for one in found]
        places = np.arange(len(tasks)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.barh(places, values, 0.74 / len(names), label=shown_name(name), color=color_sequences["Set2"][number])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("Shapley value of each modality (> 0: it helps)", fontsize=9)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_reliability(axes: Any, ablation: "Ablation", task: str) -> None:
    found = ablation.calibration[task]
    used = [i for i, count in enumerate(found.counts) if count]
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    sizes = [10 + 90 * found.counts[i] / max(found.counts) for i in used]
    axes.plot([found.confidences[i] for i in used], [found.accuracies[i] for i in used], color="#1f77b4", linewidth=1)
    axes.scatter([found.confidences[i] for i in used], [found.accuracies[i] for i in used], s=sizes, color="#1f77b4")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("confidence", fontsize=8)
    axes.set_ylabel("share that is right", fontsize=8)
    axes.set_title(f"{task}: calibration error {found.ece:.3f}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
