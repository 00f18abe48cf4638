"""Chooses the checkpoint from which training resumes."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Optional

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ...model.messages import and_more
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.new_heads import check_same_heads
from ...model.task_base import Task
from .folders import check_checkpoint, newest_complete_checkpoint, tidy
from .running_losses import tasks_in


logger = logging.get_logger(__name__)


def checkpoint_to_resume(
    wanted: str | os.PathLike[str] | bool | None, args: TrainingArguments, tasks: Callable[[], Mapping[str, Task]]
) -> Optional[str]:
    """
    The checkpoint from which training resumes. The main process decides, since others may see different folders.

    Args:
        wanted: a folder, or `True` for the newest complete checkpoint in `args.output_dir`.
        tasks: returns the tasks of the trained model. In a hyperparameter search there is no model yet.

    Returns:
        The folder of the checkpoint; `None` if training starts from scratch.

    Raises:
        ValueError: if the given checkpoint is not complete, or is of a model with other heads.
    """
    if args.should_save and args.save_strategy != SaveStrategy.NO:
        tidy(args.output_dir)
    found: list[Any] = [None, None]
    if args.process_index == 0 and wanted not in (None, False):
        try:
            if wanted is True:
                found[0] = newest_complete_checkpoint(args.output_dir, verify=True)
            else:
                found[0] = os.fspath(wanted)  # type: ignore[arg-type]
                check_checkpoint(found[0])
            if found[0] is not None:
                saved = tasks_in(found[0])
                if saved:
                    check_same_heads(saved, tasks(), found[0])
        except ValueError as error:
            found[1] = str(error)
    checkpoint, problem = broadcast_object_list(found)
    if problem is not None:
        raise ValueError(problem)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}.")
        if not any(name.startswith(("optimizer", "global_step")) for name in os.listdir(checkpoint)):
            logger.warning(
                f"{checkpoint} has no {OPTIMIZER_NAME}: weights and step are restored, but optimiser and learning "
                "rate start again."
            )
    elif wanted is True:
        logger.warning(f"There is no complete checkpoint in {args.output_dir}: training starts from scratch.")
    return checkpoint


def check_same_weights(load_result: Any, model: MMTransformerForMultiTask) -> None:
    """
    Checks that a checkpoint has exactly the weights of the model.

    Args:
        load_result: the result of `load_state_dict`.
        model: the model that was loaded into, not wrapped.

    Raises:
        ValueError: if the checkpoint lacks a weight of the model, or has another one.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    computed = getattr(model, "_keys_to_ignore_on_save", None) or []  # such as sinusoidal positions
    missing = sorted(set(load_result.missing_keys) - set(tied) - set(tied.values()) - set(computed))
    for what, names in {"lacks": missing, "has": sorted(load_result.unexpected_keys)}.items():
        if names:
            raise ValueError(
                f"The checkpoint {what} the weight {names[0]!r}{and_more(names)}, unlike the model in training. So "
                "it belongs to another model: train into another folder, or give the model of the checkpoint."
            )
