"""Trains by a recipe, or resumes its training, and measures the model."""

import json
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..arguments import MMTrainingArguments
from ..checkpoints import check_checkpoint as check_resumable
from ..linear_start.study import Study
from ..trainer import MMTrainer
from .builders import RecipeData, build_trainer
from .output_folder import check_checkpoint, is_finished, newest_checkpoint, steps_done, training_differences
from .recipe import Recipe


# Names of the Trainer, in file names and metrics.
PREFIXES = {"validation": "eval", "test": "test"}


class RecipeRun(NamedTuple):
    """
    A model that was trained by a recipe.

    Args:
        metrics (`dict[str, dict]`): Split -> its metrics, for "validation" and "test". Empty in other processes.
        trainer ([`MMTrainer`], *optional*): `None` if there was nothing left to do.
    """

    metrics: dict[str, dict[str, Any]]
    trainer: MMTrainer | None


def run_recipe(
    recipe: Recipe,
    args: MMTrainingArguments,
    data: RecipeData,
    allow_urls: bool | Collection[str] = False,
    say: Callable[[str], None] = print,
    study: Study | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    print_logs: bool = True,
) -> RecipeRun:
    """
    Trains and measures a model; goes on where an earlier call with the same recipe stopped.

    Args:
        recipe, args, data: the recipe, its training arguments and its rows.
        allow_urls: as in [`MMDataCollator`].
        say: prints a sentence.
        study: asks for more about the linear start.
        callbacks: of the trainer.
        print_logs: whether the progress bar of [`~transformers.Trainer`], its losses and its metrics are printed.

    Raises:
        ValueError, OSError: one sentence.
    """
    if args.resume_from_checkpoint is not None:
        check_resumable(args.resume_from_checkpoint)
    folder, finished = Path(args.output_dir), is_finished(args)
    measured = {split: PREFIXES[split] for split in PREFIXES if split in data.splits}
    results = {split: folder / f"{prefix}_results.json" for split, prefix in measured.items()}
    if finished:
        say(f"The model in {folder} has already been trained, for {steps_done(folder):,} steps; it is not changed.")
        if differences := training_differences(recipe):
            say(f"Another training needs another folder (training.output_dir=...): {'; '.join(differences)}.")
        measured = {split: prefix for split, prefix in measured.items() if not _has_metrics(results[split])}
    trainer: MMTrainer | None = None
    if args.run_name is None and args.report_to:
        # With this name, Trackio adds the test scores to the run of the training.
        args.run_name = f"{folder.name} {datetime.now():%Y-%m-%d %H:%M:%S}"
    if not finished or measured:
        saved = folder if finished else None
        trainer = build_trainer(recipe, args, data, saved=saved, allow_urls=allow_urls, callbacks=list(callbacks))
        if not print_logs:
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
    if trainer is not None and not finished:
        _train(trainer, args, data, say, study)
    for split, prefix in measured.items():
        assert trainer is not None
        metrics = trainer.evaluate(data.splits[split], metric_key_prefix=prefix)
        trainer.save_metrics(prefix, {**metrics, f"{prefix}_samples": len(data.splits[split])})
    if trainer is not None and not finished:
        trainer.create_model_card()
        trainer.save_state()  # last: its file marks the training as complete
    found = {split: _read_metrics(file) for split, file in results.items()} if args.should_save else {}
    return RecipeRun(found, trainer)


def _train(
    trainer: MMTrainer,
    args: MMTrainingArguments,
    data: RecipeData,
    say: Callable[[str], None],
    study: Study | None,
) -> None:
    checkpoint = args.resume_from_checkpoint or newest_checkpoint(args.output_dir)
    start = 0
    if checkpoint is not None:
        check_checkpoint(checkpoint, data.tasks)
        start = steps_done(checkpoint)
        say(f"Resuming from {checkpoint}.")
    trainer.study = study
    # Training comes first: a Trainer that has evaluated before no longer trains on several processes.
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    if trainer.state.global_step > start:  # a loss over no steps would replace the true one
        trainer.save_metrics("train", {**metrics, "train_samples": len(data.splits["train"])})


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
