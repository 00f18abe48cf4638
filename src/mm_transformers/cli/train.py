"""`mm-transformers train`: a training by a recipe, from its start or resumed."""

import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from ..training.checkpoints.lock import locked
from ..training.recipe import read_recipe
from ..training.recipe.builders import load_data, training_arguments
from ..training.recipe.output_folder import check_output, is_finished
from ..training.recipe.run import PREFIXES, run_recipe
from .metrics_table import print_metrics
from .processes import say


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
        data = load_data(recipe, args)
        run = run_recipe(recipe, args, data, allow_urls, say)
    if args.should_save:
        print_metrics(run.metrics, PREFIXES, [task.name for task in data.tasks])
        say(f"The model is in {args.output_dir}.")


def show_progress_of_package(should_log: bool) -> None:
    """Shows the messages of the package, down to those about progress; only errors, if another process shows them."""
    show_messages_of_package(logging.INFO if should_log else logging.ERROR)


def show_messages_of_package(level: int) -> None:
    """Shows the messages of the package from this level on."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mm_transformers").setLevel(level)
