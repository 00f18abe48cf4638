"""Old names of public things, which still work for a while."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def deprecated_names(module: str, names: Mapping[str, str], removed_in: str) -> Callable[[str], Any]:
    """
    A `__getattr__` for a module: old names give the things with the new names, with a `FutureWarning`.

    Args:
        module: the name of the module.
        names: old name -> new name, both of this module.
        removed_in: the version without the old names.

    Example:

    ```python
    >>> __getattr__ = deprecated_names(__name__, {"default_names": "result_names"}, removed_in="0.3")
    ```
    """

    def getattr_of_module(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is deprecated and will be removed in version {removed_in}: use {module}.{names[name]}.",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(module), names[name])

    return getattr_of_module
