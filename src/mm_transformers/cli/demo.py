"""`mm-transformers demo`: does the picture help? Trained, measured, saved, reloaded and drawn."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers.utils import logging

from ..analysis import ablate, contrastive_accuracy, explain
from ..data.embedded import (
    GRID,
    TASK_LABELS,
    TRANSLATIONS,
    best_possible_accuracy,
    draw_row_specs,
    load_demo_dataset,
    other_senses,
    render_image,
)
from ..model.fusion import fusion_class
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.safe_writing import drop_link, write_atomically, write_text_atomically
from ..training.trainer import MMTrainer
from .demo_model import make_config, make_processor, train
from .demo_picture import draw_results
from .reload import answers_of


MODELS = {"fused": "both parts", "text only": "the text", "image only": "the picture"}
NUM_CARDS = 6
NUM_ABLATED = len(GRID)  # a whole pass, on which the limits of each part are exact
NUM_ADDITIVE = 192  # each of their texts with each of their pictures
# The model gets 64 pixels; the figures show the same drawings in finer detail.
CARD_SIZE = 256
CHANGING = ("sentiment", "topic")
TASKS = (*TASK_LABELS, *TRANSLATIONS)


def run_demo(steps: int, output_dir: Path, seed: int, fusion_type: str) -> dict[str, dict[str, float]]:
    """
    Trains a fused model, a text-only and a picture-only model on the embedded data set, and compares them.

    The training effort is equal for all three. The demo prints their test accuracy beside the best possible accuracy
    from one part alone. It also prints whether the picture makes the right translation more probable than the wrong
    one. It saves the fused model and checks that a fresh process gives the same answers. It draws the results
    (`demo.png`), the contribution of each modality (`ablation.png`), and an explanation of an answer
    (`explanation.png`).

    Returns:
        Task -> column of the table -> test accuracy; for translations, the share of exact matches.

    Raises:
        ValueError: if the fusion kind is unknown.
        RuntimeError: if the saved model answers differently.
    """
    start, console = time.perf_counter(), Console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of a loader worker
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    fusion_class(fusion_type, {})  # a wrong kind is an error at once
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("demo.png", "results.json", "ablation.png", "explanation.png", "examples"):
        drop_link(output_dir / name)
    with console.status("Drawing pictures and writing messages ..."):
        data = load_demo_dataset(seed=seed)
    processor = make_processor([text for column in ("text", *TRANSLATIONS) for text in data["train"][column]])
    console.print(f"{len(data['train']):,} messages with pictures for training; example: {data['train'][0]['text']!r}")

    trainers: dict[str, MMTrainer] = {}
    for name, seen in MODELS.items():
        console.print(f"[bold]{name}[/bold]: {steps} steps on {seen}")
        config = make_config(processor.tokenizer, fusion_type, with_images=name != "text only", dropout=0.0)
        trainers[name] = train(
            name, _only(name, data), processor, config, steps, seed, output_dir / "training", console
        )
    # Copied now: later evaluations of other rows are logged too.
    histories = {name: list(trainer.state.log_history) for name, trainer in trainers.items()}
    test, fused = data["test"], trainers["fused"]
    views = {
        "fused": test, "shuffled pictures": _shuffle_pictures(test, seed), "no picture": test.remove_columns("image"),
    }  # fmt: skip
    with console.status("Answering the test rows ..."):
        accuracy = {name: _accuracy(trainer, _only(name, data)["test"]) for name, trainer in trainers.items()}
        for view in ("shuffled pictures", "no picture"):
            accuracy[view] = _accuracy(fused, views[view])
    possible = best_possible_accuracy()
    results = {
        task: {
            **{name: accuracy[name][task] for name in accuracy},
            "majority": _majority(data, task),
            "best from text": possible[task]["text"],
            "best from image": possible[task]["image"],
        }
        for task in TASKS
    }
    console.print(_table(results, len(test)))
    wrong = {name: other_senses(list(test["text"]), list(test[name]), name) for name in TRANSLATIONS}
    with console.status("Comparing right and wrong translations ..."):
        contrast = {
            name: {
                view: contrastive_accuracy(fused.model, fused.data_collator, rows, name, wrong[name], batch_size=288)
                for view, rows in views.items()
            }
            for name in TRANSLATIONS
        }
    for name, row in contrast.items():
        console.print(
            f"The model prefers the right translation into {name.title()} to that of the other sense in "
            + ", ".join(f"{100 * value:.1f}% ({'right picture' if v == 'fused' else v})" for v, value in row.items())
        )

    model_dir = output_dir / "model"
    fused.save_model(str(model_dir))
    console.print(f"Saved to {model_dir}", soft_wrap=True)
    with console.status("Loading the model in a new process ..."):
        difference = _check_in_fresh_process(fused, processor, test.select(range(32)), output_dir)
    console.print(f"Loaded in a new process, the model gives the same answers (largest difference {difference:.0e}).")
    with console.status("Drawing the contribution of each modality ..."):
        cards = _cards(fused, processor, test, seed)
        draw_results(output_dir / "demo.png", results, histories, cards)
        ablation = ablate(
            fused.model, processor, test.select(range(NUM_ABLATED)), list(TASK_LABELS), num_additive_rows=NUM_ADDITIVE
        )
        saved = {
            "settings": {"steps": steps, "seed": seed, "fusion": fusion_type, "test_rows": len(test)},
            "accuracy": results,
            "contrastive_accuracy": contrast,
            "ablation": ablation.to_dict(),
        }
        (output_dir / "results.json").write_text(json.dumps(saved, indent=2) + "\n")
        ablation.plot().savefig(output_dir / "ablation.png", dpi=100)
        row = {"text": cards[0]["text"], "image": cards[0]["image"]}
        explain(fused.model, processor, row, "sentiment").plot().savefig(output_dir / "explanation.png", dpi=100)
    for name in ("demo.png", "ablation.png", "explanation.png"):
        console.print(f"Wrote {output_dir / name}", soft_wrap=True)
    console.print(f"All in {time.perf_counter() - start:.0f} s.")
    console.print(f"Look at [bold]{output_dir / 'demo.png'}[/bold], and ask the model yourself:", soft_wrap=True)
    console.print(f"    mm-transformers demo --ui --output-dir {output_dir}", soft_wrap=True, highlight=False)
    return results


def _only(name: str, data: DatasetDict) -> DatasetDict:
    """The data for one of the models."""
    if name == "text only":
        return data.remove_columns("image")
    if name == "image only":
        return DatasetDict({
            split: rows.remove_columns("text").add_column("text", [""] * len(rows)) for split, rows in data.items()
        })  # fmt: skip
    return data


def _accuracy(trainer: MMTrainer, rows: Dataset) -> dict[str, float]:
    metrics = trainer.evaluate(rows)
    measures = {**dict.fromkeys(TASK_LABELS, "accuracy"), **dict.fromkeys(TRANSLATIONS, "exact_match")}
    return {task: metrics[f"eval_{task}_{measure}"] for task, measure in measures.items()}


def _shuffle_pictures(rows: Dataset, seed: int) -> Dataset:
    """Every message with the picture of another row."""
    order = np.random.default_rng(seed).permutation(len(rows))
    donor = np.empty_like(order)
    donor[order] = np.roll(order, 1)  # one long cycle: no row keeps its own
    pictures = rows.select_columns("image").select(donor)
    return concatenate_datasets([rows.remove_columns("image"), pictures], axis=1)


def _majority(data: DatasetDict, task: str) -> float:
    """Test accuracy of always giving the most frequent label of the training split."""
    labels = list(data["train"][task])
    most_frequent = max(sorted(set(labels)), key=labels.count)
    return float(np.mean([label == most_frequent for label in data["test"][task]]))


def _table(results: dict[str, dict[str, float]], num_rows: int) -> Table:
    table = Table(title=f"Test accuracy (%), {num_rows:,} rows; translations that match exactly (%)")
    table.add_column("", style="bold")
    for task in results:
        table.add_column(task, justify="right")
    for column in next(iter(results.values())):
        style = "green" if column == "fused" else "dim" if column.startswith(("majority", "best")) else ""
        values = (f"{100 * row[column]:.1f}" for row in results.values())
        table.add_row(column, *values, style=style, end_section=column in ("image only", "no picture"))
    return table


def _check_in_fresh_process(
    trainer: MMTrainer, processor: MMTransformerProcessor, rows: Dataset, output_dir: Path
) -> float:
    """The largest difference between the logits here and those of the saved model in a fresh process."""
    folder = output_dir / "examples"
    folder.mkdir(exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        with write_atomically(folder / f"{i}.png") as picture:
            row["image"].save(picture, format="png")
        lines.append(json.dumps({**{k: v for k, v in row.items() if k != "image"}, "image": f"{i}.png"}))
    write_text_atomically(folder / "rows.jsonl", "\n".join(lines) + "\n")
    answers = output_dir / "examples" / "logits.safetensors"
    command = [
        sys.executable,
        "-m",
        "mm_transformers.cli.reload",
        str(output_dir / "model"),
        str(folder / "rows.jsonl"),
        str(answers),
    ]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The saved model could not be loaded in a new process:\n{done.stderr}")
    inputs = processor(text=list(rows["text"]), images=list(rows["image"]))
    expected, actual = answers_of(trainer.model, inputs), load_file(answers)
    difference = max((actual[task] - expected[task]).abs().max().item() for task in TASK_LABELS)
    same = all(torch.equal(actual[name], expected[name]) for name in TRANSLATIONS)
    if (
        difference > 1e-4
        or not same
        or any((actual[t].argmax(-1) != expected[t].argmax(-1)).any() for t in TASK_LABELS)
    ):
        raise RuntimeError(f"The saved model answers differently in a new process (by up to {difference}).")
    return difference


def _cards(trainer: MMTrainer, processor: MMTransformerProcessor, rows: Dataset, seed: int) -> list[dict[str, Any]]:
    """Some test rows with their answers, in pairs: the same message, another picture, another truth."""
    texts = list(rows["text"])
    pairs: list[int] = []
    for first in np.random.default_rng(seed).permutation(len(rows)):
        others = [i for i, text in enumerate(texts) if text == texts[first]]
        second = next((i for i in others if all(rows[i][t] != rows[int(first)][t] for t in CHANGING)), None)
        if second is not None and texts[first] not in {texts[i] for i in pairs}:
            pairs += [int(first), second]
        if len(pairs) == NUM_CARDS:
            break
    chosen = rows.select(pairs)
    found = answers_of(trainer.model, processor(text=list(chosen["text"]), images=list(chosen["image"])))
    answers = {task: [TASK_LABELS[task][i] for i in found[task].argmax(-1)] for task in TASK_LABELS}
    german = processor.batch_decode(found["german"], skip_special_tokens=True)
    answers["german"] = [text.strip() for text in german]
    specs = draw_row_specs("test", len(rows), seed)
    return [
        {
            "text": row["text"],
            "image": Image.open(io.BytesIO(render_image(specs[pairs[i]], CARD_SIZE))),
            "answers": {task: (answers[task][i], row[task]) for task in answers},
        }
        for i, row in enumerate(chosen)
    ]
