"""Builds the arguments, the data and the trainer of a recipe."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ...data.collator import MMDataCollator
from ...data.labels import check_labels, complete_task, prepare_labels
from ...data.loading import (
    SPLITS,
    check_columns,
    hold_out,
    leave_out_empty_rows,
    load_files,
    load_named,
    sample_places,
    sample_rows,
)
from ...data.row_labels import as_columns
from ...data.splitting import Part
from ...data.table_columns import are_numbers, table_columns
from ...model.encoders import HUB_KWARGS
from ...model.messages import one_line
from ...model.modalities import PARTS, own_encoders
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.table import TableConfig
from ...model.table_kinds import COLUMNS
from ...model.tasks import Task
from ..arguments import MMTrainingArguments
from ..trainer import MMTrainer
from .recipe import Recipe
from .table_hashes import hashes_of_tables, save_hashes


class EncoderError(OSError):
    """
    An encoder cannot be loaded.

    Args:
        encoder: "text", "vision" or "audio".
        message: of the error that was raised.
    """

    def __init__(self, encoder: str, message: str):
        super().__init__(message)
        self.encoder = encoder


class RecipeData(NamedTuple):
    """
    The rows of "train", perhaps of "validation" and "test", and what training rows determine.

    Args:
        splits: split -> rows.
        tasks: the tasks with all of their labels.
        whole: split -> all of its rows, before a limit, with their numbers in their table. Rows of the table without
            any content are not counted.
        table: the columns of numbers and categories with their statistics; `None` without such columns.
        train_numbers (num_rows,): the numbers of the training rows in their table.
    """

    splits: dict[str, datasets.Dataset]
    tasks: list[Task]
    whole: dict[str, Part]
    table: TableConfig | None = None
    train_numbers: np.ndarray = np.zeros(0, np.int64)


def training_arguments(recipe: Recipe) -> MMTrainingArguments:
    """
    The training arguments of a recipe.

    Raises:
        ValueError: from transformers, if values do not fit each other.
    """
    try:
        return MMTrainingArguments(**recipe.training)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The training options are not valid: {one_line(error, 1000)}") from error


def load_data(recipe: Recipe, args: MMTrainingArguments) -> RecipeData:
    """
    The rows of a recipe. One process prepares them in the cache of `datasets`; the others read them there.

    Raises:
        ValueError: one sentence, if a file or column is missing, or a column does not fit its task.
    """
    return split_data(recipe, *load_rows(recipe, args))


def load_rows(recipe: Recipe, args: MMTrainingArguments) -> tuple[datasets.DatasetDict, list[Task]]:
    """
    The rows of [`load_data`] before any are held out, and the tasks with all of their labels.

    Raises:
        ValueError: as [`load_data`].
    """
    data, columns, cache_dir = recipe.data, recipe.columns, recipe.model.get("cache_dir")
    with args.main_process_first(desc="reading the data"):
        if data.dataset_name is not None:
            splits = load_named(data.dataset_name, data.dataset_config_name, cache_dir)
        else:
            splits = load_files(data.files, columns.files, data.image_root, cache_dir, option="data.{split}")
        for column in as_columns(columns.text):
            check_columns(splits, {"columns.text": (column,)})
        wanted: dict[str, tuple[str, ...]] = {}
        for name, encoder in (("image", "vision"), ("audio", "audio")):
            several = getattr(columns, name)
            if recipe.model.get(encoder) is not None and isinstance(several, list):
                for column in several:
                    check_columns(splits, {f"columns.{name}": (column,)})
        if recipe.model.get("vision") is not None:
            wanted["columns.image (or columns.video)"] = (*as_columns(columns.image), columns.video)
        if recipe.model.get("audio") is not None:
            wanted["columns.audio"] = tuple(as_columns(columns.audio))
        check_columns(splits, wanted)
        for column in columns.table or ():
            check_columns(splits, {"columns.table": (column,)})
        splits = prepare_labels(splits, recipe.tasks)
    numbers = leave_out_empty_rows(splits, _read_columns(recipe), _number_columns(recipe, splits["train"]))
    # Before rows are held out: they may hold the only rows of a rare label.
    tasks = [complete_task(task, splits["train"], data.label_separator) for task in recipe.tasks]
    check_labels(splits, tasks, columns.text, data.label_separator, numbers)
    return splits, tasks


def split_options(recipe: Recipe) -> dict[str, Any]:
    """The options of [`hold_out_rows`] that a recipe sets."""
    data, columns = recipe.data, recipe.columns
    options = {"label_separator": data.label_separator, "group_column": data.group_column}
    return {**columns.plain, "own_columns": columns.own, **options}


def split_data(recipe: Recipe, splits: datasets.DatasetDict, tasks: list[Task]) -> RecipeData:
    """
    Holds out the rows of missing splits, and measures the columns of numbers and categories.

    Args:
        splits: split -> prepared rows; it is not changed.
        tasks: the tasks with all of their labels.

    Raises:
        ValueError: one sentence, if no rows can be held out.
    """
    data, splits = recipe.data, datasets.DatasetDict(splits)
    options = split_options(recipe)
    count = len(splits["train"])
    whole = {split: Part(rows, range(len(rows))) for split, rows in splits.items()}
    for split, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if fraction is None:
            continue
        # Both are shares of all rows, of which the training rows are what is left.
        parts = hold_out(splits, fraction * count / len(splits["train"]), options, tasks, split)
        if parts is not None:
            numbers = whole["train"].places
            for name, part in zip(("train", split), parts, strict=True):
                whole[name] = Part(part.rows, [numbers[place] for place in part.places])
    return limited_data(recipe, RecipeData(dict(splits), tasks, whole))


def limited_data(recipe: Recipe, data: RecipeData, shorten: Collection[str] = SPLITS) -> RecipeData:
    """
    As many rows of each split as the recipe allows, and the columns of numbers and categories in them.

    Args:
        data: perhaps with other limits. All limits choose among all rows, so another call chooses the same ones.
        shorten: the splits to limit.
    """
    section, columns = recipe.data, recipe.columns
    limits = dict.fromkeys(SPLITS, section.max_eval_samples) | {"train": section.max_train_samples}
    chosen = {split: sample_rows(part.rows, limits[split]) for split, part in data.whole.items() if split in shorten}
    splits = {split: chosen.get(split, rows) for split, rows in data.splits.items()}
    table = None
    if columns.table:
        # Of the training rows alone: validation and test rows are new to the model.
        table = table_columns(splits["train"], columns.table, **(recipe.model.get("table") or {}))
    numbers = data.train_numbers
    if "train" in shorten:
        numbers = np.asarray(data.whole["train"].places)
        numbers = numbers[sample_places(len(numbers), section.max_train_samples)]
    return RecipeData(splits, data.tasks, data.whole, table, numbers)


def _read_columns(recipe: Recipe) -> list[str]:
    """The columns that the model of a recipe reads."""
    columns, encoders = recipe.columns, recipe.model
    parts = (names for part, names in columns.by_modality.items() if encoders.get(PARTS[part].encoder.name) is not None)
    return [*as_columns(columns.text), *(column for names in parts for column in names), *(columns.table or ())]


def _number_columns(recipe: Recipe, rows: datasets.Dataset) -> list[str]:
    """The columns that the model will read as numbers or dates."""
    columns = recipe.columns.table or []
    kinds = columns if isinstance(columns, Mapping) else dict.fromkeys(columns)
    return [
        name
        for name, kind in kinds.items()
        if (COLUMNS[kind].is_number if kind in COLUMNS else kind is None and are_numbers(rows[name]))
    ]


def build_trainer(
    recipe: Recipe,
    args: MMTrainingArguments | None = None,
    data: RecipeData | None = None,
    saved: str | os.PathLike[str] | None = None,
    allow_urls: bool | Collection[str] = False,
    **kwargs: Any,
) -> MMTrainer:
    """
    The trainer of a recipe, with a new model of pretrained encoders.

    Args:
        recipe: all settings; change them with `dataclasses.replace`.
        args, data: those of the recipe, if they exist already.
        saved: folder of a model to load instead.
        allow_urls: as in [`MMDataCollator`]. A recipe cannot set it.
        kwargs: for [`MMTrainer`].

    Raises:
        ValueError: one sentence, if something does not fit.

    Example:

    ```python
    >>> from mm_transformers.training.recipe.builders import build_trainer
    >>> from mm_transformers.training.recipe import read_recipe

    >>> trainer = build_trainer(read_recipe("recipe.yaml", ["training.max_steps=100"]))
    >>> trainer.train()
    ```
    """
    args = training_arguments(recipe) if args is None else args
    data = load_data(recipe, args) if data is None else data
    set_seed(args.seed)
    if saved is not None:
        processor = MMTransformerProcessor.from_pretrained(saved)
        model = MMTransformerForMultiTask.from_pretrained(saved)
    else:
        names = ("text", "vision", "audio", *own_encoders())
        encoders: dict[str, Any] = {name: recipe.model.get(name) for name in names if recipe.model.get(name)}
        encoders |= {"text": recipe.model.get("text"), "table": data.table}
        # Otherwise transformers would ask at the keyboard.
        options: dict[str, Any] = {"trust_remote_code": False}
        options |= {name: value for name, value in recipe.model.items() if name not in encoders}
        known: dict[str, Any] = {name: options[name] for name in (*HUB_KWARGS, "num_frames") if name in options}
        known["image_size"] = options.pop("image_size", None)
        try:
            processor = MMTransformerProcessor.from_encoders(**encoders, backend=options.pop("backend", None), **known)
            model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=data.tasks, **options)
        except OSError as error:
            named = next((n for n, path in encoders.items() if isinstance(path, str) and path in str(error)), None)
            if named is None:
                raise
            raise EncoderError(named, str(error)) from error
        processor.input_columns = recipe.columns.by_key(model.config.modalities)
    reading: dict[str, Any] = {**recipe.columns.collator_options, **recipe.data.collator_options}
    collator = MMDataCollator(processor, model.config, allow_urls=allow_urls, **reading)
    return MMTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits.get("validation"),
        processing_class=processor,
        feature_cache=recipe.data.feature_cache,
        callbacks=[RecipeCallback(recipe), *kwargs.pop("callbacks", [])],
        **kwargs,
    )


class RecipeCallback(TrainerCallback):
    """Writes the recipe beside the model and beside each checkpoint, and hashes of the tables beside the model."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._hashes: dict[str, str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.recipe.save(Path(args.output_dir))
            # A resumed training has seen the rows of its beginning, and a second one follows on the same rows.
            if state.global_step == 0 and self._hashes is None:
                self._hashes = hashes_of_tables(self.recipe)
                save_hashes(Path(args.output_dir), self._hashes)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.recipe.save(folder)
