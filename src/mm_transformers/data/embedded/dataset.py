"""The embedded data set: short English messages with a picture, drawn on the spot, nothing downloaded.

Each row has five factors. The text shows `word`, `remark` and `intent`; the picture shows `place` and `state`.

- **topic** needs both parts. The message names an ambiguous word, and the place decides its sense: a *crane* is a bird
  in nature and a machine in town. In each place half of the words have one topic, half another.
- **sentiment** needs both parts. A cheerful remark is positive over a fine picture, and negative (sarcasm) over a
  ruined one. A gloomy remark is negative over a ruined picture, and neutral (mere grumbling) over a fine one. A factual
  remark is always neutral.
- **intent** needs the text alone: statement, question or request.
- **german** and **french** are translations of the gist of the message. The text gives the sentence and the word, and
  the place decides the noun (*crane*: "Das ist der Kranich." or "Das ist der Kran.").

`GRID` lists every combination of factors with its multiplicity, and rows cycle through it in shuffled order.
`best_possible_accuracy` counts over the same list, so the limits of text alone and of image alone are exact.

The validation and test splits are made of minimal pairs. One pass over the grid shows each message once with each kind
of picture: nature and town, fine and ruined. It shows each drawing with all four remarks and with four words, two of
each topic of its place. So no model that sees one part only can beat its limit, not even by chance (on whole passes,
for sentiment and topic). The test split also has wordings and drawings that never appear in training.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from .drawing import draw_picture, drawing_variants, encode_png
from .wording import write_message


if TYPE_CHECKING:
    import datasets

TASK_LABELS: dict[str, list[str]] = {
    "sentiment": ["negative", "neutral", "positive"],
    "topic": ["animals", "money", "nature", "technology"],
    "intent": ["statement", "question", "request"],
}


# The gist of a message in other languages: intent -> the sentence for a noun, which may begin it.
TRANSLATIONS: dict[str, dict[str, str]] = {
    "german": {"statement": "Das ist {}.", "question": "Ist das {}?", "request": "{}, bitte."},
    "french": {"statement": "C'est {}.", "question": "Est-ce {} ?", "request": "{}, s'il vous plaît."},
}


class Sense(NamedTuple):
    """One sense of an ambiguous word: its topic, and the noun (with its article) that translates it."""

    topic: str
    german: str
    french: str


# word -> place -> sense. In each run of four, half of the words have one topic of the place, and half the other.
SENSES: dict[str, dict[str, Sense]] = {
    "bill": {
        "nature": Sense("animals", "der Schnabel", "le bec"),
        "town": Sense("money", "die Rechnung", "la facture"),
    },
    "crane": {
        "nature": Sense("animals", "der Kranich", "la grue"),
        "town": Sense("technology", "der Kran", "la grue"),
    },
    "bank": {
        "nature": Sense("nature", "das Ufer", "la rive"),
        "town": Sense("money", "die Bank", "la banque"),
    },
    "bulb": {
        "nature": Sense("nature", "die Blumenzwiebel", "le bulbe"),
        "town": Sense("technology", "die Glühbirne", "l'ampoule"),
    },
    "stock": {
        "nature": Sense("animals", "das Vieh", "le bétail"),
        "town": Sense("money", "die Aktie", "l'action"),
    },
    "bug": {
        "nature": Sense("animals", "der Käfer", "l'insecte"),
        "town": Sense("technology", "der Softwarefehler", "le bogue"),
    },
    "branch": {
        "nature": Sense("nature", "der Ast", "la branche"),
        "town": Sense("money", "die Filiale", "la succursale"),
    },
    "range": {
        "nature": Sense("nature", "die Bergkette", "la chaîne de montagnes"),
        "town": Sense("technology", "der Herd", "la cuisinière"),
    },
    "buck": {
        "nature": Sense("animals", "der Rehbock", "le chevreuil"),
        "town": Sense("money", "der Dollar", "le dollar"),
    },
    "web": {
        "nature": Sense("animals", "das Spinnennetz", "la toile d'araignée"),
        "town": Sense("technology", "das Internet", "le web"),
    },
    "mint": {
        "nature": Sense("nature", "die Minze", "la menthe"),
        "town": Sense("money", "die Münzanstalt", "l'hôtel de la monnaie"),
    },
    "plant": {
        "nature": Sense("nature", "die Pflanze", "la plante"),
        "town": Sense("technology", "das Werk", "l'usine"),
    },
}
WORDS = tuple(SENSES)
# The possible scenes of each place.
SETTINGS: dict[str, tuple[str, ...]] = {"nature": ("forest", "lake", "field"), "town": ("street", "desk", "kitchen")}
# Cheerful remarks come twice as often, since all positive messages need them and would otherwise be rare.
REMARK_SLOTS = ("cheerful", "cheerful", "gloomy", "factual")
STATES = ("fine", "ruined")
SENTIMENTS: dict[tuple[str, str], str] = {
    ("cheerful", "fine"): "positive",
    ("cheerful", "ruined"): "negative",
    ("gloomy", "fine"): "neutral",
    ("gloomy", "ruined"): "negative",
    ("factual", "fine"): "neutral",
    ("factual", "ruined"): "neutral",
}


@dataclass(frozen=True)
class Cell:
    """One combination of the factors; all cells of `GRID` are equally likely.

    `slot` indexes `REMARK_SLOTS`.
    """

    word: str
    slot: int
    intent: str
    place: str
    state: str

    @property
    def remark(self) -> str:
        return REMARK_SLOTS[self.slot]

    @property
    def sense(self) -> Sense:
        return SENSES[self.word][self.place]

    @property
    def labels(self) -> dict[str, str]:
        return {
            "sentiment": SENTIMENTS[self.remark, self.state],
            "topic": self.sense.topic,
            "intent": self.intent,
            **{language: self.translate(language) for language in TRANSLATIONS},
        }

    def translate(self, language: str) -> str:
        """The gist of the message: the statement, question or request, with the noun that the picture decides."""
        sentence = TRANSLATIONS[language][self.intent].format(getattr(self.sense, language))
        return sentence[0].upper() + sentence[1:]

    @property
    def text_factors(self) -> tuple[str, str, str]:
        """All information in the message."""
        return self.word, self.remark, self.intent

    @property
    def image_factors(self) -> tuple[str, str]:
        """All information in the picture."""
        return self.place, self.state


GRID: tuple[Cell, ...] = tuple(
    Cell(word, slot, intent, place, state)
    for word, slot, intent, place, state in product(
        WORDS, range(len(REMARK_SLOTS)), TASK_LABELS["intent"], SETTINGS, STATES
    )
)


def bayes_accuracy(cells: list[Cell] | tuple[Cell, ...], task: str, known: Callable[[Cell], Hashable]) -> float:
    """The accuracy of the best guess from `known(cell)` alone, over the cells."""
    seen: dict[Hashable, Counter[str]] = {}
    for cell in cells:
        seen.setdefault(known(cell), Counter())[cell.labels[task]] += 1
    return sum(max(counts.values()) for counts in seen.values()) / len(cells)


def best_possible_accuracy() -> dict[str, dict[str, float]]:
    """
    The best possible accuracy of any model from each part, per task, counted over the whole grid.

    Returns:
        task -> {"text": ..., "image": ..., "both": ..., "majority": ...}. Each is the accuracy of the Bayes-optimal
            guess: from the message alone, from the picture alone, from both, and from neither. The tasks are those of
            `TASK_LABELS` and the languages. For languages the accuracy is the share of exact matches.
    """
    views: dict[str, Callable[[Cell], Hashable]] = {
        "text": lambda cell: cell.text_factors,
        "image": lambda cell: cell.image_factors,
        "both": lambda cell: (cell.text_factors, cell.image_factors),
        "majority": lambda cell: None,
    }
    return {task: {view: bayes_accuracy(GRID, task, known) for view, known in views.items()} for task in GRID[0].labels}


def other_senses(texts: list[str], translations: list[str], language: str) -> list[str]:
    """The same translations with the noun of the other sense of the word: what is right for a picture of another place.

    Args:
        texts: messages.
        translations: of each, in `language`.
        language: "german" or "french".
    """
    result = []
    for text, translation in zip(texts, translations, strict=True):
        word = next(word for word in WORDS if re.search(rf"\b{word}\b", text))
        cells = [cell for cell in GRID if cell.word == word]
        intent = next(cell.intent for cell in cells if cell.translate(language) == translation)
        variants = [cell.translate(language) for cell in cells if cell.intent == intent]
        # Words whose senses share a noun have no other translation.
        result.append(next((other for other in variants if other != translation), translation))
    return result


@dataclass(frozen=True)
class RowSpec:
    """A row before it is rendered: its factors and the seeds of its wording and of its drawing."""

    cell: Cell
    text_seed: str
    image_seed: str
    held_out: bool


def draw_row_specs(split: str, size: int, seed: int) -> list[RowSpec]:
    """Draws the rows of a split by cycling through the grid, each pass in a new order."""
    rng = random.Random(f"{seed}/{split}/order")
    specs: list[RowSpec] = []
    for start in range(0, size, len(GRID)):
        order = rng.sample(GRID, len(GRID))[: size - start]
        for offset, cell in enumerate(order):
            if split == "train":
                text_key = image_key = str(start + offset)
            else:
                # Minimal pairs. The rank of the word rotates remark and intent, so that the four rows that share a
                # drawing have four words, four remark slots and mixed intents.
                run, rank = divmod(WORDS.index(cell.word), len(REMARK_SLOTS))
                remark_turn = (cell.slot + rank) % len(REMARK_SLOTS)
                intents = TASK_LABELS["intent"]
                intent_turn = (intents.index(cell.intent) + rank) % len(intents)
                text_key = f"{start}/{cell.word}/{cell.slot}/{cell.intent}"
                image_key = f"{start}/{run}/{cell.place}/{cell.state}/{remark_turn}/{intent_turn}"
            # random.Random hashes a str seed by SHA-512: the same in every process.
            prefix = f"{seed}/{split}"
            specs.append(RowSpec(cell, f"{prefix}/text/{text_key}", f"{prefix}/image/{image_key}", split == "test"))
    return specs


def render_text(spec: RowSpec) -> str:
    return write_message(*spec.cell.text_factors, rng=random.Random(spec.text_seed), held_out=spec.held_out)


def render_image(spec: RowSpec, image_size: int) -> bytes:
    """The PNG file of the row's picture, RGB, `image_size` pixels in height and width."""
    rng = random.Random(spec.image_seed)
    setting = rng.choice(SETTINGS[spec.cell.place])
    variant = rng.choice(drawing_variants(spec.held_out))
    return encode_png(draw_picture(setting, spec.cell.state, variant, rng, image_size))


def load_demo_dataset(
    train_size: int = 7 * len(GRID),
    validation_size: int = len(GRID),
    test_size: int = 2 * len(GRID),
    seed: int = 0,
    image_size: int = 64,
) -> datasets.DatasetDict:
    """Draws the embedded data set. Nothing is downloaded; the same arguments give the same bytes.

    Args:
        train_size, validation_size, test_size: the number of rows of each split. In multiples of `len(GRID)` (576) all
            combinations of factors are exactly balanced.
        seed: seeds every choice.
        image_size: height and width of the pictures in pixels. Larger sizes show the same drawings in finer detail.

    Returns:
        A `datasets.DatasetDict` with "train", "validation" and "test", and the columns `image` (`datasets.Image`, PNG),
        `text`, `sentiment`, `topic` and `intent` (strings, see `TASK_LABELS`), `german` and `french` (see
        `TRANSLATIONS`).

    Raises:
        ValueError: a size is not positive.

    Example:

    ```python
    >>> data = load_demo_dataset(train_size=8, validation_size=4, test_size=4)
    >>> data["train"].num_rows
    8
    ```
    """
    sizes = {"train_size": train_size, "validation_size": validation_size, "test_size": test_size}
    for name, value in {**sizes, "image_size": image_size}.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be a positive integer, but is {value}.")

    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            **{column: datasets.Value("string") for column in GRID[0].labels},
        }
    )
    splits = {}
    for name, size in sizes.items():
        split = name.removesuffix("_size")
        specs = draw_row_specs(split, size, seed)
        pictures: dict[str, bytes] = {}
        for spec in specs:
            if spec.image_seed not in pictures:
                pictures[spec.image_seed] = render_image(spec, image_size)
        columns = {
            "image": [{"bytes": pictures[spec.image_seed], "path": None} for spec in specs],
            "text": [render_text(spec) for spec in specs],
            **{column: [spec.cell.labels[column] for spec in specs] for column in GRID[0].labels},
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
    return datasets.DatasetDict(splits)
