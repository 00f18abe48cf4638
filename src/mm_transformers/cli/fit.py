"""`mm-transformers fit` and `init`: from a table to a trained model, or to its recipe."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..fitting.fit import fit
from ..fitting.fit_report import REPORT_NAME
from ..fitting.folds import FOLDS_NAME
from ..fitting.plan import make_plan
from ..training.card.card_file import CARD_NAME
from ..training.recipe import RECIPE_NAME
from .processes import say
from .progress import RichProgressCallback, one_bar_at_a_time
from .train import show_messages_of_package


def columns_to_predict(text: str) -> list[str]:
    """The columns of `--predict a,b`. A comma within a name is written as `\\,`."""
    parts = text.replace("\\,", "\0").split(",")
    return [part.replace("\0", ",").strip() for part in parts if part.strip()]


def kinds_of_columns(options: Sequence[str]) -> dict[str, str]:
    """
    Column -> kind, from options `name:kind`.

    Raises:
        ValueError: if an option has no colon.
    """
    found = {}
    for option in options:
        name, colon, kind = option.rpartition(":")
        if not colon or not name:
            raise ValueError(f"--column takes a column and a kind, as in zip:category, but got {option!r}.")
        found[name] = kind
    return found


def run_fit(table: Path, predict: str, output: Path, column: Sequence[str], **options: Any) -> None:
    """
    Trains on a table and says what to do next.

    Raises:
        ValueError, OSError: one sentence.
    """
    show_messages_of_package(logging.WARNING)
    bar = RichProgressCallback("training", Console(stderr=True))
    try:
        with one_bar_at_a_time():
            result = fit(
                table, columns_to_predict(predict), output, columns=kinds_of_columns(column), say=say,
                print_logs=False, callbacks=[bar], **options,
            )  # fmt: skip
    finally:
        bar.progress.stop()  # otherwise an error leaves the terminal without a cursor
    files = (RECIPE_NAME, REPORT_NAME, FOLDS_NAME, CARD_NAME)
    say(f"Beside the model are {', '.join(name for name in files if (output / name).is_file())}.")
    report = f"open {output / REPORT_NAME}"
    say(f"Next: {report if (output / REPORT_NAME).is_file() else f'read {output / CARD_NAME}'}")
    say(f"      mm-transformers predict {output} new-rows.csv --output answers.csv")
    say(f"      mm-transformers demo --ui --model {result.output}")


def run_init(table: Path, predict: str, output: Path, column: Sequence[str], **options: Any) -> None:
    """
    Writes the recipe of a training on a table.

    Raises:
        ValueError, OSError: one sentence.
    """
    plan = make_plan(table, columns_to_predict(predict), output, columns=kinds_of_columns(column), **options)
    for line in plan.lines():
        say(line)
    output.mkdir(parents=True, exist_ok=True)
    plan.recipe.save(output)
    say(f"Wrote {output / RECIPE_NAME}. Train by it: mm-transformers train {output / RECIPE_NAME}")
