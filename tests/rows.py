"""Rows with labels of every kind, of which some lack a picture or a label, and arguments of a short training."""

from datasets import Dataset, Features, Image, List, Value
from tiny import make_image
from transformers import TrainingArguments


WORDS = [
    "red cat",
    "green dog in the rain",
    "blue crane",
    "a lovely small picnic is over",
    "ruined desk",
    "bat on river",
]


def make_rows(n=12) -> list[dict]:
    """Rows of which some lack an image or labels, unevenly."""
    rows = []
    for i in range(n):
        text = WORDS[i % len(WORDS)]
        rows.append({
            "text": text,
            "image": None if i % 4 == 1 else make_image(i % 3),
            "topic": ["animals", "food", "travel", None][i % 4],
            "sentiment": None if i < n - 3 else ["negative", "positive"][i % 2],
            "tags": None if i % 3 == 2 else ["red", "blue"][: i % 3],
            "score": None if i % 5 else float(i) / 10,
            "entities": None if i % 2 else ["O"] * (len(text.split()) - 1) + ["NAME"],
        })  # fmt: skip
    return rows


def make_dataset(n=12) -> Dataset:
    strings = List(Value("string"))
    features = Features({
        "text": Value("string"), "image": Image(), "topic": Value("string"), "sentiment": Value("string"),
        "tags": strings, "score": Value("float32"), "entities": strings,
    })  # fmt: skip
    return Dataset.from_list(make_rows(n), features=features)


def make_args(path, **kwargs) -> TrainingArguments:
    defaults = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=5, max_steps=3, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    return TrainingArguments(str(path), **{**defaults, **kwargs})
