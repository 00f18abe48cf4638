"""`mm-transformers train`: a training by a recipe, from its beginning or from where it stopped."""

import json
import logging
import sys
from pathlib import Path

from ..training.checkpoints import check_checkpoint as check_resumable
from ..training.from_recipe import (
    build_trainer,
    check_checkpoint,
    check_output,
    is_finished,
    load_data,
    newest_checkpoint,
    steps_done,
    training_arguments,
    training_differences,
)
from ..training.recipe import read_recipe
from .metrics_table import print_metrics
from .processes import say


# As the Trainer calls them in file names and metrics.
PREFIXES = {"validation": "eval", "test": "test"}


def run_training(path: Path, overrides: list[str], allow_urls: bool | list[str] = False) -> None:
    """
    Args:
        allow_urls: as [`MMDataCollator`] takes it.

    Raises:
        ValueError, OSError: one sentence.
    """
    recipe = read_recipe(path, overrides)
    args = training_arguments(recipe)
    show_progress_of_package(args.should_log)
    check_output(recipe)
    if args.resume_from_checkpoint is not None:
        check_resumable(args.resume_from_checkpoint)
    data, folder = load_data(recipe, args), Path(args.output_dir)
    finished = is_finished(args)
    measured = {split: PREFIXES[split] for split in PREFIXES if split in data.splits}
    results = {split: folder / f"{prefix}_results.json" for split, prefix in measured.items()}
    if finished:
        say(f"The model in {folder} has been trained already, for {steps_done(folder):,} steps; it stays as it is.")
        if differences := training_differences(recipe):
            say(f"It takes another folder, by training.output_dir=..., for another training: {'; '.join(differences)}.")
        measured = {split: prefix for split, prefix in measured.items() if not results[split].is_file()}
    if not finished or measured:
        trainer = build_trainer(recipe, args, data, saved=folder if finished else None, allow_urls=allow_urls)
    if not finished:
        checkpoint = args.resume_from_checkpoint or newest_checkpoint(folder)
        start = 0
        if checkpoint is not None:
            check_checkpoint(checkpoint, data.tasks)
            start = steps_done(checkpoint)
            say(f"Going on from {checkpoint}.")
        # Training comes first: a Trainer that has evaluated before no longer trains on several processes.
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        if trainer.state.global_step > start:  # a loss of no steps would take the place of the true one
            trainer.save_metrics("train", {**metrics, "train_samples": len(data.splits["train"])})
    for split, prefix in measured.items():
        metrics = trainer.evaluate(data.splits[split], metric_key_prefix=prefix)
        trainer.save_metrics(prefix, {**metrics, f"{prefix}_samples": len(data.splits[split])})
    if not finished:
        trainer.create_model_card()
        trainer.save_state()  # last: it says that all the rest is there
    if args.should_save:
        metrics_of = {split: json.loads(file.read_text()) for split, file in results.items()}
        print_metrics(metrics_of, PREFIXES, [task.name for task in data.tasks])
        say(f"The model is in {folder}.")


def show_progress_of_package(should_log: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mm_transformers").setLevel(logging.INFO if should_log else logging.ERROR)
