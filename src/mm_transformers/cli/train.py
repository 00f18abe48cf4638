"""`mm-transformers train`: a training by a recipe, from its start or resumed."""

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..training.arguments import MMTrainingArguments
from ..training.checkpoints import check_checkpoint as check_resumable
from ..training.checkpoints.lock import locked
from ..training.recipe import Recipe, read_recipe
from ..training.recipe.builders import build_trainer, load_data, training_arguments
from ..training.recipe.output_folder import (
    check_checkpoint,
    check_output,
    is_finished,
    newest_checkpoint,
    steps_done,
    training_differences,
)
from .metrics_table import print_metrics
from .processes import say


# Names of the Trainer, in file names and metrics.
PREFIXES = {"validation": "eval", "test": "test"}


def run_training(path: Path, overrides: list[str], allow_urls: bool | list[str] = False) -> None:
    """
    Trains by a recipe, or resumes the training.

    Args:
        allow_urls: as in [`MMDataCollator`].

    Raises:
        ValueError, OSError: one sentence.
    """
    recipe = read_recipe(path, overrides)
    args = training_arguments(recipe)
    show_progress_of_package(args.should_log)
    check_output(recipe)
    # Until the card is written; the trainer itself holds it only while it trains.
    with locked(args.output_dir) if args.process_index == 0 and not is_finished(args) else nullcontext():
        _run(recipe, args, allow_urls)


def _run(recipe: Recipe, args: MMTrainingArguments, allow_urls: bool | list[str]) -> None:
    if args.resume_from_checkpoint is not None:
        check_resumable(args.resume_from_checkpoint)
    data, folder = load_data(recipe, args), Path(args.output_dir)
    finished = is_finished(args)
    measured = {split: PREFIXES[split] for split in PREFIXES if split in data.splits}
    results = {split: folder / f"{prefix}_results.json" for split, prefix in measured.items()}
    if finished:
        say(f"The model in {folder} has already been trained, for {steps_done(folder):,} steps; it is not changed.")
        if differences := training_differences(recipe):
            say(f"Another training needs another folder (training.output_dir=...): {'; '.join(differences)}.")
        measured = {split: prefix for split, prefix in measured.items() if not _has_metrics(results[split])}
    if not finished or measured:
        trainer = build_trainer(recipe, args, data, saved=folder if finished else None, allow_urls=allow_urls)
    if not finished:
        checkpoint = args.resume_from_checkpoint or newest_checkpoint(folder)
        start = 0
        if checkpoint is not None:
            check_checkpoint(checkpoint, data.tasks)
            start = steps_done(checkpoint)
            say(f"Resuming from {checkpoint}.")
        # Training comes first: a Trainer that has evaluated before no longer trains on several processes.
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        if trainer.state.global_step > start:  # a loss over no steps would replace the true one
            trainer.save_metrics("train", {**metrics, "train_samples": len(data.splits["train"])})
    for split, prefix in measured.items():
        metrics = trainer.evaluate(data.splits[split], metric_key_prefix=prefix)
        trainer.save_metrics(prefix, {**metrics, f"{prefix}_samples": len(data.splits[split])})
    if not finished:
        trainer.create_model_card()
        trainer.save_state()  # last: its file marks the training as complete
    if args.should_save:
        metrics_of = {split: _read_metrics(file) for split, file in results.items()}
        print_metrics(metrics_of, PREFIXES, [task.name for task in data.tasks])
        say(f"The model is in {folder}.")


def _has_metrics(file: Path) -> bool:
    try:
        _read_metrics(file)
        return True
    except (OSError, ValueError):  # then they are measured again
        return False


def _read_metrics(file: Path) -> dict[str, Any]:
    """
    The metrics in a file.

    Raises:
        ValueError: one sentence, if the file holds no metrics.
    """
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds no metrics as JSON: remove it.") from error
    if not isinstance(metrics, dict):
        raise ValueError(f"{file} holds no metrics as JSON: remove it.")
    return metrics


def show_progress_of_package(should_log: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mm_transformers").setLevel(logging.INFO if should_log else logging.ERROR)
