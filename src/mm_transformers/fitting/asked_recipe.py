"""The recipe that was asked for, beside that of a training which a time limit has shortened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model.safe_writing import write_atomically
from ..training.recipe import RECIPE_NAME, Recipe
from ..training.recipe.output_folder import holds_training
from ..training.recipe.yaml_format import dump_yaml, read_yaml


ASKED_NAME = "recipe_asked.yaml"
# What a time limit changes in a recipe.
_SHORTENED = {
    "data": ("feature_cache", "max_train_samples", "max_eval_samples"),
    "model": ("freeze",),
    "training": ("num_train_epochs",),
}


def keep_asked(asked: Recipe, used: Recipe, minutes: float | None) -> None:
    """
    Writes the recipe that was asked for and its time limit into the output folder, if another one is used.

    If the same one is used, the file of an earlier call is removed.
    """
    folder = Path(used.training["output_dir"])
    if asked.to_dict() == used.to_dict():
        (folder / ASKED_NAME).unlink(missing_ok=True)
        return
    with write_atomically(folder / ASKED_NAME) as file:
        file.write(dump_yaml({"minutes": minutes, "recipe": asked.to_dict()}).encode())


def recipe_of_folder(asked: Recipe, minutes: float) -> Recipe | None:
    """
    The recipe of the training in the output folder, if it is the one that is asked for, or its shortened form.

    A shortened form counts for the same or a smaller time limit. With more time, more can be trained.

    Args:
        minutes: the time limit.

    Raises:
        ValueError: one sentence, if a recipe in the folder cannot be read, or if more time needs another folder.
    """
    folder = Path(asked.training["output_dir"])
    if not holds_training(folder) or not (folder / RECIPE_NAME).is_file():
        return None
    used = Recipe.from_dict(read_yaml(folder / RECIPE_NAME))
    if used.to_dict() == asked.to_dict():
        return asked
    limit = _limit_before(asked, folder)
    shortened = _with_limits_of(used, asked)
    if limit is None or shortened.to_dict() != used.to_dict():
        return None
    if minutes <= limit:
        return shortened
    if asked.differences(used):
        raise ValueError(
            f"{folder} holds a training that a limit of {limit:g} minutes has changed: fewer rows, or frozen encoders; "
            f"for a limit of {minutes:g} minutes, train into another folder, or remove {folder}."
        )
    return None


def _limit_before(asked: Recipe, folder: Path) -> float | None:
    """The time limit in minutes of the earlier call that asked for the same recipe; `None` if there was none."""
    if not (folder / ASKED_NAME).is_file():
        return None
    values = read_yaml(folder / ASKED_NAME)
    minutes, recipe = values.get("minutes"), values.get("recipe")
    if not isinstance(minutes, (int, float)) or not isinstance(recipe, dict):
        return None
    return minutes if Recipe.from_dict(recipe).to_dict() == asked.to_dict() else None


def _with_limits_of(used: Recipe, asked: Recipe) -> Recipe:
    """The recipe that is asked for, with secrets, and with what a time limit has changed in the used one."""

    def taken(section: str, values: dict[str, Any]) -> dict[str, Any]:
        return {key: values[key] for key in _SHORTENED[section] if key in values}

    return replace(
        asked,
        data=replace(asked.data, **taken("data", vars(used.data))),
        model={**asked.model, **taken("model", used.model)},
        training={**asked.training, **taken("training", used.training)},
    )
