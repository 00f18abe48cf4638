"""Rows that are known by their score, and trainers that note which rows they see."""

import datasets
from tiny import make_model, make_processor
from transformers import TrainingArguments

from mm_transformers import Classification, MMTrainer, Regression


TASKS = [Classification("tone", labels=["bad", "good"]), Regression("score")]


def make_args(path, **kwargs) -> TrainingArguments:
    defaults = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=5, max_steps=3, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(str(path), **{**defaults, **kwargs})


def numbered(first: int, n: int) -> list[dict]:
    """Rows that are known by their score."""
    return [{"text": "a red dog", "score": float(first + i)} for i in range(n)]


def stream(rows: list[dict], num_shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


class RecordingTrainer(MMTrainer):
    """Notes the scores of the rows of each batch that is trained on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append([int(x) for x in inputs["labels"]["score"].nan_to_num(-1).tolist()])
        return super().training_step(model, inputs, *args, **kwargs)


def make_trainer(path, train_dataset, tasks=TASKS, vision=None, **kwargs) -> RecordingTrainer:
    arguments = {name: kwargs.pop(name) for name in ("data_collator", "eval_dataset") if name in kwargs}
    model = make_model(vision=vision, tasks=tasks)
    args = make_args(path, **kwargs)
    return RecordingTrainer(model, args, processing_class=make_processor(), train_dataset=train_dataset, **arguments)
