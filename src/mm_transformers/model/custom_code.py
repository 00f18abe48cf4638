"""The code that lies next to saved weights, so that they can be loaded where this package is not installed."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .safe_writing import write_atomically, write_text_atomically


logger = logging.get_logger(__name__)

_HERE = Path(__file__).parent


def write_model_code(folder: Any, model: Any) -> None:
    """
    Copies the code to a folder with a saved model, and says in its `config.json` what Auto classes and pipelines find
    in it.

    Args:
        folder (`str` or `Path`): Where `config.json` is.
        model ([`MMTransformerPreTrainedModel`]): What was saved.
    """
    # Here, since these modules import this one; and so they are among what it needs, and are copied along.
    from .configuration_mm_transformer import MMTransformerConfig
    from .modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModel
    from .pipeline_mm_transformer import MultimodalPipeline
    from .sequence_classification import MMTransformerForSequenceClassification

    has_tasks = hasattr(model, "tasks")
    auto_map = {
        "AutoConfig": _reference(MMTransformerConfig),
        "AutoModel": _reference(MMTransformerForMultiTask if has_tasks else MMTransformerModel),
    }
    values: dict[str, Any] = {"auto_map": auto_map}
    if has_tasks:
        impl = {"impl": _reference(MultimodalPipeline), "pt": ["AutoModel"], "type": "multimodal"}
        values["custom_pipelines"] = {"multimodal": impl}
        auto_classes = [task.auto_class for task in model.tasks.values()]
        if len(auto_classes) == 1 and auto_classes[0] in MMTransformerForSequenceClassification.auto_classes:
            auto_map[auto_classes[0]] = _reference(MMTransformerForSequenceClassification)
        for task in model.tasks.values():
            _tell_if_it_stays(type(task))
    fusion = getattr(model, "model", model).fusion
    if fusion is not None:
        _tell_if_it_stays(type(fusion))
    _copy_code(folder)
    _add(Path(folder, "config.json"), values)


def write_processor_code(folder: Any) -> None:
    """
    Copies the code to a folder with a saved processor, and says in its `processor_config.json` what Auto classes find
    in it.
    """
    from .processing_mm_transformer import MMTransformerProcessor

    _copy_code(folder)
    _add(Path(folder, "processor_config.json"), {"auto_map": {"AutoProcessor": _reference(MMTransformerProcessor)}})


def _reference(cls: type) -> str:
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _tell_if_it_stays(kind: type) -> None:
    """Warns of a kind of the user's own, whose code is not among what is copied."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or not (_HERE / Path(file).name).exists():
        logger.warning_once(
            f"{kind.__name__} of the module {kind.__module__!r} is saved by its name only: whoever loads the model "
            "must have mm_transformers installed and import that module first."
        )


def _copy_code(folder: Any) -> None:
    for file in [Path(__file__), *map(Path, get_relative_import_files(__file__))]:
        target = Path(folder, file.name)
        if file.resolve() != target.absolute():  # a saved model may lie where this code runs
            with write_atomically(target) as copy:
                copy.write(file.read_bytes())


def _add(path: Path, values: dict[str, Any]) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        saved[name] = {**saved.get(name, {}), **value}
    write_text_atomically(path, json.dumps(saved, indent=2, sort_keys=True) + "\n")
