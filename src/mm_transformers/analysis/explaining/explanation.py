"""The explanation of an answer: relevances at their places in the row."""

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from ...model.label_cells import as_scalar
from ..ablation.encoded_rows import shown_name
from .colors import heat_map, text_color


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHARACTERS_PER_LINE = 64


class TokenRelevance(NamedTuple):
    """
    The relevance of one token of the text.

    Args:
        token: the piece of the text, or the name of a special token.
        start, end: its place in the text; equal for special tokens.
        relevance: >= 0; with "integrated_gradients" negative for evidence against the answer.
    """

    token: str
    start: int
    end: int
    relevance: float


@dataclass
class ImageRelevance:
    """
    The relevance of one picture.

    Args:
        image (`PIL.Image.Image`): The picture, or a frame of a video.
        patches (`np.ndarray` of shape `(rows, columns)`, float32): Relevance of each patch.
        pixels (`np.ndarray` of shape `(height, width)`, float32):
            Relevance of the picture's own pixels, linear between the centres of patches; 0 where the image processor
            crops the picture.
    """

    image: Any
    patches: np.ndarray
    pixels: np.ndarray

    def box_share(self, box: tuple[float, float, float, float]) -> float:
        """The share of the relevance within left, top, right, bottom (in pixels); 0 without any relevance."""
        left, top, right, bottom = (round(edge) for edge in box)
        positive = self.pixels.clip(min=0)
        return float(positive[top:bottom, left:right].sum() / positive.sum()) if positive.any() else 0.0

    def peak(self) -> tuple[int, int]:
        """The pixel (x, y) at the centre of the most relevant patch."""
        y, x = np.unravel_index(self.pixels.argmax(), self.pixels.shape)
        return int(x), int(y)


@dataclass
class SoundRelevance:
    """
    The relevance of one clip.

    Args:
        seconds (`float`): The length of the clip.
        steps (`np.ndarray` of shape `(steps,)`, float32): Relevance of its parts, all of equal length.
    """

    seconds: float
    steps: np.ndarray


class ColumnRelevance(NamedTuple):
    """
    A column of numbers or categories, and its relevance.

    Args:
        name (`str`): The name of the column.
        value: the cell of the row.
        relevance (`float`): Its relevance.
    """

    name: str
    value: Any
    relevance: float


@dataclass
class Explanation:
    """
    The parts of a row that an answer depends on, by one method.

    Attention and gradients are not causes: see [`faithfulness`].

    Args:
        task, answer: the task, and its answer that is explained (a label, a number, a text).
        score (`float`): The score of the answer, before any softmax.
        method (`str`): The method of the explanation.
        text (`str`): That of the row.
        tokens (`list[TokenRelevance]`): One per token of the text, in order; empty without a text.
        images (`list[ImageRelevance]`): One per picture, then one per frame of the video.
        sounds (`list[SoundRelevance]`): One per clip.
        word (`str`, *optional*): The explained word: of the text, or of the written answer.
        columns (`list[ColumnRelevance]`): One per column of numbers and categories, without empty cells.
        shares (`dict[str, float]`): "text", "vision", "audio", "table" -> its Shapley value for the score, as a share
            of the sum of their sizes. Blank texts, pictures, sounds or columns replace a removed modality. All are 0 if
            the score depends on nothing.
    """

    task: str
    answer: Any
    score: float
    method: str
    text: str
    tokens: list[TokenRelevance] = field(default_factory=list)
    images: list[ImageRelevance] = field(default_factory=list)
    sounds: list[SoundRelevance] = field(default_factory=list)
    word: Optional[str] = None
    shares: dict[str, float] = field(default_factory=dict)
    columns: list[ColumnRelevance] = field(default_factory=list)

    @property
    def rests_on(self) -> str:
        """The shares in words, such as "text 78%, image 22%"."""
        return ", ".join(f"{shown_name(name)} {100 * share:.0f}%" for name, share in self.shares.items())

    @property
    def scales(self) -> dict[str, float]:
        """
        Modality -> the factor that turns its relevances (of words, pixels, steps) into strengths of colour.

        The strength is 1 at the most relevant part of the modality with the largest share. Modalities with a small
        share are pale.
        """
        relevances = {
            "text": [word.relevance for word in self.words],
            "vision": [float(image.pixels.max(initial=0)) for image in self.images],
            "audio": [float(sound.steps.max(initial=0)) for sound in self.sounds],
            "table": [column.relevance for column in self.columns],
        }
        largest = max(self.shares.values(), default=0.0)
        found = {}
        for name, values in relevances.items():
            highest = max([*values, 0.0])
            share = self.shares.get(name, 0.0) / largest if largest > 0 else 0.0
            found[name] = share / highest if highest > 0 else 0.0
        return found

    @property
    def words(self) -> list[TokenRelevance]:
        """The relevance of each word: the sum over its tokens."""
        from ...model.task_token_classification import split_words

        return [
            TokenRelevance(
                self.text[start:end],
                start,
                end,
                sum(t.relevance for t in self.tokens if t.start < t.end and t.start < end and t.end > start),
            )
            for start, end in split_words(self.text)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without pictures, but with their patches."""
        return {
            "task": self.task,
            "answer": self.answer,
            "word": self.word,
            "score": self.score,
            "method": self.method,
            "shares": dict(self.shares),
            "text": self.text,
            "tokens": [token._asdict() for token in self.tokens],
            "images": [image.patches.tolist() for image in self.images],
            "sounds": [{"seconds": s.seconds, "steps": s.steps.tolist()} for s in self.sounds],
            "columns": [{**c._asdict(), "value": str(as_scalar(c.value))} for c in self.columns],
        }

    def plot(self) -> "Figure":
        """A `matplotlib.figure.Figure`: the text coloured by relevance, heat maps over pictures, curves of sounds."""
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):  # "$" in a text must not begin a formula
            return _figure(self)


def _figure(explanation: Explanation) -> "Figure":
    from matplotlib.figure import Figure

    scales = explanation.scales
    # Each picture, and beside it its heat map.
    panels: list[Any] = []
    for image in explanation.images:
        panels += [image.image, heat_map(image.image, image.pixels * scales["vision"])]
    columns = min(max(len(panels), 1), 4)
    rows = -(-len(panels) // columns)
    lines = _lines(explanation)
    heights = [0.32 * max(len(lines), 1) + 0.1, *([3.0] * rows), *([1.2] * len(explanation.sounds))]
    # Not by pyplot, which would keep the figure open, and may need a screen.
    figure = Figure(figsize=(max(3.2 * columns, 7.2), sum(heights) + 0.8), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    told = f" (word {explanation.word!r})" if explanation.word is not None else ""
    rests_on = f"\ndepends on: {explanation.rests_on}" if explanation.shares else ""
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


def strengths(explanation: Explanation) -> list[tuple[str, float]]:
    """The words of the text, and the columns, with the strengths of their colours."""
    scales = explanation.scales
    words = [(word.token, word.relevance * scales["text"]) for word in explanation.words]
    return words + [(f"{c.name}: {as_scalar(c.value)}", c.relevance * scales["table"]) for c in explanation.columns]


def _lines(explanation: Explanation) -> list[list[tuple[str, float]]]:
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
