"""
Calls a function at the moment at which modules of transformers are there.

Registration with the Auto classes imports them, and with them torch, which takes seconds. A command that only prints
its help needs none of it. So it waits until someone else has imported them.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Optional


class _Watch(MetaPathFinder):
    """Finds the modules of transformers as usual, and looks after each of them whether it is time."""

    def __init__(self, names: Sequence[str], action: Callable[[], None]):
        self.names, self.action = names, action

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec

    def act_if_ready(self, just_imported: str = "") -> None:
        if self not in sys.meta_path or not any(name in sys.modules for name in self.names):
            return
        others = [
            sys.modules[name]
            for name in list(sys.modules)
            if name.startswith("transformers.") and name != just_imported
        ]
        if any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in others):
            return  # the action may need a module that is only half imported; its end is the next occasion
        sys.meta_path.remove(self)
        self.action()


class _Then(Loader):
    def __init__(self, loader: Loader, watch: _Watch):
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Other code that asks a module for its loader gets the usual one.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.watch.act_if_ready(just_imported=module.__name__)


def call_when_imported(names: Sequence[str], action: Callable[[], None]) -> None:
    """
    Calls `action` once: now, if one of the modules is imported already, otherwise as soon as one is.

    Args:
        names: Modules of transformers.
        action: May import any of transformers.
    """
    watch = _Watch(names, action)
    sys.meta_path.insert(0, watch)
    watch.act_if_ready()
