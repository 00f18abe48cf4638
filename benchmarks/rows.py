"""Rows and a processor for benchmarks: pictures like photographs in their size and files, texts of made-up words."""

import io
import random
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from mm_transformers import MMTransformerProcessor


WORDS = [f"word{i}" for i in range(2000)]


def make_processor(image_size: int = 224) -> MMTransformerProcessor:
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    return MMTransformerProcessor(ViTImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer)


def make_picture(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """Soft shapes with some grain, so that a JPEG of it is about as large as one of a photograph."""
    generator = np.random.default_rng(seed)
    soft = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    grain = generator.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def make_rows(count: int, words: tuple[int, int] = (8, 40), pictures: bool = True, seed: int = 0) -> dict[str, Any]:
    """Columns `text`, `image` (JPEG files of 640 x 480) and `task0`, for `datasets.Dataset.from_dict`."""
    generator = random.Random(seed)
    columns = {
        "text": [" ".join(generator.choices(WORDS, k=generator.randint(*words))) for _ in range(count)],
        "task0": [generator.choice("abc") for _ in range(count)],
    }
    if pictures:
        columns["image"] = [{"bytes": jpeg(make_picture(i)), "path": None} for i in range(count)]
    return columns
