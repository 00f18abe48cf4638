"""What is each modality good for? The same rows with and without it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..model.task_base import is_missing
from ..model.tasks import Task
from ..training.card.sections import markdown_table


# The metric by which a task is told in a few words.
_MAIN_METRICS = ("accuracy", "f1_micro", "pearson", "bleu", "text_to_image_recall_at_1")


@dataclass
class Ablation:
    """
    Args:
        variants: what the rows were given -> name of a metric (`<task>_<metric>`) -> value.
        majority: task -> share of the most frequent label, for tasks that choose one of several.
        tasks: name -> task.
    """

    variants: dict[str, dict[str, float]]
    majority: dict[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"variants": self.variants, "majority_class_accuracy": self.majority}

    def to_markdown(self) -> str:
        """A table with a row for each task, in its main metric."""
        rows = []
        for name in self.tasks:
            metric = self._main_metric(name)
            if metric is not None:
                values = [self.variants[variant].get(metric) for variant in self.variants]
                shown = ["" if value is None else f"{value:.3f}" for value in values]
                majority = f"{self.majority[name]:.3f}" if name in self.majority else ""
                rows.append([name, metric.removeprefix(f"{name}_").replace("_", " "), *shown, majority])
        return markdown_table(["task", "metric", *self.variants, "majority class"], rows)

    def _main_metric(self, task: str) -> str | None:
        measured = next(iter(self.variants.values()))
        own = [name for name in measured if name.startswith(f"{task}_") and name != f"{task}_loss"]
        return next(
            (f"{task}_{metric}" for metric in _MAIN_METRICS if f"{task}_{metric}" in own), next(iter(own), None)
        )


def ablate(trainer: Any, rows: datasets.Dataset, seed: int = 0) -> Ablation:
    """
    Evaluates a model on all that rows have, on each modality alone, and with each modality but the text exchanged
    between the rows, so that what it says is of another row.

    Cells are emptied, not tensors, so the model's own rule of absence is measured; rows that then have nothing left are
    left out. What is exchanged goes round in one
    cycle among the rows that have it, so each row has as much as before, and none keeps its own. Labels of words go
    with the text.

    Args:
        trainer ([`MMTrainer`]): Evaluates; its logs are left as they were.
        rows (`datasets.Dataset`): With the columns that its collator reads.
        seed (`int`, *optional*, defaults to 0): Of the cycle.

    Returns:
        [`Ablation`]

    Raises:
        ValueError: if `rows` is no `datasets.Dataset`, or the model reads text alone.
    """
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"rows must be a datasets.Dataset, whose columns can be emptied, but is a {type(rows).__name__}."
        )
    collator, tasks = trainer.data_collator, trainer.fused_model.tasks
    media = {kind: column.column for kind, column in collator.media.items() if column.column in rows.column_names}
    # Pictures and videos are one modality to the model, and so are emptied together.
    columns: dict[str, list[str]] = {}
    for kind, column in media.items():
        columns.setdefault("sound" if kind == "audio" else "image", []).append(column)
    if not columns:
        raise ValueError("There is nothing to leave out: neither pictures nor videos nor sound are among the columns.")
    text = collator.text_column
    all_media = [column for names in columns.values() for column in names]
    word_labels = [task.column for task in tasks.values() if task.is_token_level and task.column in rows.column_names]
    variants = {"all": rows, "text only": _where(rows.remove_columns(all_media), _has_any(rows, [text]))}
    for kind, names in columns.items():
        others = [column for column in all_media if column not in names]
        alone = _without_text(rows.remove_columns([*others, *word_labels]), text)
        variants[f"{kind} only"] = _where(alone, _has_any(rows, names))
    for kind, names in columns.items():
        variants[f"{kind} shuffled"] = _exchanged(rows, names, seed)
    history, measured = trainer.state.log_history, {}
    trainer.state.log_history = list(history)
    try:
        for name, changed in variants.items():
            metrics = trainer.evaluate(changed, metric_key_prefix="ablation")
            measured[name] = {
                key.removeprefix("ablation_"): value
                for key, value in metrics.items()
                if any(key.startswith(f"ablation_{task}_") for task in tasks)
            }
    finally:
        trainer.state.log_history = history
    return Ablation(measured, _majority(rows, tasks), tasks)


def _without_text(rows: datasets.Dataset, text: str) -> datasets.Dataset:
    nothing = pa.nulls(len(rows), pa.string())
    emptied = rows.remove_columns(text) if text in rows.column_names else rows
    return emptied.add_column(text, nothing.to_pylist(), feature=datasets.Value("string"))


def _has_any(rows: datasets.Dataset, columns: list[str]) -> np.ndarray:
    """(rows,) bool: whether a row has something in any of the columns. Nothing is decoded."""
    present = np.zeros(len(rows), dtype=bool)
    known = [column for column in columns if column in rows.column_names]
    table = rows.select_columns(known).with_format("arrow")[:]
    for column in known:
        cells = table[column].combine_chunks()
        if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
            has = pa.compute.fill_null(pa.compute.list_value_length(cells), 0)
        elif pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            has = pa.compute.fill_null(pa.compute.utf8_length(pa.compute.utf8_trim_whitespace(cells)), 0)
        else:
            has = cells.is_valid()
        present |= np.asarray(has.to_pylist(), dtype=bool)
    return present


def _where(rows: datasets.Dataset, wanted: np.ndarray) -> datasets.Dataset:
    return rows if wanted.all() else rows.select(np.flatnonzero(wanted))


def _exchanged(rows: datasets.Dataset, columns: list[str], seed: int) -> datasets.Dataset:
    """The cells of these columns moved, together, along one cycle of the rows that have any of them."""
    places = np.flatnonzero(_has_any(rows, columns))
    cycle = np.random.default_rng(seed).permutation(places)
    source = np.arange(len(rows))
    source[cycle] = np.roll(cycle, 1)
    moved = rows.select_columns(columns).select(source)
    return datasets.concatenate_datasets([rows.remove_columns(columns), moved], axis=1)


def _majority(rows: datasets.Dataset, tasks: Mapping[str, Task]) -> dict[str, float]:
    shares = {}
    for name, task in tasks.items():
        if task.kind == "classification" and task.column in rows.column_names:
            cells = [cell for cell in rows[task.column] if not is_missing(cell)]
            if cells:
                shares[name] = Counter(cells).most_common(1)[0][1] / len(cells)
    return shares
