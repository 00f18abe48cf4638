"""The picture of the demo: accuracy during training, final accuracy, and some test rows with their answers."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLORS = {
    "fused": "#2a7f62", "text only": "#3b6fb5", "image only": "#d98324", "shuffled pictures": "#9a9a9a",
    "no picture": "#c9c9c9",
}  # fmt: skip
CURVES = {"sentiment": "accuracy", "topic": "accuracy", "german": "exact_match"}


def draw_results(
    path: Path,
    results: dict[str, dict[str, float]],
    histories: dict[str, list[dict[str, Any]]],
    cards: list[dict[str, Any]],
) -> None:
    """
    Draws the results of the demo.

    Args:
        path: of the PNG.
        results: task -> column -> accuracy.
        histories: model -> `trainer.state.log_history`.
        cards: "text", "image" (PIL) and "answers", task -> (answer, truth).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), facecolor="white", layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    top, bottom = halves
    axes = top.subplots(1, 4, width_ratios=[1, 1, 1, 1.9])
    for axis, task in zip(axes[:3], CURVES, strict=True):
        _draw_curves(axis, task, results[task], histories)
    _draw_bars(axes[3], results)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axis.set_axisbelow(True)
    for axis, card in zip(bottom.subplots(1, len(cards)), cards, strict=True):
        _draw_card(axis, card)
    figure.savefig(path, dpi=110)


def _draw_curves(axis: "Axes", task: str, row: dict[str, float], histories: dict[str, list[dict[str, Any]]]) -> None:
    key = f"eval_{task}_{CURVES[task]}"
    for name, history in histories.items():
        points = [(entry["step"], 100 * entry[key]) for entry in history if key in entry]
        axis.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", markersize=3, linewidth=2, label=name)
    for part, name in (("text", "text only"), ("image", "image only")):
        axis.axhline(100 * row[f"best from {part}"], color=COLORS[name], linestyle=":", linewidth=1.3)
    axis.plot([], [], color="#777777", linestyle=":", label="best possible")
    measure = CURVES[task].replace("_", " ")
    axis.set(title=f"{task}: validation {measure} (%)", xlabel="optimiser steps", ylim=(0, 103))
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_bars(axis: "Axes", results: dict[str, dict[str, float]]) -> None:
    width = 0.165
    for i, (name, color) in enumerate(COLORS.items()):
        positions = [x + (i - 2) * width for x in range(len(results))]
        values = [100 * row[name] for row in results.values()]
        axis.bar(positions, values, width * 0.92, color=color, label=name)
        for x, value in zip(positions, values, strict=True):
            axis.text(x, value + 1, f"{value:.0f}", ha="center", fontsize=7, color="#444444")
        if name.endswith("only"):
            best = [100 * row[f"best from {name.split()[0]}"] for row in results.values()]
            for x, value in zip(positions, best, strict=True):
                axis.plot([x - width / 2, x + width / 2], [value] * 2, color="black", linewidth=1.2, linestyle=":")
    axis.set(title="test accuracy (%), translations: exact match", ylim=(0, 118), xticks=range(len(results)))
    axis.set_xticklabels(list(results))
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def _draw_card(axis: "Axes", card: dict[str, Any]) -> None:
    axis.imshow(card["image"])
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#cccccc")
    axis.set_title("\n".join(textwrap.wrap(card["text"], 27)), fontsize=9, color="#222222")
    for i, (task, (answer, truth)) in enumerate(card["answers"].items()):
        right = answer == truth
        text = f"{task}: {answer}" + ("" if right else f" (is {truth})")
        axis.text(
            0.5, -0.05 - 0.095 * i, text, transform=axis.transAxes, ha="center", va="top", fontsize=9,
            color="#2a7f62" if right else "#c0392b", weight="bold",
        )  # fmt: skip
