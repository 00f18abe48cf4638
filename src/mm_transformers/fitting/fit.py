"""`fit`: from a table to a trained model, its report and its recipe."""

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ..data.loading import SPLITS
from ..training.checkpoints.lock import locked
from ..training.linear_start.study import DoubtfulLabel, Study
from ..training.linear_start.verdict import Verdict
from ..training.predictor import Predictor
from ..training.recipe.builders import build_trainer, load_data, training_arguments
from ..training.recipe.output_folder import check_output, is_finished
from .asked_recipe import keep_asked, recipe_of_folder
from .fit_report import REPORT_NAME, in_table, score_lines, tell_doubtful, with_test_scores, write_fit_report
from .folds import CrossValidation, cross_validate
from .plan import HELD_OUT, Plan, make_plan
from .table_files import keep_from_hub
from .timed_run import fit_into_time, run_in_time


@dataclass
class FitResult:
    """
    A model that [`fit`] has trained.

    Args:
        output (`Path`): The folder with the model, `recipe.yaml`, the model card and `report.html`.
        plan ([`Plan`]): What each column was taken for, and the recipe.
        metrics (`dict[str, dict]`): "validation" and "test" -> metrics, such as `test_price_mae`.
        verdicts (`list[Verdict]`): Per task: the score on the test rows beside a linear model, a linear model of the
            text alone and the majority. With folds, the means over the folds.
        doubtful (`dict[str, list[DoubtfulLabel]]`): Task -> labels of training rows that may be wrong. `row` is the
            number of the row in the table, from 0. Rows without any content are not counted.
        seconds (`float`): How long it took.
        allow_urls (*optional*, defaults to `False`): As in [`MMDataCollator`], for `predict`.
        cross_validation ([`CrossValidation`], *optional*): The scores on the folds, with `folds=...`.

    Example:

    ```python
    >>> result = fit("listings.csv", ["category"], "my-listings", text="my-text-encoder", training={"max_steps": 1})
    >>> result.predict([{"title": "Old chair", "year": 1962}])[0]["category"]["label"] in ("chairs", "lamps")
    True
    ```
    """

    output: Path
    plan: Plan
    metrics: dict[str, dict[str, Any]]
    verdicts: list[Verdict]
    doubtful: dict[str, list[DoubtfulLabel]]
    seconds: float
    allow_urls: bool | Collection[str] = False
    cross_validation: CrossValidation | None = None
    _predictor: Predictor | None = field(default=None, repr=False)

    @property
    def predictor(self) -> Predictor:
        """The [`Predictor`] of the model."""
        if self._predictor is None:
            recipe = self.plan.recipe
            options = {**recipe.columns.collator_options, **recipe.data.collator_options}
            self._predictor = Predictor.from_pretrained(self.output, allow_urls=self.allow_urls, **options)
        return self._predictor

    def predict(self, rows: Any) -> list[dict[str, Any]]:
        """
        The answers to new rows, with the columns of the training table.

        Args:
            rows: a `DataFrame`, a `datasets.Dataset` or a list of dicts. Columns that a row lacks are missing cells.

        Returns:
            One dict per row: task -> answer, as from [`Predictor`].
        """
        missing = dict.fromkeys(self.predictor.collator.input_columns)
        batches = self.predictor.stream(rows, prepare=lambda row: {**missing, **row})
        return [answers for batch in batches for _, answers in batch]


def fit(
    table: Any,
    predict: Sequence[str],
    output: str | os.PathLike[str] = "fitted-model",
    *,
    validation: Any = None,
    test: Any = None,
    columns: Mapping[str, str] | None = None,
    text: str | None = None,
    vision: str | None = None,
    audio: str | None = None,
    preset: str = "balanced",
    minutes: float | None = None,
    group: str | None = None,
    image_root: str | None = None,
    allow_urls: bool | Collection[str] = False,
    on_bad_file: str = "raise",
    validation_fraction: float | None = HELD_OUT,
    test_fraction: float | None = HELD_OUT,
    folds: int | None = None,
    report: bool = True,
    training: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    print_logs: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> FitResult:
    """
    Trains a model on a table and measures it on held-out rows.

    It looks at each column and says what it takes it for: text, picture, video, sound, number, date or category. From
    the columns in `predict` it makes one task each. 15% of the rows are held out for the choice of the weights, and
    15% for the test, if these are not given. Rows of one picture, sound or video stay on one side, and rows of one text
    unless it is frequent.

    The folder `output` then holds the model, `recipe.yaml` with all decisions, a model card, and `report.html`.

    Args:
        table: a path to CSV, JSON lines or Parquet; a pandas `DataFrame`; a `datasets.Dataset`; or a list of dicts.
        predict (`list[str]`): The columns to predict, such as `"price"`, or `"price:regression"` to say the kind.
        output (`str`, *optional*, defaults to `"fitted-model"`): The folder of the model.
        validation, test (*optional*): Rows like `table`, instead of held-out ones.
        columns (`dict[str, str]`, *optional*): Column -> kind, where the guess is wrong: `"text"`, `"image"`,
            `"video"`, `"audio"`, `"number"`, `"date"`, `"category"` or `"ignore"`.
        text, vision, audio (`str`, *optional*): Pretrained encoders, by Hub id or folder. By default one from the cache
            of the Hub, or a small one that is downloaded.
        preset (`str`, *optional*, defaults to `"balanced"`): `"fast"` trains on stored outputs of the encoders,
            `"balanced"` trains the encoders of texts and sounds for up to 5 epochs, `"best"` for up to 20. All stop
            early.
        minutes (`float`, *optional*): The time for everything. The training gets as many epochs as fit; if not even one
            does, the encoders stay as they are. If they cannot read all rows in the time, a random choice is used.
            The same call again keeps this choice, also with less time. With more time, more epochs are trained.
        group (`str`, *optional*): A column whose equal cells stay on one side of the split, such as an author.
        image_root (`str`, *optional*): Where relative paths begin; by default at the folder of the table.
        allow_urls: as in [`MMDataCollator`].
        on_bad_file (`str`, *optional*, defaults to `"raise"`): What to do if a picture, video or sound cannot be read:
            `"raise"` stops, `"drop"` treats it as missing.
        validation_fraction, test_fraction (`float`, *optional*, defaults to 0.15): The shares of the rows to hold out.
            `None` holds out none; without test rows there is no report.
        folds (`int`, *optional*): Measures by cross-validation instead of test rows. One model per fold is trained on
            the other folds, measured and removed. Then the model is trained on all rows, but for validation rows.
            Rows of one picture, sound, video or group are in one fold, and rows of one text unless it is frequent. If
            this call was interrupted, the same call again keeps the folds that are done.
        report (`bool`, *optional*, defaults to `True`): Whether to write `report.html`.
        training (`dict`, *optional*): Fields of [`MMTrainingArguments`].
        say (*optional*): A function that prints a line.
        print_logs (`bool`, *optional*, defaults to `True`): Whether the progress bar of [`~transformers.Trainer`], its
            losses and its metrics are printed.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks of the trainings.

    Returns:
        [`FitResult`]

    Raises:
        ValueError, OSError: one sentence, if a column is missing or cannot be predicted, or an encoder cannot be
            loaded.

    Example:

    ```python
    >>> result = fit("listings.csv", ["category", "price"], "listings-model", text="my-text-encoder")
    >>> result.predict([{"title": "Old chair", "year": 1962}])
    ```
    """
    began = time.monotonic()
    end = None if minutes is None else began + 60 * minutes
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes must be above 0, but is {minutes}.")
    if folds is not None and folds < 2:
        raise ValueError(f"The number of folds must be at least 2, but is {folds}.")
    if PartialState().num_processes > 1:
        raise ValueError("fit runs in one process. Write the recipe by `init`, and train by it in several.")
    output = Path(output)
    plan = make_plan(
        table, predict, output, validation=validation, test=test, columns=columns, text=text, vision=vision,
        audio=audio, preset=preset, group=group, image_root=image_root, on_bad_file=on_bad_file,
        validation_fraction=validation_fraction, test_fraction=test_fraction if folds is None else None,
        training=training,
    )  # fmt: skip
    for line in plan.lines():
        say(line)
    begun = None if minutes is None else recipe_of_folder(plan.recipe, minutes)
    if begun is not None and begun != plan.recipe:
        say("An earlier call has shortened this training; its rows and epochs are kept.")
    recipe, study, crossed = begun or plan.recipe, Study(), None
    args = training_arguments(recipe)
    check_output(recipe)
    with locked(args.output_dir) if not is_finished(args) else nullcontext():
        keep_from_hub(output)
        if folds is not None:
            crossed = cross_validate(
                plan.recipe, folds, end=end, allow_urls=allow_urls, say=say, print_logs=print_logs, callbacks=callbacks
            )
        data = load_data(recipe, args)
        count = ", ".join(f"{len(data.splits[split]):,} {split}" for split in SPLITS if split in data.splits)
        say(f"Rows: {count}.")
        if end is not None and begun is None and not is_finished(args):
            recipe, args, data = fit_into_time(recipe, args, data, end, allow_urls=allow_urls, say=say)
            check_output(recipe)  # it may hold a training with all rows, or with trained encoders
        if begun is None:
            keep_asked(plan.recipe, recipe, minutes)
        study.rows = data.splits.get("test")
        run = run_in_time(
            recipe, args, data, study, end=end, allow_urls=allow_urls, say=say, print_logs=print_logs,
            callbacks=callbacks,
        )  # fmt: skip
        plan = replace(plan, recipe=recipe)
        trainer = run.trainer
        if trainer is None:
            trainer = build_trainer(recipe, args, data, saved=output, allow_urls=allow_urls)
    verdicts = with_test_scores(study.verdicts, run.metrics.get("test", {}))
    for line in score_lines(verdicts) if crossed is None else crossed.lines():
        say(line)
    verdicts = verdicts if crossed is None else crossed.verdicts
    tell_doubtful(study.doubtful, say)
    rows = data.splits.get("test") if crossed is None else data.splits.get("test", data.splits.get("validation"))
    if report and rows is not None:
        scores = None if crossed is None else crossed.table()
        write_fit_report(trainer, data, rows, verdicts, study, output / REPORT_NAME, scores)
    seconds = time.monotonic() - began
    say(f"The model is in {output}, after {seconds / 60:.1f} minutes.")
    doubtful = {name: [in_table(label, data) for label in labels] for name, labels in study.doubtful.items()}
    return FitResult(output, plan, run.metrics, verdicts, doubtful, seconds, allow_urls, crossed)
