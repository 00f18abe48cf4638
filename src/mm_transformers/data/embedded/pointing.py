"""The embedded data set with known deciding parts: each picture is one quarter of a larger one."""

from __future__ import annotations

import random
import re
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .dataset import GRID, WORDS, draw_row_specs, render_image, render_text
from .drawing import encode_png
from .wording import ADJECTIVES


if TYPE_CHECKING:
    import datasets

_ADJECTIVES = "|".join(adjective for words in ADJECTIVES.values() for adjective in words)
# Task -> the part of a message that decides, together with the picture.
_DECIDING = {"topic": re.compile(rf"\b({'|'.join(WORDS)})\b"), "sentiment": re.compile(rf"\b({_ADJECTIVES})\b")}


def load_pointing_dataset(
    train_size: int = 7 * len(GRID),
    validation_size: int = len(GRID),
    test_size: int = len(GRID),
    seed: int = 0,
    image_size: int = 64,
) -> datasets.DatasetDict:
    """
    The rows of [`load_demo_dataset`] with larger pictures: one random quarter is the picture, three are meaningless
    blotches.

    So the deciding pixels are known, and by the rules of the data set the deciding word. An explanation that points
    elsewhere is wrong. This is the pointing game of Zhang et al. 2018 (https://arxiv.org/abs/1608.00507), on a grid as
    in Böhle et al. 2021 (https://arxiv.org/abs/2104.00032).

    Args:
        train_size, validation_size, test_size: rows of each split.
        seed: seeds every choice.
        image_size: height and width of the whole pictures in pixels.

    Returns:
        A `datasets.DatasetDict` with the columns `image`, `text`, `sentiment` and `topic` of the demo's data, and `box`
            (left, top, right, bottom in pixels). Each of the two tasks has a column with its deciding word,
            `topic_word` and `sentiment_word`: start and end in the text, empty if several words decide.
    """
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            **{name: datasets.Value("string") for name in ("text", "sentiment", "topic")},
            "box": datasets.List(datasets.Value("int64"), length=4),
            **{f"{task}_word": datasets.List(datasets.Value("int64")) for task in _DECIDING},
        }
    )
    splits = {}
    for split, size in {"train": train_size, "validation": validation_size, "test": test_size}.items():
        rows = []
        for number, spec in enumerate(draw_row_specs(split, size, seed)):
            picture = Image.open(BytesIO(render_image(spec, image_size // 2)))
            whole, box = hide_in_blotches(picture, random.Random(f"{seed}/{split}/{number}/place"))
            text = render_text(spec)
            rows.append({
                "image": {"bytes": encode_png(whole), "path": None},
                "text": text,
                **{task: spec.cell.labels[task] for task in _DECIDING},
                "box": box,
                **{f"{task}_word": deciding_word(text, task) for task in _DECIDING},
            })  # fmt: skip
        splits[split] = datasets.Dataset.from_list(rows, features=features, split=datasets.NamedSplit(split))
    return datasets.DatasetDict(splits)


def deciding_word(text: str, task: str) -> list[int]:
    """Start and end of the word of a message that decides the task "topic" or "sentiment"; empty if several do."""
    found = [match.span() for match in _DECIDING[task].finditer(text)]
    return list(found[0]) if len(found) == 1 else []


def hide_in_blotches(picture: Image.Image, rng: random.Random) -> tuple[Image.Image, list[int]]:
    """A picture of twice the height and width with the given one in one quarter, and the place of that quarter."""
    width, height = picture.size
    chance = np.random.default_rng(rng.getrandbits(64))
    coarse = chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    whole = Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    left, top = rng.randrange(2) * width, rng.randrange(2) * height
    whole.paste(picture, (left, top))
    return whole, [left, top, left + width, top + height]
