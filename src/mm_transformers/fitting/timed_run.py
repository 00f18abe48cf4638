"""Runs a recipe within a time."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import TrainerCallback

from ..data.loading import SPLITS
from ..model.messages import one_line
from ..training.arguments import MMTrainingArguments
from ..training.linear_start.study import Study
from ..training.recipe import Recipe
from ..training.recipe.builders import EncoderError, RecipeData, build_trainer, limited_data, training_arguments
from ..training.recipe.output_folder import is_finished
from ..training.recipe.run import RecipeRun, run_recipe
from ..training.trainer import MMTrainer
from .encoder_choice import advice
from .plan import PRESETS
from .time_limit import TimeLimit, epochs_within, rows_within, seconds_per_row


# The share of the time that is left for the test and the report, and the most seconds.
_REPORT_SHARE, _REPORT_SECONDS = 0.3, 120.0


class Timed(NamedTuple):
    """
    What fits into a time.

    Args:
        recipe, args, data: the recipe, its training arguments and its rows.
    """

    recipe: Recipe
    args: MMTrainingArguments
    data: RecipeData


def fit_into_time(
    recipe: Recipe,
    args: MMTrainingArguments,
    data: RecipeData,
    end: float,
    *,
    allow_urls: bool | Collection[str] = False,
    say: Callable[[str], None] = print,
    shorten: Collection[str] = SPLITS,
) -> Timed:
    """
    The recipe with as many epochs as fit into the time, its arguments and its rows.

    If not even one epoch fits, the encoders stay as they are, so that they read each row once. If the time is too short
    for that too, a random choice of the rows is read.

    Args:
        end: the time, of `time.monotonic()`.
        shorten: the splits of which rows may be left out.

    Raises:
        OSError: one sentence, if an encoder cannot be loaded.
    """
    if is_finished(args):
        return Timed(recipe, args, data)
    try:
        trainer = build_trainer(recipe, args, data, allow_urls=allow_urls)
    except EncoderError as error:
        raise _with_advice(error) from error
    encoders = {name for name in ("text", "vision", "audio") if recipe.model.get(name)}
    if encoders <= set(recipe.model.get("freeze") or ()) and recipe.data.feature_cache is not None:
        # Epochs on stored outputs are quick, so none is left out.
        recipe, data = _fewer_rows(trainer, recipe, data, end, say, shorten)
        return Timed(recipe, training_arguments(recipe), data)
    most = args.num_train_epochs
    epochs = epochs_within(trainer, seconds_per_row(trainer), end - time.monotonic())
    if epochs < min(1, most) and encoders and not recipe.model.get("freeze"):
        say("The time is too short to train the encoders for one epoch, so they stay as they are.")
        cache = str(Path(args.output_dir) / "features")
        model, section = {**recipe.model, "freeze": sorted(encoders)}, replace(recipe.data, feature_cache=cache)
        recipe = replace(recipe, model=model, data=section)
        recipe, data = _fewer_rows(trainer, recipe, data, end, say, shorten)
        epochs = PRESETS["fast"].training["num_train_epochs"]
    else:
        epochs = min(max(epochs, 1.0), most)
        if epochs < most:
            say(f"{epochs:.0f} epochs fit into the time.")
    recipe = replace(recipe, training={**recipe.training, "num_train_epochs": epochs})
    return Timed(recipe, training_arguments(recipe), data)


def _fewer_rows(
    trainer: MMTrainer,
    recipe: Recipe,
    data: RecipeData,
    end: float,
    say: Callable[[str], None],
    shorten: Collection[str],
) -> tuple[Recipe, RecipeData]:
    """The recipe with as many rows as frozen encoders can read in the time, and these rows."""
    per_row = seconds_per_row(trainer, training=False)
    splits = {split: rows for split, rows in data.splits.items() if split in shorten}
    fewer = rows_within(splits, per_row, end - time.monotonic())
    if not fewer:
        return recipe, data
    held_out = [count for split, count in fewer.items() if split != "train"]
    limits = recipe.data  # those of the recipe stay where the time allows more
    most = fewer.get("train", limits.max_train_samples), min(held_out, default=limits.max_eval_samples)
    recipe = replace(recipe, data=replace(limits, max_train_samples=most[0], max_eval_samples=most[1]))
    data = limited_data(recipe, data, shorten)
    counts = ", ".join(f"{len(data.splits[split]):,} {split}" for split in fewer)
    say(f"The encoders cannot read all rows in the time, so a random choice is used: {counts}.")
    return recipe, data


def run_in_time(
    recipe: Recipe,
    args: MMTrainingArguments,
    data: RecipeData,
    study: Study,
    *,
    end: float | None = None,
    allow_urls: bool | Collection[str] = False,
    say: Callable[[str], None] = print,
    print_logs: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> RecipeRun:
    """
    [`run_recipe`] that ends at a time; the recipe is written beside the model.

    Args:
        end: the time, of `time.monotonic()`; `None` for no limit.
        print_logs, callbacks: as in [`run_recipe`].

    Raises:
        ValueError, OSError: one sentence.
    """
    if end is not None:
        for_report = min(_REPORT_SHARE * (end - time.monotonic()), _REPORT_SECONDS)
        callbacks = [*callbacks, TimeLimit(end - for_report)]
    recipe.save(Path(args.output_dir))
    try:
        return run_recipe(recipe, args, data, allow_urls, say, study, callbacks, print_logs)
    except EncoderError as error:
        raise _with_advice(error) from error


def _with_advice(error: EncoderError) -> OSError:
    return OSError(f"The {error.encoder} encoder cannot be loaded: {one_line(error, 300)} {advice(error.encoder)}")
