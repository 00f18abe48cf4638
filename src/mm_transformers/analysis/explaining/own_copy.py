"""A model that shares its weights with another, and nothing else: what is changed of it, nobody else sees."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def own_copy(model: nn.Module) -> Any:
    """
    The same modules once more, with the same parameters and buffers, but modes, hooks and configs of their own. So
    several threads can explain answers of one model, while others use it, and no exception leaves anything behind.

    Args:
        model (`nn.Module`): Is not changed.

    Returns:
        A model of the same class. It needs no memory for weights: writing into its parameters writes into the model.

    Example:

    ```python
    >>> copied = own_copy(model).eval()
    >>> copied.get_input_embeddings().weight is model.get_input_embeddings().weight
    True
    ```
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                # The hooks themselves may hold anything, such as locks, of which there are no copies.
                known[id(value)] = OrderedDict(value)
            else:
                known.update((id(tensor), tensor) for tensor in _tensors_in(value))
    return copy.deepcopy(model, known)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part)
