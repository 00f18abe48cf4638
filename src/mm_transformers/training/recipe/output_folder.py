"""The content of the output folder of a recipe: a model, checkpoints, the training state."""

import os
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ...data.files import check_writable
from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.messages import shortened
from ...model.tasks import Task
from ..arguments import MMTrainingArguments
from ..checkpoints import newest_complete_checkpoint
from .recipe import RECIPE_NAME, SECRETS, Recipe
from .yaml_format import read_yaml


def newest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    return newest_complete_checkpoint(folder, verify=True) if os.path.isdir(folder) else None


def holds_training(folder: Path) -> bool:
    """Whether a folder holds a model or checkpoints, complete or not."""
    return (folder / "config.json").is_file() or (folder.is_dir() and get_last_checkpoint(folder) is not None)


def check_output(recipe: Recipe) -> None:
    """
    Checks the output folder of a recipe.

    Raises:
        ValueError: if it holds a model that this recipe does not make, or cannot be written to.
    """
    folder = Path(recipe.training["output_dir"])
    check_writable(folder / RECIPE_NAME)
    if not holds_training(folder):
        return
    advice = (
        f"nothing was changed there. Train into another folder, by training.output_dir=..., or remove {folder} if it "
        "is no longer needed."
    )
    if not (folder / RECIPE_NAME).is_file():
        raise ValueError(f"{folder} holds a model that was not trained by a recipe; {advice}")
    differences = recipe.differences(Recipe.from_dict(read_yaml(folder / RECIPE_NAME)))
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise ValueError(f"{folder} holds a model of another recipe: {'; '.join(differences[:3])}{more}; {advice}")


def check_checkpoint(checkpoint: str, tasks: list[Task]) -> None:
    """
    Checks that a checkpoint has these tasks.

    Raises:
        ValueError: if it has other tasks; perhaps the rows, and with them the labels, have changed.
    """
    saved = MMTransformerConfig.from_pretrained(checkpoint).get_tasks()
    for task in tasks:
        known = saved[task.name].to_dict() if task.name in saved else {}
        # The checkpoint alone has the values that training determines.
        own = task.to_dict()
        decided = {key: known.get(key, own[key]) for key in task.decided_by_training if key in own}
        values = {**own, **decided}
        if known != values:
            changed = [f"{key} {shortened(known.get(key))}" for key, value in values.items() if known.get(key) != value]
            raise ValueError(
                f"{checkpoint} has task {task.name!r} with {', '.join(changed)}, unlike the present data: use the "
                "data of that training, or train into another folder (training.output_dir=...)."
            )


def steps_done(folder: str | os.PathLike[str]) -> int:
    """The number of training steps of this checkpoint or model; 0 if there is none."""
    state = Path(folder) / TRAINER_STATE_NAME
    return read_state(state).global_step if state.is_file() else 0


def read_state(path: Path) -> TrainerState:
    """
    The training state in a file.

    Raises:
        ValueError: one sentence, if the file holds no training state.
    """
    try:
        state = TrainerState.load_from_json(str(path))
        if isinstance(state.global_step, int) and isinstance(state.stateful_callbacks, dict):
            return state
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: it holds no state of a training; remove it, or train into another folder.")


def training_differences(recipe: Recipe) -> list[str]:
    """The training options whose values differ from those of the model in the output folder: parts of a sentence."""
    before = Recipe.from_dict(read_yaml(Path(recipe.training["output_dir"]) / RECIPE_NAME)).training
    return [
        f"training.{key} was {shortened(before.get(key))} and is {shortened(recipe.training.get(key))}"
        for key in dict.fromkeys([*before, *recipe.training])
        if before.get(key) != recipe.training.get(key) and key not in SECRETS
    ]


def is_finished(args: MMTrainingArguments) -> bool:
    """Whether the model in the output folder was trained, and evaluated, to the end set by the arguments."""
    folder = Path(args.output_dir)
    if not (folder / "config.json").is_file() or not (folder / TRAINER_STATE_NAME).is_file():
        return False
    state = read_state(folder / TRAINER_STATE_NAME)
    early = state.stateful_callbacks.get("EarlyStoppingCallback")
    if isinstance(early, dict):
        patience = early.get("args", {}).get("early_stopping_patience", 1)
        if early.get("attributes", {}).get("early_stopping_patience_counter", 0) >= max(patience, 1):
            return True
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch is not None and state.epoch >= args.num_train_epochs
