"""Decides how to train on a table: what each column is for, which tasks, which encoders."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig

from ..data.cells import LABEL_SEPARATOR
from ..data.column_kinds import (
    AUDIO,
    FILE_KINDS,
    IGNORE,
    IMAGE,
    TEXT,
    VIDEO,
    ColumnKind,
    Target,
    check_names,
    column_kinds,
    target,
)
from ..data.files import check_writable
from ..data.loading import load_files
from ..data.media import check_on_bad_file
from ..model.messages import one_line
from ..model.table_kinds import COLUMNS
from ..model.tasks import TASK_KINDS
from ..training.recipe import RECIPE_NAME, Recipe
from .encoder_choice import choose_encoder
from .table_files import as_file


HELD_OUT = 0.15
# Modality of an encoder -> the kinds of columns that it reads.
_READ_BY = {"text": (TEXT,), "vision": (IMAGE, VIDEO), "audio": (AUDIO,)}


@dataclass(frozen=True)
class Preset:
    """
    How much work a training is.

    Args:
        training: fields of [`MMTrainingArguments`].
        trains_encoders: whether the encoders are trained; otherwise their outputs are stored once.
    """

    training: dict[str, Any] = field(default_factory=dict)
    trains_encoders: bool = True


PRESETS = {
    "fast": Preset({"num_train_epochs": 10.0}, trains_encoders=False),
    "balanced": Preset({"num_train_epochs": 5.0}),
    "best": Preset({"num_train_epochs": 20.0, "early_stopping_patience": 5}),
}


@dataclass
class Plan:
    """
    All decisions about a training on a table.

    Args:
        columns (`list[ColumnKind]`): What each column is taken for, targets left aside.
        targets (`list[Target]`): The tasks.
        recipe ([`Recipe`]): The training.
        unused (`list[str]`): The modalities whose encoder was named, but that no column has.
    """

    columns: list[ColumnKind]
    targets: list[Target]
    recipe: Recipe
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The decisions about the columns, one sentence each."""
        found = [
            f"{'leave out' if column.role == IGNORE else column.role:<9}  {column.name}: {column.reason}"
            for column in self.columns
        ]
        for predicted in self.targets:
            task = predicted.task
            name = task.get("column", task["name"])
            without = f"; {predicted.left_out:,} rows have no label" if predicted.left_out else ""
            found.append(f"predict    {name} ({task['kind'].replace('_', ' ')}): {predicted.reason}{without}")
        found += [f"not used   the {name} encoder: no column has its input" for name in self.unused]
        return found


def plan_fit(
    rows: datasets.Dataset,
    predict: Sequence[str],
    output: str | os.PathLike[str],
    data: Mapping[str, Any],
    *,
    columns: Mapping[str, str] | None = None,
    text: str | None = None,
    vision: str | None = None,
    audio: str | None = None,
    preset: str = "balanced",
    group: str | None = None,
    validation_fraction: float | None = HELD_OUT,
    test_fraction: float | None = HELD_OUT,
    root: str | os.PathLike[str] = ".",
    on_bad_file: str = "raise",
    training: Mapping[str, Any] | None = None,
) -> Plan:
    """
    Looks at a table and decides how to train on it.

    Args:
        rows: the training rows.
        predict: the columns to predict, as `"price"` or `"price:regression"`.
        output: the folder of the model.
        data: the files, as in the section `data` of a recipe.
        columns: column -> kind, for columns that you know better.
        text, vision, audio: encoders, by Hub id or folder; by default [`choose_encoder`] chooses those that are needed.
        preset: "fast", "balanced" or "best".
        group: a column whose equal cells stay on one side of the split.
        validation_fraction, test_fraction: the shares of the rows to hold out, if `data` has no such files; `None` for
            none.
        root: where relative paths of pictures and the like begin.
        on_bad_file: as in [`MMDataCollator`].
        training: fields of [`MMTrainingArguments`] that replace those of the preset.

    Raises:
        ValueError: one sentence, if a column or a kind does not exist, no column is left as an input, or a column
            cannot be predicted.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; the presets are {', '.join(PRESETS)}.")
    check_on_bad_file(on_bad_file)
    wanted = _targets(predict)
    for name in wanted:
        column, colon, kind = name.rpartition(":")
        if colon and name not in rows.column_names and column in rows.column_names:
            raise ValueError(
                f"--predict {name}: {kind!r} is no kind of task; the kinds are {', '.join(sorted(TASK_KINDS))}. Import "
                "the module of a kind of your own first (on the command line by --import)."
            )
    check_names(rows, wanted, "--predict")
    if group is not None:
        check_names(rows, [group], "--group")
    found = column_kinds(rows, wanted, columns, root)
    found = [_only_for_groups(column, group) for column in found]
    found = _one_video(found)
    given = {"text": text, "vision": vision, "audio": audio}
    encoders = {
        modality: given[modality] or choose_encoder(modality)
        for modality, kinds in _READ_BY.items()
        if any(column.role in kinds for column in found)
    }
    can_write = text is not None and "text" in encoders and _can_write(encoders["text"])
    targets = [target(rows, column, asked, can_write) for column, asked in wanted.items()]
    table = {column.name: column.role for column in found if column.role in COLUMNS}
    if not encoders and not table:
        raise ValueError(
            "No column is left to predict from: " + "; ".join(f"{column.name}: {column.reason}" for column in found)
            + ". Give a column a kind by --column name:kind."
        )  # fmt: skip
    separators = {target.separator for target in targets if target.separator is not None}
    if len(separators) > 1:
        raise ValueError(
            f"The columns to predict separate their labels in {len(separators)} ways "
            f"({', '.join(map(repr, sorted(separators)))}): use one of them."
        )
    chosen = PRESETS[preset]
    section: dict[str, Any] = {**data}
    if separators and separators != {LABEL_SEPARATOR}:
        section["label_separator"] = separators.pop()
    if group is not None:
        section["group_column"] = group
    section["on_bad_file"] = on_bad_file
    for split, share in (("validation", validation_fraction), ("test", test_fraction)):
        if split not in section and share is not None:
            section[f"{split}_fraction"] = share
    model: dict[str, Any] = dict(encoders)
    if not chosen.trains_encoders and encoders:
        model["freeze"] = list(encoders)
        section["feature_cache"] = str(Path(output).absolute() / "features")
    values = {
        "data": section,
        "columns": _columns_section(found, table),
        "model": model,
        "tasks": [target.task for target in targets],
        "training": {"output_dir": str(Path(output).absolute()), **chosen.training, **(training or {})},
    }
    unused = [modality for modality, name in given.items() if name and modality not in encoders]
    plan = Plan(found, targets, Recipe.from_dict(values), unused)
    plan.recipe.comment = [
        "Written by mm-transformers fit. Train again: mm-transformers train recipe.yaml training.output_dir=again",
        "Other kinds of columns: mm-transformers fit ... --column name:kind. What each column was taken for:",
        *(f"  {line}" for line in plan.lines()),
    ]
    return plan


def _targets(predict: Sequence[str]) -> dict[str, str | None]:
    """Column -> kind of task, if given."""
    if isinstance(predict, str) or not predict:
        raise ValueError("predict must be a list of columns, such as ['category', 'price'].")
    found: dict[str, str | None] = {}
    for name in predict:
        column, colon, kind = str(name).rpartition(":")
        if not colon or kind not in TASK_KINDS:  # the name of a column may have a colon
            column, kind = str(name), ""
        if column in found:
            raise ValueError(f"--predict names the column {column!r} twice.")
        found[column] = kind or None
    return found


def _only_for_groups(column: ColumnKind, group: str | None) -> ColumnKind:
    if column.name != group or column.is_said:
        return column
    return ColumnKind(column.name, IGNORE, "it groups the rows; held-out rows have other values")


def _one_video(columns: list[ColumnKind]) -> list[ColumnKind]:
    """Leaves out further columns of videos: a row has one. Pictures and sounds may have several columns."""
    first = next((column.name for column in columns if column.role == VIDEO), None)
    return [
        ColumnKind(column.name, IGNORE, f"a second column of videos beside {first}; a row has one video")
        if column.role == VIDEO and column.name != first
        else column
        for column in columns
    ]


def _columns_section(columns: Sequence[ColumnKind], table: Mapping[str, str]) -> dict[str, Any]:
    section: dict[str, Any] = {"text": None}
    for role in (TEXT, *FILE_KINDS):
        names = [column.name for column in columns if column.role == role]
        if names:
            section[role] = names[0] if len(names) == 1 else names
    if table:
        section["table"] = dict(table)
    return section


def _can_write(encoder: str) -> bool:
    try:
        return bool(AutoConfig.from_pretrained(encoder, trust_remote_code=False).is_encoder_decoder)
    except (OSError, ValueError) as error:
        raise ValueError(f"The text encoder {encoder} cannot be loaded: {one_line(error)}") from error


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
        split: str(as_file(rows, output / "rows" / f"{split}.parquet"))
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
