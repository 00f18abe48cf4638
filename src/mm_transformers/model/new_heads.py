"""Loads a saved model with other tasks: new and changed tasks get new heads, the others keep theirs."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional, Protocol

from torch import nn
from transformers.utils import logging

from .calibration import for_tasks
from .checkpoint_checks import with_new_heads
from .configuration_mm_transformer import MMTransformerConfig
from .encoders import HUB_KWARGS, encoder_width
from .label_cells import shorten_value
from .linear_probe import with_probe
from .task_base import Task, TaskHeads


class MultiTaskModel(Protocol):
    """A model with heads, such as [`MMTransformerForMultiTask`]."""

    config: MMTransformerConfig
    tasks: dict[str, Task]
    heads: TaskHeads

    def _init_weights(self, module: nn.Module) -> None: ...


logger = logging.get_logger(__name__)
# Options of loading that are fields of a config, too.
_OF_LOADING = {"dtype", "torch_dtype", "attn_implementation", "name_or_path"}


def load_with_tasks(
    load: Callable[..., Any],
    path: str | os.PathLike[str] | None,
    tasks: Optional[Sequence[Task | dict[str, Any]]],
    config: MMTransformerConfig | str | os.PathLike[str] | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """
    Loads a model with other tasks than those of its checkpoint.

    Args:
        load: `from_pretrained` of the checkpoint.
        path: Hub id or folder of the checkpoint.
        tasks: the tasks of the loaded model; by default those of `config`.
        config: the config to load with; by default that of the checkpoint.
        output_loading_info, kwargs: for `load`.

    Returns:
        The model; with `output_loading_info` a tuple of the model and what transformers says of its weights.

    Raises:
        ValueError: one sentence, if there is no saved model, or the new tasks need a decoder and the saved ones do
            not, or the other way round.
    """
    where = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
    given = MMTransformerConfig.from_pretrained(config, **where) if isinstance(config, (str, os.PathLike)) else config
    if path is None or (given is not None and given.model_type != MMTransformerConfig.model_type):
        if tasks is not None:
            raise ValueError("tasks=[...] needs the folder or the Hub id of a saved model, without config=.")
        return load(config=given, output_loading_info=output_loading_info, **kwargs)
    saved = MMTransformerConfig.from_pretrained(path, **where)
    if given is None:
        options = {name: value for name, value in kwargs.items() if hasattr(saved, name) and name not in _OF_LOADING}
        given = MMTransformerConfig.from_pretrained(path, **where, **options)
        kwargs = {name: value for name, value in kwargs.items() if name not in options}
    if tasks is not None:
        values = {**given.to_dict(), "calibration": None}
        values["tasks"] = [task.to_dict() if hasattr(task, "to_dict") else task for task in tasks]
        calibration, given = given.calibration, MMTransformerConfig.from_dict(values)
    else:
        calibration = given.calibration
    new = tasks_with_new_heads(saved, given)
    given = _fitting(given, saved, new, calibration)
    if not new:
        with _naming(new, kwargs):
            return load(config=given, output_loading_info=output_loading_info, **kwargs)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise transformers would warn of the new heads
    try:
        with _naming(new, kwargs):
            model, info = load(config=given, **{**kwargs, "ignore_mismatched_sizes": True}, output_loading_info=True)
    finally:
        logging.set_verbosity(level)
    renew_heads(model, new)
    return (model, info) if output_loading_info else model


def _fitting(
    config: MMTransformerConfig, saved: MMTransformerConfig, new: list[str], calibration: Optional[dict[str, Any]]
) -> MMTransformerConfig:
    """The config with the calibration of the heads that are kept, and with the options that they bring along."""
    before, values = saved.get_tasks(), config.to_dict()
    for task in values["tasks"]:
        name, there = task["name"], before.get(task["name"])
        for option in there.kept_options if there is not None and name not in new else ():
            if option in task and task[option] != getattr(there, option):
                logger.warning(
                    f"Task {name!r} keeps the head of the saved model, and so its {option} "
                    f"{shorten_value(getattr(there, option))}, not {shorten_value(task[option])}."
                )
                task[option] = getattr(there, option)
    values["calibration"] = for_tasks(
        calibration, [task["name"] for task in values["tasks"] if task["name"] not in new]
    )
    is_same = values["tasks"] == config.to_dict()["tasks"] and values["calibration"] == config.calibration
    return config if is_same else MMTransformerConfig.from_dict(values)


def _naming(names: list[str], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    return nullcontext() if kwargs.get("ignore_mismatched_sizes") else with_new_heads(names)


def tasks_with_new_heads(saved: MMTransformerConfig, config: MMTransformerConfig) -> list[str]:
    """
    The tasks of `config` whose heads the checkpoint lacks, or has for other labels or another kind.

    Args:
        saved: the config of the checkpoint.
        config: the config to load it with.

    Raises:
        ValueError: if the tasks of one need a decoder and those of the other do not.
    """
    if saved.has_decoder != config.has_decoder:
        which = "no decoder, so it cannot get a task" if config.has_decoder else "a decoder, so it must keep a task"
        raise ValueError(
            f"The saved model has {which} that writes: make a new model by from_encoders(..., tasks=[...]), or "
            "change only other tasks."
        )
    before = saved.get_tasks()
    return [name for name, task in config.get_tasks().items() if _has_other_head(task, before.get(name))]


def check_same_heads(saved: Mapping[str, Task], tasks: Mapping[str, Task], checkpoint: str) -> None:
    """
    Checks that tasks can use the heads of a checkpoint.

    Raises:
        ValueError: if the head of a task differs from that of the checkpoint, such as labels in another order.
    """
    for name, task in tasks.items():
        here, there = _head_of(task) | _kept(task), _head_of(saved[name]) | _kept(saved[name]) if name in saved else {}
        if not task.needs_decoder and here != there:
            option = next((key for key in here if here[key] != there.get(key)), "kind")
            was = f"{option} {shorten_value(there[option])}" if option in there else "no head"
            raise ValueError(
                f"Training cannot be resumed from {checkpoint!r}: task {name!r} has {was} there, but {option} "
                f"{shorten_value(here[option])} in this model."
            )


def _has_other_head(task: Task, saved: Optional[Task]) -> bool:
    return not task.needs_decoder and (saved is None or _head_of(task) != _head_of(saved))


def _kept(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in task.kept_options if hasattr(task, name)}


def _head_of(task: Task) -> dict[str, Any]:
    """The options of a task that its head depends on."""
    return {"kind": task.kind, **{name: getattr(task, name) for name in task.head_options if hasattr(task, name)}}


def renew_heads(model: MultiTaskModel, names: list[str]) -> None:
    """Gives the heads of these tasks new weights, as in a new model."""
    width = encoder_width(model.config.text_config)
    for name in names:
        task, there = model.tasks[name], getattr(model.heads, name)
        head = with_probe(task.build_head(model.config, width), task, model.config)
        head.apply(model._init_weights)
        # Into the existing modules, which keep their devices, types and hooks.
        there.load_state_dict(head.state_dict())
