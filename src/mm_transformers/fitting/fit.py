"""`fit`: from a table to a trained model, its report and its recipe."""

import io
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from transformers.utils import logging

from ..analysis.ablation.ablate import ablate
from ..analysis.report import write_report
from ..data.files import check_writable
from ..data.loading import load_files
from ..model.label_cells import is_null
from ..model.messages import one_line
from ..model.safe_writing import write_atomically
from ..training.checkpoints.lock import locked
from ..training.linear_start.study import DoubtfulLabel, Study
from ..training.linear_start.verdict import Verdict
from ..training.predictor import Predictor
from ..training.recipe import RECIPE_NAME, Recipe
from ..training.recipe.builders import RecipeData, build_trainer, load_data, training_arguments
from ..training.recipe.output_folder import check_output, is_finished
from ..training.recipe.run import run_recipe
from ..training.trainer import MMTrainer
from .encoder_choice import advice
from .plan import PRESETS, Plan, plan_fit
from .time_limit import TimeLimit, epochs_within


logger = logging.get_logger(__name__)

REPORT_NAME = "report.html"
# Rows in the report's ablation; more hardly change it.
_MOST_ABLATED = 2_000


@dataclass
class FitResult:
    """
    A model that [`fit`] has trained.

    Args:
        output (`Path`): The folder with the model, `recipe.yaml`, the model card and `report.html`.
        plan ([`Plan`]): What each column was taken for, and the recipe.
        metrics (`dict[str, dict]`): "validation" and "test" -> metrics, such as `test_price_r2`.
        verdicts (`list[Verdict]`): Per task: the score on the test rows beside a linear model, a linear model of the
            text alone and the majority.
        doubtful (`dict[str, list[DoubtfulLabel]]`): Task -> labels of training rows that may be wrong.
        seconds (`float`): How long it took.

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
    _predictor: Predictor | None = field(default=None, repr=False)

    @property
    def predictor(self) -> Predictor:
        """The [`Predictor`] of the model."""
        if self._predictor is None:
            recipe = self.plan.recipe
            options = {**recipe.columns.collator_options, **recipe.data.collator_options}
            self._predictor = Predictor.from_pretrained(self.output, **options)
        return self._predictor

    def predict(self, rows: Any) -> list[dict[str, Any]]:
        """
        The answers to new rows, with the columns of the training table.

        Args:
            rows: a `DataFrame`, a `datasets.Dataset` or a list of dicts.

        Returns:
            One dict per row: task -> answer, as from [`Predictor`].
        """
        return list(self.predictor(rows))


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
    report: bool = True,
    training: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> FitResult:
    """
    Trains a model on a table and measures it on held-out rows.

    It looks at each column and says what it takes it for: text, picture, video, sound, number, date or category. From
    the columns in `predict` it makes one task each. 15% of the rows are held out for the choice of the weights, and
    15% for the test, if these are not given. Rows of one picture or text stay on one side.

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
            `"balanced"` trains the encoders for up to 5 epochs, `"best"` for up to 20. All stop early.
        minutes (`float`, *optional*): The time for everything. The training gets as many epochs as fit; if not even one
            does, the encoders stay as they are.
        group (`str`, *optional*): A column whose equal cells stay on one side of the split, such as an author.
        image_root (`str`, *optional*): Where relative paths begin; by default at the folder of the table.
        allow_urls: as in [`MMDataCollator`].
        report (`bool`, *optional*, defaults to `True`): Whether to write `report.html`.
        training (`dict`, *optional*): Fields of [`MMTrainingArguments`].
        say (*optional*): A function that prints a line.

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
    if PartialState().num_processes > 1:
        raise ValueError("fit runs in one process. Write the recipe by `init`, and train by it in several.")
    output = Path(output)
    plan = make_plan(
        table, predict, output, validation=validation, test=test, columns=columns, text=text, vision=vision,
        audio=audio, preset=preset, group=group, image_root=image_root, training=training,
    )  # fmt: skip
    for line in plan.lines():
        say(line)
    recipe, study = plan.recipe, Study()
    args = training_arguments(recipe)
    check_output(recipe)
    with locked(args.output_dir) if not is_finished(args) else nullcontext():
        data = load_data(recipe, args)
        study.rows = data.splits.get("test")
        count = ", ".join(f"{len(rows):,} {split}" for split, rows in data.splits.items())
        say(f"Rows: {count}.")
        if end is not None and not is_finished(args):
            recipe, args = _within(recipe, args, data, end, allow_urls, say)
            plan = replace(plan, recipe=recipe)
        recipe.save(output)
        callbacks = [] if end is None else [TimeLimit(end - _REPORT_SHARE * 60 * (minutes or 0))]
        try:
            run = run_recipe(recipe, args, data, allow_urls, say, study, callbacks)
        except OSError as error:
            raise _without_encoder(error, recipe) from error
        trainer = run.trainer
        if trainer is None:
            trainer = build_trainer(recipe, args, data, saved=output, allow_urls=allow_urls)
    verdicts = _measured(study.verdicts, run.metrics.get("test", {}))
    for verdict in verdicts:
        say(str(verdict))
    _tell_doubtful(study.doubtful, say)
    if report and "test" in data.splits:
        _report(trainer, data, verdicts, study, output / REPORT_NAME)
    seconds = time.monotonic() - began
    say(f"The model is in {output}, after {seconds / 60:.1f} minutes.")
    return FitResult(output, plan, run.metrics, verdicts, study.doubtful, seconds)


def make_plan(
    table: Any,
    predict: Sequence[str],
    output: str | os.PathLike[str],
    *,
    validation: Any = None,
    test: Any = None,
    image_root: str | None = None,
    **options: Any,
) -> Plan:
    """
    The decisions of [`fit`], without a training.

    Args:
        table, predict, output, validation, test, image_root: as in [`fit`]. Rows that are no file are written into the
            folder `output`, since a recipe names files.
        options: of [`plan_fit`].

    Raises:
        ValueError, OSError: one sentence.
    """
    output = Path(output)
    check_writable(output / RECIPE_NAME)
    files = {
        split: str(_as_file(rows, output / "rows" / f"{split}.parquet"))
        for split, rows in {"train": table, "validation": validation, "test": test}.items()
        if rows is not None
    }
    data: dict[str, Any] = {split: os.path.abspath(path) for split, path in files.items()}
    if image_root is None and not isinstance(table, (str, os.PathLike)):
        image_root = os.getcwd()  # as everywhere for paths in memory
    if image_root is not None:
        data["image_root"] = os.path.abspath(image_root)
    rows = load_files({"train": files["train"]}, (), option="The table")["train"]
    return plan_fit(rows, predict, output, data, root=image_root or Path(files["train"]).parent, **options)


def _as_file(rows: Any, path: Path) -> str | os.PathLike[str]:
    """
    The file of a table; rows in memory are written to `path`.

    Raises:
        ValueError: if a model in the folder was trained on other rows.
    """
    if isinstance(rows, (str, os.PathLike)):
        return rows
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(f"The table has the splits {', '.join(rows)}: give them as table, validation= and test=.")
    if not isinstance(rows, datasets.Dataset):
        records = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        rows = datasets.Dataset.from_list([_plain(record) for record in records])
    content = io.BytesIO()
    rows.to_parquet(content)
    if path.is_file() and path.read_bytes() == content.getvalue():
        return path
    if path.exists() and (path.parent.parent / RECIPE_NAME).exists():
        raise ValueError(f"{path.parent.parent} holds the recipe of a training on other rows; choose another output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(content.getvalue())
    return path


def _plain(record: Mapping[Any, Any]) -> dict[str, Any]:
    # In pandas, NaN stands for a missing cell of any type.
    return {str(name): None if is_null(cell) else cell for name, cell in record.items()}


# The share of the time that is left for the test and the report.
_REPORT_SHARE = 0.15


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
    except OSError as error:
        raise _without_encoder(error, recipe) from error
    left, most = end - time.monotonic(), args.num_train_epochs
    epochs = epochs_within(trainer, left, most)
    encoders = [name for name in ("text", "vision", "audio") if recipe.model.get(name)]
    if epochs < 1 and encoders and not recipe.model.get("freeze"):
        say("The time is too short to train the encoders for one epoch, so they stay as they are.")
        cache = str(Path(args.output_dir) / "features")
        model, section = {**recipe.model, "freeze": encoders}, replace(recipe.data, feature_cache=cache)
        epochs = PRESETS["fast"].training["num_train_epochs"]
        recipe = replace(recipe, model=model, data=section)
    elif epochs < most:
        epochs = max(epochs, 1.0)
        say(f"{epochs:.0f} epochs fit into the time.")
    recipe = replace(recipe, training={**recipe.training, "num_train_epochs": epochs})
    return recipe, training_arguments(recipe)


def _without_encoder(error: OSError, recipe: Recipe) -> OSError:
    named = next((name for name in ("text", "vision", "audio") if str(recipe.model.get(name)) in str(error)), None)
    if named is None:
        return error
    return OSError(f"The {named} encoder cannot be loaded: {one_line(error, 300)} {advice(named)}")


def _measured(verdicts: Mapping[str, Verdict], metrics: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on the test rows, with the scores of the trained model there."""
    return [
        replace(verdict, model=metrics.get(f"test_{name}_{verdict.metric}"), rows="test")
        for name, verdict in verdicts.items()
    ]


def _tell_doubtful(doubtful: Mapping[str, Sequence[DoubtfulLabel]], say: Callable[[str], None]) -> None:
    for name, labels in doubtful.items():
        if labels:
            say(f"{name}: {len(labels):,} labels of training rows may be wrong; {REPORT_NAME} lists the first.")


def _report(trainer: MMTrainer, data: RecipeData, verdicts: list[Verdict], study: Study, path: Path) -> None:
    model, collator, rows = trainer.fused_model.eval(), trainer.data_collator.uncached, data.splits["test"]
    ablation = None
    if len(model.config.modalities) > 1:
        some = rows.select(range(min(len(rows), _MOST_ABLATED)))
        ablation = ablate(
            model, collator.processor, some, collator=collator, batch_size=trainer.args.eval_batch_size,
            compute_metrics=trainer.compute_metrics,
        )  # fmt: skip
    doubtful = _with_texts(study.doubtful, data, collator)
    write_report(
        path, model, collator.processor, rows, ablation=ablation, collator=collator, title=path.parent.name,
        batch_size=trainer.args.eval_batch_size, verdicts=verdicts, doubtful=doubtful,
    )  # fmt: skip


def _with_texts(
    doubtful: Mapping[str, Sequence[DoubtfulLabel]], data: RecipeData, collator: Any
) -> dict[str, list[Any]]:
    """Task -> doubtful labels, each with the cells of its row in short."""
    rows = data.splits["train"]
    inputs = [name for name in collator.input_columns if name in rows.column_names]
    plain = rows.select_columns(inputs)
    return {name: [(label, _shown(plain, label.row)) for label in labels] for name, labels in doubtful.items()}


def _shown(rows: datasets.Dataset, number: int) -> str:
    row = rows.with_format("arrow")[number].to_pylist()[0]
    cells = ((name, cell.get("path") if isinstance(cell, dict) else cell) for name, cell in row.items())
    return "; ".join(f"{name}: {cell}" for name, cell in cells if isinstance(cell, (str, int, float)))[:200]
