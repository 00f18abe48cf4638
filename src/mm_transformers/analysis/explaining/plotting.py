"""Explanations as figures."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure


if TYPE_CHECKING:
    from .explanation import Explanation

_CHARACTERS_PER_LINE = 64


@rc_context({"text.parse_math": False})  # "$" in a text is no formula
def plot_explanation(explanation: "Explanation") -> Figure:
    scales = explanation.scales
    # Each picture, and beside it what of it counts.
    panels: list[Any] = []
    for image in explanation.images:
        panels += [image.image, heat_map(image.image, image.pixels * scales["vision"])]
    columns = min(max(len(panels), 1), 4)
    rows = -(-len(panels) // columns)
    lines = _lines(explanation)
    heights = [0.32 * max(len(lines), 1) + 0.1, *([3.0] * rows), *([1.2] * len(explanation.sounds))]
    # Not by pyplot, which would keep the figure open, and may have no screen.
    figure = Figure(figsize=(max(3.2 * columns, 7.2), sum(heights) + 0.8), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    told = f" (word {explanation.word!r})" if explanation.word is not None else ""
    rests_on = f"\nrests on: {explanation.rests_on}" if explanation.shares else ""
    figure.suptitle(f"{explanation.task}{told}: {_shown(explanation.answer)}{rests_on}", fontsize=12)
    _draw_text(figure.add_subplot(grid[0, :]), lines)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        axes.imshow(panel)
        axes.axis("off")
    for number, sound in enumerate(explanation.sounds):
        axes = figure.add_subplot(grid[1 + rows + number, :])
        times = (np.arange(len(sound.steps)) + 0.5) * sound.seconds / max(len(sound.steps), 1)
        axes.fill_between(times, sound.steps * scales["audio"], step="mid", color="#c0504d")
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1)
        axes.set_xlabel("seconds")
        axes.set_yticks([])
    return figure


def heat_map(image: Any, relevance: np.ndarray) -> np.ndarray:
    """
    The picture in grey under its relevance, (height, width, 3) float from 0 to 1: untouched where there is none, dark
    red where there is most.

    Args:
        relevance (height, width): from 0 to 1.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    grey = 0.25 + 0.75 * np.repeat(grey, 3, axis=2)
    strength = relevance.clip(0, 1)[..., None]
    color = colormaps["Reds"](0.5 + 0.5 * strength[..., 0])[..., :3]
    return (grey * (1 - 0.8 * strength) + color * 0.8 * strength).clip(0, 1)


def text_color(strength: float) -> tuple[str, str]:
    """Background and foreground for a word of this relevance, from 0 to 1, readable on each other."""
    background = colormaps["Reds"](0.75 * min(max(strength, 0.0), 1.0))
    # Relative luminance, as WCAG 2.2 defines it; at 0.179 black and white contrast alike, 4.6 to 1.
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3])
    is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179
    return to_hex(background), "#000000" if is_light else "#ffffff"


def strengths(explanation: "Explanation") -> list[tuple[str, float]]:
    """The words of the text with the strengths of their colours."""
    scale = explanation.scales["text"]
    return [(word.token, word.relevance * scale) for word in explanation.words]


def _lines(explanation: "Explanation") -> list[list[tuple[str, float]]]:
    lines: list[list[tuple[str, float]]] = []
    used = _CHARACTERS_PER_LINE
    for word, strength in strengths(explanation):
        word = textwrap.shorten(word, _CHARACTERS_PER_LINE, placeholder="...")
        if used + 1 + len(word) > _CHARACTERS_PER_LINE:
            lines.append([])
            used = -1
        lines[-1].append((word, strength))
        used += 1 + len(word)
    return lines


def _draw_text(axes: Any, lines: list[list[tuple[str, float]]]) -> None:
    axes.set_xlim(0, _CHARACTERS_PER_LINE)
    axes.set_ylim(max(len(lines), 1), 0)
    axes.axis("off")
    for y, line in enumerate(lines):
        x = 0
        for word, strength in line:
            background, foreground = text_color(strength)
            box = {"boxstyle": "round,pad=0.15", "facecolor": background, "edgecolor": "none"}
            # A dollar sign would begin a formula.
            word = word.replace("$", r"\$")
            axes.text(x, y + 0.5, word, family="monospace", fontsize=10, va="center", color=foreground, bbox=box)
            x += len(word) + 1


def _shown(answer: Any) -> str:
    text = f"{answer:.3g}" if isinstance(answer, float) else str(answer)
    return textwrap.shorten(text, 80, placeholder="...").replace("$", r"\$")
