"""Encoders, rows and recipes on disk, for the tests of what trains and answers by files."""

import csv
import json
from pathlib import Path

import torch
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_image, make_image_processor, make_tokenizer
from transformers import AutoModel, AutoModelForSeq2SeqLM


def save_encoders(folder: Path) -> Path:
    """A tiny BERT, BART and ViT, as a download from the Hub would leave them."""
    torch.manual_seed(0)
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(folder / "text")
    AutoModelForSeq2SeqLM.from_config(SEQ2SEQ["bart"]()).save_pretrained(folder / "seq2seq")
    for name in ("text", "seq2seq"):
        make_tokenizer().save_pretrained(folder / name)
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(folder / "vision")
    make_image_processor().save_pretrained(folder / "vision")
    return folder


def make_rows(folder: Path, count: int = 13) -> list[dict]:
    """Some labels are missing, some pictures; the pictures are in `folder / "pictures"`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        make_image(i).save(folder / "pictures" / f"{i}.png")
        rows.append({
            "id": f"{i:03d}", "text": f"the {'red' if i % 2 else 'green'} dog is {'very ' * (i % 5)}small",
            "image": f"pictures/{i}.png" if i % 4 else None, "topic": None if i == 3 else ["animals", "food"][i % 2],
            "stars": None if i == 2 else i / 4, "tags": None if i == 5 else ["red", "small"][: i % 3],
        })  # fmt: skip
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            cells = {name: "|".join(cell) if isinstance(cell, list) else cell for name, cell in row.items()}
            writer.writerow(cells)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def recipe_values(encoders: Path, **training) -> dict:
    """A recipe for `make_rows`, in train.csv beside it."""
    return {
        "data": {"train": "train.csv", "validation": "train.csv"},
        "model": {"text": str(encoders / "text"), "vision": str(encoders / "vision"), "num_fusion_layers": 1},
        "tasks": [
            {"name": "topic", "kind": "classification"},
            {"name": "stars", "kind": "regression", "loss_weight": 0.5},
            {"name": "tags", "kind": "multi_label"},
        ],
        "training": {
            "output_dir": "out", "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4,
            "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True, **training,
        },
    }  # fmt: skip
