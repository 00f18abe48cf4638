"""
Registration with transformers at the moment at which it can matter.

To register with the Auto classes means to import them, and with them torch: seconds, which whoever only wants `--help`
or a version would wait for. So it is done as soon as whatever they are looked up in has been imported, by anyone.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder


_LOOKED_UP_IN = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.pipelines",
)


class _Watch(MetaPathFinder):
    """Finds the modules of transformers as usual, and looks whether it is time when they have run."""

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        # As it would be without us, for whoever asks a module for its loader.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register_if_ready(just_imported=module.__name__)


_watch = _Watch()


def register_when_imported() -> None:
    """Registers now, if what models are looked up in is there already; otherwise as soon as it is."""
    sys.meta_path.insert(0, _watch)
    _register_if_ready()


def _register_if_ready(just_imported: str = "") -> None:
    if _watch not in sys.meta_path or not any(name in sys.modules for name in _LOOKED_UP_IN):
        return
    others = [
        sys.modules[name] for name in list(sys.modules) if name.startswith("transformers.") and name != just_imported
    ]
    if any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in others):
        return  # the model may need one that is only half imported; the end of that is the next occasion
    sys.meta_path.remove(_watch)
    importlib.import_module(".sharing.registration", __package__).register()
