"""What explains an answer: relevances in the places of the row that they belong to."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import numpy as np

from ..ablation.views import shown_name


class TokenRelevance(NamedTuple):
    """
    Args:
        token: the piece of the text, or the name of a special token.
        start, end: where it is in the text; equal for special tokens.
        relevance: >= 0; with "integrated_gradients" less where it speaks against the answer.
    """

    token: str
    start: int
    end: int
    relevance: float


@dataclass
class ImageRelevance:
    """
    Args:
        image (`PIL.Image.Image`): The picture, or a frame of a video.
        patches (`np.ndarray` of shape `(rows, columns)`, float32): Relevance of each patch.
        pixels (`np.ndarray` of shape `(height, width)`, float32):
            The same for the picture's own pixels, linear between the middles of patches; 0 where the image processor
            cuts the picture off.
    """

    image: Any
    patches: np.ndarray
    pixels: np.ndarray

    def box_share(self, box: tuple[float, float, float, float]) -> float:
        """Which share of the relevance lies within left, top, right, bottom (in pixels); 0 if there is none."""
        left, top, right, bottom = (round(edge) for edge in box)
        positive = self.pixels.clip(min=0)
        return float(positive[top:bottom, left:right].sum() / positive.sum()) if positive.any() else 0.0

    def peak(self) -> tuple[int, int]:
        """The pixel (x, y) in the middle of the most relevant patch."""
        y, x = np.unravel_index(self.pixels.argmax(), self.pixels.shape)
        return int(x), int(y)


@dataclass
class SoundRelevance:
    """
    Args:
        seconds (`float`): How long the clip is.
        steps (`np.ndarray` of shape `(steps,)`, float32): Relevance of equally long parts of it.
    """

    seconds: float
    steps: np.ndarray


@dataclass
class Explanation:
    """
    Which parts of a row an answer rests on, as one method sees it. Attention, and gradients, are not causes: see
    [`faithfulness`].

    Args:
        task, answer: what is explained: the answer (a label, a number, a text), and of which task.
        score (`float`): How much the model speaks for the answer, before any softmax.
        method (`str`): How the relevances were found.
        text (`str`): That of the row.
        tokens (`list[TokenRelevance]`): One per token of the text, in order; none if there is no text.
        images (`list[ImageRelevance]`): One per picture, then one per frame of the video.
        sounds (`list[SoundRelevance]`): One per clip.
        word (`str`, *optional*): The word whose label, or which in the written answer, is explained.
        shares (`dict[str, float]`): "text", "vision", "audio" -> how much of the answer rests on it: its Shapley value
            for the score, with blank texts, pictures or sounds in the place of what is left out, as a share of the sum
            of their sizes. All are 0 if the score depends on nothing.
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

    @property
    def rests_on(self) -> str:
        """The shares in words, such as "text 78%, image 22%"."""
        return ", ".join(f"{shown_name(name)} {100 * share:.0f}%" for name, share in self.shares.items())

    @property
    def scales(self) -> dict[str, float]:
        """
        Modality -> what its relevances (of words, pixels, steps) are multiplied with to be strengths of colour: 1 at
        the most relevant part of the modality on which most rests, and pale in a modality on which little rests.
        """
        relevances = {
            "text": [word.relevance for word in self.words],
            "vision": [float(image.pixels.max(initial=0)) for image in self.images],
            "audio": [float(sound.steps.max(initial=0)) for sound in self.sounds],
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
        """The same per word: the sum of the relevances of its tokens."""
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
        """Plain values, for JSON; pictures are left out, their patches are not."""
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
        }

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure`: the text coloured by relevance, heat maps over pictures, curves of sounds."""
        from .plotting import plot_explanation

        return plot_explanation(self)
