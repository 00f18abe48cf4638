"""The layers of a decoder-only language model of any family, and what runs before some of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Optional, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class Running(Protocol):
    """What changes the states before a layer."""

    def fuse(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """The states for the layer at a place, of those that were given to it."""


# A layer belongs to a module, which several threads may run at once.
_running: ContextVar[Optional[Running]] = ContextVar("_running_inside", default=None)


@contextmanager
def running(run: Running) -> Iterator[None]:
    """Within the block, and this thread, `run` changes the states before the layers with a place."""
    token = _running.set(run)
    try:
        yield
    finally:
        _running.reset(token)


@torch.compiler.disable
def _current() -> Optional[Running]:
    # Not traced, or compiled code would keep the value of its first call.
    return _running.get()


class _Placed:
    """
    Mixed into the class of a layer. It works before the call of the layer, and so outside of gradient checkpointing,
    which runs the layer again in the backward pass.
    """

    fusion_place: Any  # its number; `None` if the layer has lost it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = None if self.fusion_place is None else _current()
        if run is not None and args:
            args = (run.fuse(self.fusion_place, args[0]), *args[1:])
        elif run is not None:
            kwargs["hidden_states"] = run.fuse(self.fusion_place, kwargs["hidden_states"])
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By the class of the layer, since no module holds the mixed one.
        classes = type(self).__mro__
        return _blank, (classes[classes.index(_Placed) + 1],), self.__dict__


@cache
def _placed(layer_class: type) -> type:
    # Under the same name, by which FSDP and device maps find layers.
    names = {"__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (_Placed, layer_class), names)


def _blank(layer_class: type) -> Any:
    placed: Any = _placed(layer_class)
    return placed.__new__(placed)


def decoder_layers(text_model: PreTrainedModel) -> nn.ModuleList:
    """
    The layers of a language model: the largest list of modules that is as long as its config says.

    Raises:
        ValueError: one sentence, if there is none.
    """
    count = getattr(text_model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in text_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()), default=None)
    if found is None or not all(isinstance(layer, GradientCheckpointingLayer) for layer in found):
        raise ValueError(
            f"fusion_layers_every: the layers of the language model ({text_model.config.model_type!r}) were not found "
            "in one list, so no fusion can stand between them: leave it out."
        )
    return found


def number_of_places(num_layers: int, every: int) -> int:
    """
    How many places there are before every n-th of the layers.

    Raises:
        ValueError: one sentence, if there is none.
    """
    if not 1 <= every <= num_layers:
        raise ValueError(
            f"fusion_layers_every must be from 1 to {num_layers}, the number of layers of the language model, but is "
            f"{every}."
        )
    return num_layers // every


def give_places(layers: nn.ModuleList, every: int) -> None:
    """Makes places before every n-th layer, as in OpenFlamingo: the last of each n layers reads fused states."""
    layer: Any
    for number, layer in enumerate(layers):
        has_place = (number + 1) % every == 0
        if has_place and not isinstance(layer, _Placed):
            kind: Any = type(layer)
            layer.__class__ = _placed(kind)
        if isinstance(layer, _Placed):  # perhaps by an earlier model of the same language model
            layer.fusion_place = (number + 1) // every - 1 if has_place else None
