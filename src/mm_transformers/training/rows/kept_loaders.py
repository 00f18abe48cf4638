"""Keeps the loaders of evaluations, with their workers, from one evaluation to the next."""

from operator import is_not
from typing import Any


class KeptLoaders:
    """
    Drops a kept loader of the Trainer if it would have to read something else.

    Args:
        loaders: the Trainer's own, name -> loader. It has one name for all data sets without a name.
    """

    def __init__(self, loaders: dict[str, Any]):
        self.loaders = loaders
        self._read: dict[str, tuple[Any, ...]] = {}

    def keep_if_same(self, name: str, *read: Any) -> None:
        """
        Keeps the loader if it reads the same objects as before.

        Args:
            name: of the wanted loader.
            read: the objects that it reads: the rows, the collator, the feature cache.
        """
        if any(map(is_not, self._read.get(name, (None,)), read)):
            self.loaders.pop(name, None)
        self._read[name] = read

    def forget(self) -> None:
        self.loaders.clear()
        self._read.clear()
