"""Runs a recipe within a time."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..model.messages import one_line
from ..training.arguments import MMTrainingArguments
from ..training.linear_start.study import Study
from ..training.recipe import Recipe
from ..training.recipe.builders import EncoderError, RecipeData, build_trainer, training_arguments
from ..training.recipe.output_folder import is_finished
from ..training.recipe.run import RecipeRun, run_recipe
from .encoder_choice import advice
from .plan import PRESETS
from .time_limit import TimeLimit, epochs_within


# The share of the time that is left for the test and the report.
_REPORT_SHARE = 0.15


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
) -> tuple[Recipe, MMTrainingArguments, RecipeRun]:
    """
    [`run_recipe`] that ends at a time; the recipe is written beside the model.

    Args:
        end: the time, of `time.monotonic()`; `None` for no limit.
        print_logs, callbacks: as in [`run_recipe`].

    Returns:
        The recipe and the arguments that fit into the time, and what came of them.

    Raises:
        ValueError, OSError: one sentence.
    """
    if end is not None:
        callbacks = [*callbacks, TimeLimit(end - _REPORT_SHARE * (end - time.monotonic()))]
        if not is_finished(args):
            recipe, args = _within(recipe, args, data, end, allow_urls, say)
    recipe.save(Path(args.output_dir))
    try:
        run = run_recipe(recipe, args, data, allow_urls, say, study, callbacks, print_logs)
    except EncoderError as error:
        raise _with_advice(error) from error
    return recipe, args, run


def _within(
    recipe: Recipe,
    args: Any,
    data: RecipeData,
    end: float,
    allow_urls: bool | Collection[str],
    say: Callable[[str], None],
) -> tuple[Recipe, Any]:
    """The recipe with as many epochs as fit into the time. If none does, with encoders that stay as they are."""
    try:
        trainer = build_trainer(recipe, args, data, allow_urls=allow_urls)
    except EncoderError as error:
        raise _with_advice(error) from error
    most = args.num_train_epochs
    epochs = epochs_within(trainer, end - time.monotonic())
    encoders = [name for name in ("text", "vision", "audio") if recipe.model.get(name)]
    if epochs < min(1, most) and encoders and not recipe.model.get("freeze"):
        say("The time is too short to train the encoders for one epoch, so they stay as they are.")
        cache = str(Path(args.output_dir) / "features")
        model, section = {**recipe.model, "freeze": encoders}, replace(recipe.data, feature_cache=cache)
        epochs = PRESETS["fast"].training["num_train_epochs"]
        recipe = replace(recipe, model=model, data=section)
    else:
        epochs = min(max(epochs, 1.0), most)
        if epochs < most:
            say(f"{epochs:.0f} epochs fit into the time.")
    recipe = replace(recipe, training={**recipe.training, "num_train_epochs": epochs})
    return recipe, training_arguments(recipe)


def _with_advice(error: EncoderError) -> OSError:
    return OSError(f"The {error.encoder} encoder cannot be loaded: {one_line(error, 300)} {advice(error.encoder)}")
