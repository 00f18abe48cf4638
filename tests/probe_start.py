"""Rows, models and trainers of the probe start: tasks start as the best linear models of the encoders' features."""

import numpy as np
import torch
from tiny import make_image, make_model, make_processor

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MultiLabel,
    Regression,
    TokenClassification,
)


TASKS = [
    Classification("topic", labels=["animals", "food", "travel"]),
    Classification("mood", labels=["bad", "good"]),
    MultiLabel("tags", labels=["red", "green", "blue"]),
    Regression("score"),
    TokenClassification("entities", labels=["O", "NAME"]),
]
TEXTS = ["a red dog", "the big cat is in the river", "a picnic", "rain over the sun", "a small bat", "the desk"]
CPU = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}


def make_rows(count=36, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        text, image = TEXTS[int(rng.integers(len(TEXTS)))] + " in rain" * (i % 2), make_image(i)
        missing = rng.random(5) < 0.15
        labels = {
            "topic": ["animals", "food", "travel"][int(rng.integers(3))],
            "mood": ["bad", "good"][i % 2],
            "tags": [tag for tag in ("red", "green", "blue") if rng.random() < 0.5],
            "score": float(rng.normal()),
            "entities": [["O", "NAME"][int(rng.integers(2))] for _ in text.split()],
        }
        row = {name: None if gone else label for (name, label), gone in zip(labels.items(), missing, strict=True)}
        row["text"] = None if i % 9 == 4 else text
        if row["text"] is None:
            row["entities"] = None
        row["image"] = None if i % 5 == 3 and row["text"] else [image, make_image(i + 100)] if i % 7 == 2 else image
        rows.append(row)
    return rows


def new_model(**kwargs):
    kwargs.setdefault("tasks", TASKS)
    return make_model(gates_open=False, linear_probe=True, **kwargs)


def make_trainer(folder, model=None, rows=None, **kwargs):
    args = MMTrainingArguments(str(folder), **{**CPU, "num_train_epochs": 1, "refit": False, **kwargs})
    model = new_model() if model is None else model
    return MMTrainer(model, args, processing_class=make_processor(), train_dataset=rows or make_rows())


def logits_of(model, rows):
    batch = MMDataCollator(make_processor(), model.config)(rows)
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits
