"""The code next to saved weights: `trust_remote_code=True` loads them where this package is not installed."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .safe_writing import write_atomically, write_text_atomically


logger = logging.get_logger(__name__)

# The modules whose imports are all of the code.
_ROOTS = ("modeling_mm_transformer.py", "processing_mm_transformer.py")


def write_code(
    folder: str | os.PathLike[str], source: str, file: str, entries: Mapping[str, Mapping[str, Any]]
) -> None:
    """
    Copies code to a folder with a saved model or processor, and adds its entries to a JSON file there.

    The code of model and processor is copied as a whole. Otherwise a folder could have files of two versions, if an
    older version saved the other half.

    Args:
        folder: The folder of the saved model or processor.
        source: The module to copy, with all modules that it imports by one dot.
        file: `config.json` or `processor_config.json`.
        entries: The new entries of that file, such as `{"auto_map": {"AutoConfig": "configuration_x.XConfig"}}`.
    """
    roots = [Path(source), *map(Path(source).with_name, _ROOTS)]
    files = [path for root in roots if root.exists() for path in (root, *get_relative_import_files(str(root)))]
    for path in dict.fromkeys(map(Path, files)):
        target = Path(folder, path.name)
        if path.resolve() != target.absolute():  # a saved model may lie where this code runs
            with write_atomically(target) as copy:
                copy.write(path.read_bytes())
    config = Path(folder, file)
    saved = json.loads(config.read_text(encoding="utf-8"))
    for name, values in entries.items():
        saved[name] = {**saved.get(name, {}), **values}
    write_text_atomically(config, json.dumps(saved, indent=2, sort_keys=True) + "\n")


def reference(cls: type) -> str:
    """The name of a class in `auto_map`."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def warn_if_not_copied(kind: type) -> None:
    """Warns of a custom kind, whose code is not in the folder."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or not Path(__file__).with_name(Path(file).name).exists():
        logger.warning_once(
            f"{kind.__name__} of the module {kind.__module__!r} is saved by its name only. To load the model, "
            "mm_transformers must be installed, and this module imported first."
        )
