"""The pages of the documentation, their code blocks, and a folder with what the blocks find in it."""

import re
import shutil
from pathlib import Path

import datasets
import pandas as pd
import torch
from language_models import LANGUAGE_MODELS, make_prompt_tokenizer
from tiny import (
    AUDIO_ENCODERS,
    FEATURE_EXTRACTORS,
    SEQ2SEQ,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_image,
    make_image_processor,
    make_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mm_transformers import Classification, Generation, MMTransformerForMultiTask, MMTransformerProcessor


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages of docs/how-to that tests/project/test_how_to.py runs, in a folder of its own.
RUN_ELSEWHERE = {
    "class-weights", "embeddings", "folder-of-pictures", "own-loop", "picture-size", "probabilities",
    "several-pictures", "thresholds",
}  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def shell_lines(page: Path) -> list[str]:
    """The commands of a page, each in one line."""
    joined = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def save_reader_folder(folder: Path) -> Path:
    """Data, encoders and a model as a reader would have them; the encoders are tiny, nothing is fetched."""
    torch.manual_seed(0)
    for name in ("distilbert/distilbert-base-uncased", "encoders/minilm", "my-text-encoder"):
        AutoModel.from_config(TEXT_ENCODERS["distilbert"]()).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name in ("google/vit-base-patch16-224-in21k", "encoders/lite0", "my-vision-encoder"):
        AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(folder / name)
        make_image_processor().save_pretrained(folder / name)
    marian = folder / "Helsinki-NLP" / "opus-mt-en-de"
    AutoModelForSeq2SeqLM.from_config(SEQ2SEQ["marian"]()).save_pretrained(marian)
    make_tokenizer().save_pretrained(marian)
    language_model = folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    AutoModelForCausalLM.from_config(LANGUAGE_MODELS["llama, tied"]()).save_pretrained(language_model)
    make_prompt_tokenizer().save_pretrained(language_model)
    whisper = folder / "openai" / "whisper-base"
    AutoModel.from_config(AUDIO_ENCODERS["whisper"]()).save_pretrained(whisper)
    FEATURE_EXTRACTORS["whisper"]().save_pretrained(whisper)
    make_image(3).save(folder / "rain.jpg")
    for name in ("train", "validation", "test", "calibration"):
        pd.DataFrame(_messages(folder)).to_csv(folder / f"{name}.csv", index=False)
    pd.DataFrame(_products(folder)).to_csv(folder / "products.csv", index=False)
    things = [f"{thing} number {i},{1900 + i},{thing}s,{i * 7}.5" for i in range(30) for thing in ("chair", "lamp")]
    (folder / "listings.csv").write_text("title,year,category,price\n" + "\n".join(things))
    for name, rows in (("stamps_data", _stamps()), ("emoji_data", _emoji())):
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
            data.to_parquet(folder / name / f"{split}.parquet")
    pd.DataFrame(_messages(folder)).to_parquet(folder / "rows.parquet")
    shutil.copy(ROOT / "examples/ray_predict.py", folder)
    _save_model(folder)
    return folder


def _messages(folder: Path) -> list[dict]:
    rows = []
    for i in range(12):
        make_image(i).save(folder / f"{i}.png")
        rows.append({
            "text": ["a lovely picnic", "a ruined desk", "a red crane in the rain"][i % 3],
            "image": None if i % 4 == 0 else f"{i}.png",
            "topic": ["animals", "food", "travel"][i % 3],
            "sentiment": None if i % 2 else ["negative", "neutral", "positive"][i % 3],
            "german": None if i == 2 else ["a picnic", "a desk", "a crane"][i % 3],
            "stars": None if i % 3 else 1.0 + i % 5,
        })  # fmt: skip
    return rows


def _products(folder: Path) -> list[dict]:
    """Pictures with a caption and a group, and no text; after `_messages`, which saves the pictures."""
    return [
        {"photo": f"{i % 12}.png", "descr": ["a red dog", "a desk"][i % 2], "group": ["animals", "things"][i % 2]}
        for i in range(20)
    ]


def _stamps() -> list[dict]:
    return [
        {
            "text": None if i % 7 == 3 else f"A {('red', 'green', 'blue')[i % 3]} dog {i}.",
            "image": None if i % 5 == 1 else make_image(i),
            "category": ["animals", "food", "town"][i % 3],
        }
        for i in range(24)
    ]


def _emoji() -> list[dict]:
    return [
        {
            "text": ("face", "water", "love")[i % 3],
            "image": make_image(i),
            "group": ["flags", "objects", "symbols"][i % 3],
            "polarity_class": ["negative", "neutral", "positive"][i % 3] if i % 2 else None,
        }
        for i in range(24)
    ]


def _save_model(folder: Path) -> None:
    """`my-model`, as the page Start trains it, but untrained."""
    encoders = {
        "text": str(folder / "Helsinki-NLP/opus-mt-en-de"),
        "vision": str(folder / "google/vit-base-patch16-224-in21k"),
    }
    tasks = [
        Classification("topic", labels=["animals", "food", "travel"]),
        Classification("sentiment", labels=["negative", "neutral", "positive"], loss_weight=0.5),
        Generation("german", max_length=32),
    ]
    MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks).save_pretrained(folder / "my-model")
    MMTransformerProcessor.from_encoders(**encoders).save_pretrained(folder / "my-model")
