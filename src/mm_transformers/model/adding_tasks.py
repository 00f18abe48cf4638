"""Other tasks for a saved model: new and changed tasks get new heads, the others keep theirs."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Optional

from transformers.utils import logging

from .configuration_mm_transformer import MMTransformerConfig
from .encoders import HUB_KWARGS, encoder_width
from .linear_probe import with_probe
from .loading import with_new_heads
from .task_base import Task, shorten_value


# Options of loading that a config knows, too.
_OF_LOADING = {"dtype", "torch_dtype", "attn_implementation", "name_or_path"}


def load_with_tasks(
    load: Callable[..., Any],
    path: Any,
    tasks: Optional[list[Any]],
    config: Optional[MMTransformerConfig] = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """
    Loads a model with other tasks than those of its checkpoint.

    Args:
        load: `from_pretrained` of the checkpoint.
        path: Hub id or folder of the checkpoint.
        tasks: those that the model is to have; by default those of `config`.
        config: with which to load; by default that of the checkpoint.
        output_loading_info, kwargs: for `load`.
    """
    where = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
    if isinstance(config, (str, os.PathLike)):
        config = MMTransformerConfig.from_pretrained(config, **where)
    if path is None or (config is not None and config.model_type != MMTransformerConfig.model_type):
        if tasks is not None:
            raise ValueError("tasks=[...] needs the folder or the Hub id of a saved model, and no foreign config.")
        return load(config=config, output_loading_info=output_loading_info, **kwargs)
    saved = MMTransformerConfig.from_pretrained(path, **where)
    if config is None:
        options = {name: value for name, value in kwargs.items() if hasattr(saved, name) and name not in _OF_LOADING}
        config = MMTransformerConfig.from_pretrained(path, **where, **options)
        kwargs = {name: value for name, value in kwargs.items() if name not in options}
    if tasks is not None:
        values = config.to_dict()
        values["tasks"] = [task.to_dict() if hasattr(task, "to_dict") else task for task in tasks]
        config = MMTransformerConfig.from_dict(values)
    new = tasks_with_new_heads(saved, config)
    if not new:
        with _naming(new, kwargs):
            return load(config=config, output_loading_info=output_loading_info, **kwargs)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of new heads, which are wanted
    try:
        with _naming(new, kwargs):
            model, info = load(config=config, **{**kwargs, "ignore_mismatched_sizes": True}, output_loading_info=True)
    finally:
        logging.set_verbosity(level)
    renew_heads(model, new)
    return (model, info) if output_loading_info else model


def _naming(names: list[str], kwargs: Mapping[str, Any]) -> Any:
    return nullcontext() if kwargs.get("ignore_mismatched_sizes") else with_new_heads(names)


def tasks_with_new_heads(saved: MMTransformerConfig, config: MMTransformerConfig) -> list[str]:
    """
    The tasks of `config` whose heads are not in a checkpoint, or are there for something else.

    Args:
        saved: the config of the checkpoint.
        config: the config with which it is to be loaded.

    Raises:
        ValueError: if the tasks of one need a decoder and those of the other do not.
    """
    if saved.has_decoder != config.has_decoder:
        which = "no decoder, so it cannot get a task" if config.has_decoder else "a decoder, so it must keep a task"
        raise ValueError(
            f"The saved model has {which} that writes: make a new model by from_encoders(..., tasks=[...]), or keep to "
            "tasks of the same sort."
        )
    before = saved.get_tasks()
    return [name for name, task in config.get_tasks().items() if _has_other_head(task, before.get(name))]


def check_same_heads(saved: Mapping[str, Task], tasks: Mapping[str, Task], checkpoint: str) -> None:
    """
    Raises:
        ValueError: if the head of a task means something else in a checkpoint, such as labels in another order.
    """
    for name, task in tasks.items():
        if _has_other_head(task, saved.get(name)):
            here = _head_of(task)
            there = _head_of(saved[name]) if name in saved else {}
            option = next((key for key in here if here[key] != there.get(key)), "kind")
            was = f"{option} {shorten_value(there[option])}" if option in there else "no head"
            raise ValueError(
                f"Training cannot be resumed from {checkpoint!r}: task {name!r} has {was} there, but {option} "
                f"{shorten_value(here[option])} in this model."
            )


def _has_other_head(task: Task, saved: Optional[Task]) -> bool:
    return not task.needs_decoder and (saved is None or _head_of(task) != _head_of(saved))


def _head_of(task: Task) -> Mapping[str, Any]:
    """What the head of a task depends on."""
    return {"kind": task.kind, **{name: getattr(task, name) for name in task.head_options if hasattr(task, name)}}


def renew_heads(model: Any, names: list[str]) -> None:
    """Gives these tasks heads with new weights, as a new model has them."""
    width = encoder_width(model.config.text_config)
    for name in names:
        task, there = model.tasks[name], getattr(model.heads, name)
        head = with_probe(task.build_head(model.config, width), task, model.config)
        head.apply(model._init_weights)
        # Into the modules that are there, which have their places, types and hooks.
        there.load_state_dict(head.state_dict())
