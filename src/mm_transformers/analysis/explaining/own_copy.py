"""A model that shares its weights with another, and nothing else: other changes to it stay local."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def own_copy(model: nn.Module) -> Any:
    """
    The same modules with the same parameters and buffers, but with separate modes, hooks and configs.

    So several threads can explain answers of one model while others use it, and no exception leaves changes behind.

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
    modules = list(model.modules())
    copies = {id(module): object.__new__(type(module)) for module in modules}
    # References to a module become references to its copy; references to a weight stay.
    known: dict[int, Any] = dict(copies)
    for module in modules:
        for name, value in vars(module).items():
            if name != "_modules" and "_hooks" not in name and isinstance(value, (torch.Tensor, dict, list, tuple)):
                known.update((id(tensor), tensor) for tensor in _tensors_in(value))
    for module in modules:
        state = {name: _copied(name, value, known) for name, value in vars(module).items()}
        # The result of `module.compile()` calls the original module.
        state["_compiled_call_impl"] = None
        vars(copies[id(module)]).update(state)
    return copies[id(model)]


def _copied(name: str, value: Any, known: dict[int, Any]) -> Any:
    # accelerate's hook gets the module, and may hold all weights that are not on a device.
    if name == "_hf_hook" or value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    if name in ("_parameters", "_buffers"):
        return dict(value)
    if "_hooks" in name and isinstance(value, dict):
        # The hooks themselves may hold anything, such as locks, which cannot be copied.
        return OrderedDict(value)
    return copy.deepcopy(value, known)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part)
