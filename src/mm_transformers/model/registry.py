"""Registries of kinds: a class attribute `kind` names a class in configs."""

from collections.abc import Callable
from typing import TypeVar


T = TypeVar("T", bound=type)


def registered(kinds: dict[str, T], what: str, attribute: str = "kind") -> Callable[[T], T]:
    """
    A class decorator that adds a class to a registry under its name.

    A class of the same module and qualified name replaces the earlier one, so that a module can be loaded again.
    Of the module the last part counts: a checkpoint with its own code has other packages around it.

    Args:
        kinds: the registry, changed in place.
        what: the noun in messages, such as "task kind".
        attribute: the class attribute that holds the name.

    Raises:
        ValueError: when called, if the class has no name, or another class has the same one.

    Example:

    ```python
    >>> SHAPES: dict[str, type] = {}
    >>> @registered(SHAPES, "shape")
    ... class Circle:
    ...     kind = "circle"
    >>> SHAPES["circle"].__name__
    'Circle'
    ```
    """

    def add(cls: T) -> T:
        kind = getattr(cls, attribute, None)
        if not isinstance(kind, str) or not kind:
            raise ValueError(f"{cls.__name__} needs a class attribute `{attribute}`, a string that names the {what}.")
        known = kinds.get(kind)
        if known is not None and _home(known) != _home(cls):
            raise ValueError(
                f"{what.capitalize()} {kind!r} is already taken by {known.__name__}; choose another `{attribute}`."
            )
        kinds[kind] = cls
        return cls

    return add


def _home(cls: type) -> tuple[str, str]:
    return cls.__module__.rpartition(".")[-1], cls.__qualname__
