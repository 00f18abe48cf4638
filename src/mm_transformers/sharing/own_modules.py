"""Imports modules with kinds of the user's own."""

import importlib
import sys


def import_own_module(name: str) -> None:
    """
    Imports a module; one in the current folder is found too, as by `python -m`.

    Raises:
        ImportError: if there is no such module.
    """
    sys.path.insert(0, "")
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove("")
