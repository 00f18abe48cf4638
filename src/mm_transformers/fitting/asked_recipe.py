"""The recipe that was asked for, beside that of a training which a time limit has shortened."""

from dataclasses import replace
from pathlib import Path

from ..training.recipe import RECIPE_NAME, Recipe
from ..training.recipe.output_folder import holds_training
from ..training.recipe.yaml_format import read_yaml


ASKED_NAME = "recipe_asked.yaml"


def keep_asked(asked: Recipe, used: Recipe) -> None:
    """Writes the recipe that was asked for into the output folder, if another one is used."""
    folder = Path(used.training["output_dir"])
    if asked.to_dict() == used.to_dict():
        (folder / ASKED_NAME).unlink(missing_ok=True)
    else:
        asked.save(folder, ASKED_NAME)


def shortened_before(asked: Recipe) -> Recipe | None:
    """
    The recipe of the training in the output folder, if it is the shortened form of the one that is asked for.

    Raises:
        ValueError: one sentence, if a recipe in the folder cannot be read.
    """
    folder = Path(asked.training["output_dir"])
    if not holds_training(folder) or not all((folder / name).is_file() for name in (ASKED_NAME, RECIPE_NAME)):
        return None
    if Recipe.from_dict(read_yaml(folder / ASKED_NAME)).to_dict() != asked.to_dict():
        return None
    used = Recipe.from_dict(read_yaml(folder / RECIPE_NAME))
    # Files hold no secrets.
    model, training = {**asked.model, **used.model}, {**asked.training, **used.training}
    return replace(asked, data=used.data, model=model, training=training)
