"""Cross-validation: scores of models that each leave one fold of the rows out."""

import copy
import dataclasses
import gc
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import TrainerCallback

from ..analysis.ablation.tables import Table
from ..data.folding import fold_numbers
from ..data.tables import table_writer
from ..model.safe_writing import write_atomically
from ..model.tasks import Task
from ..training.linear_start.study import Study
from ..training.linear_start.verdict import Verdict, shown_score
from ..training.metrics import result_names
from ..training.predictor import Predictor, answer_columns
from ..training.recipe import Recipe
from ..training.recipe.builders import load_rows, split_data, split_options, training_arguments
from ..training.recipe.table_hashes import hashes_of_tables
from .fit_report import with_test_scores
from .timed_run import fit_into_time, run_in_time


FOLDS_NAME = "folds.csv"
# Beside the model: the results of each fold, and while a fold is trained its model.
_FOLDER = "folds"


@dataclass
class Fold:
    """
    The scores on one fold, of a model that was trained without its rows.

    Args:
        number (`int`): From 1.
        num_rows (`int`): The rows of the fold.
        metrics (`dict`): Metrics, such as `test_price_mae`.
        verdicts (`list[Verdict]`): Per task: the score beside those of simple models, on the same rows.
        predictions (`list[dict]`): Per row: its number in the table, the fold, labels (`price_true`) and answers
            (`price_predicted`).
    """

    number: int
    num_rows: int
    metrics: dict[str, Any]
    verdicts: list[Verdict]
    predictions: list[dict[str, Any]]

    @property
    def scores(self) -> dict[str, float]:
        """The metrics without their prefix, such as `price_mae`."""
        return {
            name.removeprefix("test_"): float(value)
            for name, value in self.metrics.items()
            if name.startswith("test_") and isinstance(value, (int, float))
        }


@dataclass
class CrossValidation:
    """
    The scores on all folds.

    Args:
        folds (`list[Fold]`): One per fold.
        main_metrics (`dict[str, str]`): Task -> its first metric.
        predictions (`Path`): `folds.csv`: for each row of the table its number from 0, its fold, its labels, and the
            answers of the model that was trained without it.

    Example:

    ```python
    >>> result = fit("listings.csv", ["price"], "my-listings", folds=5)
    >>> result.cross_validation.mean["price_mae"], result.cross_validation.deviation["price_mae"]
    ```
    """

    folds: list[Fold]
    main_metrics: dict[str, str]
    predictions: Path

    @property
    def mean(self) -> dict[str, float]:
        """Metric -> the mean of its scores on the folds, such as `price_mae`."""
        return {name: statistics.fmean(values) for name, values in self._scores().items()}

    @property
    def deviation(self) -> dict[str, float]:
        """Metric -> the standard deviation of its scores on the folds (with n - 1)."""
        return {name: statistics.stdev(values) for name, values in self._scores().items() if len(values) > 1}

    @property
    def verdicts(self) -> list[Verdict]:
        """Per task: the means over the folds, for the model and the simple models."""
        by_task: dict[str, list[Verdict]] = {}
        for fold in self.folds:
            for verdict in fold.verdicts:
                by_task.setdefault(verdict.task, []).append(verdict)
        found = []
        for verdicts in by_task.values():
            scores: dict[str, Any] = {
                name: statistics.fmean(getattr(verdict, name) for verdict in verdicts)
                for name in ("model", "linear", "text_alone", "majority")
                if all(getattr(verdict, name) is not None for verdict in verdicts)
            }
            num_rows = sum(verdict.num_rows for verdict in verdicts)
            found.append(replace(verdicts[0], **scores, num_rows=num_rows, rows="out-of-fold"))
        return found

    def table(self) -> Table:
        """The main score of each task on each fold, then mean and standard deviation."""
        header = ["fold", "rows", *(f"{task} {metric}" for task, metric in self.main_metrics.items())]
        rows = [[str(fold.number), f"{fold.num_rows:,}", *self._shown(fold.scores)] for fold in self.folds]
        rows.append(["mean", f"{sum(fold.num_rows for fold in self.folds):,}", *self._shown(self.mean)])
        rows.append(["standard deviation", "", *self._shown(self.deviation)])
        return Table(header, rows, num_keys=1)

    def lines(self) -> Iterator[str]:
        """One line per task: the mean, the standard deviation, and the simple models."""
        verdicts = {verdict.task: verdict for verdict in self.verdicts}
        shown = zip(self.main_metrics.items(), self._shown(self.mean), self._shown(self.deviation), strict=True)
        for (task, metric), mean, deviation in shown:
            line = f"{task}: {mean} ± {deviation} {metric}, mean over {len(self.folds)} folds"
            if task in verdicts:
                verdict = verdicts[task]
                alone = "" if verdict.text_alone is None else f"text alone {verdict.shown(verdict.text_alone)}, "
                line += (
                    f" (linear start {verdict.shown(verdict.linear)}, {alone}majority "
                    f"{verdict.shown(verdict.majority)})"
                )
            yield line

    def _shown(self, scores: Mapping[str, float]) -> list[str]:
        return [shown_score(metric, scores.get(f"{task}_{metric}")) for task, metric in self.main_metrics.items()]

    def _scores(self) -> dict[str, list[float]]:
        """Metric of a task -> its scores on the folds where it was measured."""
        found: dict[str, list[float]] = {}
        for fold in self.folds:
            for name, score in fold.scores.items():
                if name.startswith(tuple(f"{task}_" for task in self.main_metrics)):
                    found.setdefault(name, []).append(score)
        return found


def cross_validate(
    recipe: Recipe,
    folds: int,
    *,
    end: float | None = None,
    allow_urls: bool | Collection[str] = False,
    say: Callable[[str], None] = print,
    print_logs: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> CrossValidation:
    """
    Trains one model per fold, on all other rows, and measures it on the fold. No model is kept.

    The result of each fold is written when it is done. The same call again reads the results that are there, and starts
    with the first fold without one.

    Args:
        recipe: of the model. Of the training rows of each fold, its share of validation rows is held out.
        folds: the number of folds, at least 2.
        end: the time, of `time.monotonic()`, for the folds and one more training; `None` for no limit.
        allow_urls: as in [`MMDataCollator`].
        say: prints a line.
        print_logs, callbacks: as in [`run_recipe`].

    Raises:
        ValueError, OSError: one sentence.
    """
    args = training_arguments(recipe)
    output = Path(args.output_dir)
    splits, tasks = load_rows(recipe, args)
    numbers = fold_numbers(splits["train"], folds, tasks=tasks, **split_options(recipe))
    folder, stamp = output / _FOLDER, _stamp(recipe, numbers)
    main_metrics = {task.name: result_names(task)[0] for task in tasks if task.metric_names}
    found: list[Fold] = []
    for number in range(1, folds + 1):
        file = folder / f"fold-{number}.json"
        fold = _read(file, stamp)
        if fold is not None:
            say(f"Fold {number} of {folds} has already been measured.")
        else:
            say(f"Fold {number} of {folds}: training on the other {(numbers != number - 1).sum():,} rows.")
            began = time.monotonic()
            slot = None if end is None else began + (end - began) / (folds - number + 2)
            fold = _measure(
                recipe, number, numbers, splits, tasks, folder / f"fold-{number}", slot, allow_urls, say, print_logs,
                callbacks,
            )  # fmt: skip
            with write_atomically(file) as target:
                target.write(json.dumps({"stamp": stamp, **dataclasses.asdict(fold)}).encode())
            shutil.rmtree(folder / f"fold-{number}", ignore_errors=True)
            scores = (
                f"{task} {shown_score(metric, fold.scores.get(f'{task}_{metric}'))} {metric}"
                for task, metric in main_metrics.items()
            )
            minutes = (time.monotonic() - began) / 60
            say(f"Fold {number} of {folds}: {', '.join(scores)} ({fold.num_rows:,} rows, {minutes:.1f} minutes).")
        found.append(fold)
    _write(output / FOLDS_NAME, found)
    return CrossValidation(found, main_metrics, output / FOLDS_NAME)


def _measure(
    recipe: Recipe,
    number: int,
    numbers: np.ndarray,
    splits: datasets.DatasetDict,
    tasks: list[Task],
    folder: Path,
    end: float | None,
    allow_urls: bool | Collection[str],
    say: Callable[[str], None],
    print_logs: bool,
    callbacks: Sequence[TrainerCallback],
) -> Fold:
    """Trains the model of a fold in a folder."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    rows, places = splits["train"], np.flatnonzero(numbers == number - 1)
    parts = datasets.DatasetDict(splits)
    parts |= {"train": rows.select(np.flatnonzero(numbers != number - 1)), "test": rows.select(places)}
    # Trackers would put all trainings of a process into one run.
    recipe = replace(recipe, training={**recipe.training, "output_dir": str(folder), "report_to": "none"})
    data = split_data(recipe, parts, copy.deepcopy(tasks))  # training decides on options of tasks
    args = training_arguments(recipe)
    if end is not None:
        # Each row gets an answer, so no test rows are left out.
        fitting = fit_into_time(
            recipe, args, data, end, allow_urls=allow_urls, say=say, shorten=("train", "validation")
        )
        recipe, args, data = fitting
    study = Study(data.splits["test"])
    run = run_in_time(
        recipe, args, data, study, end=end, allow_urls=allow_urls, say=say, print_logs=print_logs, callbacks=callbacks
    )
    assert run.trainer is not None
    collator = run.trainer.data_collator.uncached
    predictor = Predictor(run.trainer.fused_model, collator, batch_size=run.trainer.args.eval_batch_size)
    predictions = []
    keys = {f"{name}_predicted": of_answer for name, of_answer in predictor.answer_keys.items()}
    columns = {task.name: task.column or task.name for task in tasks}
    labels = parts["test"].select_columns(list(columns.values()))
    for place, cells, answers in zip(places.tolist(), labels, predictor(parts["test"]), strict=True):
        known = {f"{name}_true": cells[column] for name, column in columns.items()}
        answered = answer_columns({f"{n}_predicted": answer for n, answer in answers.items()}, answer_keys=keys)
        predictions.append({"row": place, "fold": number, **known, **answered})
    metrics = run.metrics["test"]
    del run, predictor, collator
    gc.collect()  # the model of this fold, before the next one is built
    return Fold(number, len(places), metrics, with_test_scores(study.verdicts, metrics), predictions)


def _stamp(recipe: Recipe, numbers: np.ndarray) -> str:
    """A hash of the recipe, the folds and the tables."""
    found = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode())
    found.update(numbers.tobytes())
    found.update(json.dumps(hashes_of_tables(recipe), sort_keys=True).encode())
    return found.hexdigest()


def _read(file: Path, stamp: str) -> Fold | None:
    """The result of a fold; `None` if there is none of this recipe and these rows."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("stamp") != stamp:
            return None
        return Fold(**{**values, "verdicts": [Verdict(**verdict) for verdict in values["verdicts"]]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, folds: Sequence[Fold]) -> None:
    """The answers to all rows, in the order of the table."""
    rows = sorted((row for fold in folds for row in fold.predictions), key=lambda row: row["row"])
    with write_atomically(path) as file:
        writer = table_writer(file, path.suffix, {})
        writer.write(rows)
        writer.close()
