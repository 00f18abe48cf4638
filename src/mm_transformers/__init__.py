"""
Pictures behind any Hugging Face text encoder, several tasks at once.

Importing the package needs torch and transformers only; what trains or reads data is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from .model.configuration_mm_transformer import MMTransformerConfig
from .model.fusion import Fusion, Stream, register_fusion
from .model.modeling_mm_transformer import (
    MMTransformerForMultiTask,
    MMTransformerModel,
    MMTransformerPreTrainedModel,
)
from .model.modeling_outputs import MMTransformerModelOutput, MMTransformerOutput
from .model.processing_mm_transformer import MMTransformerProcessor
from .model.tasks import (
    Classification,
    Generation,
    Matching,
    MultiLabel,
    Regression,
    Retrieval,
    Task,
    TokenClassification,
    register_task,
)


if TYPE_CHECKING:
    from .data.collator import MMDataCollator
    from .data.embedded import load_demo_dataset
    from .data.feature_cache import FeatureCache
    from .data.mixture import DataMixture
    from .data.sources import DataSource
    from .training.arguments import MMTrainingArguments
    from .training.metrics import MultiTaskMetrics
    from .training.task_gradients import TaskGradientsCallback
    from .training.trainer import MMTrainer

__version__ = "0.1.0.dev0"

_LAZY = {
    "DataMixture": ".data.mixture",
    "DataSource": ".data.sources",
    "FeatureCache": ".data.feature_cache",
    "MMDataCollator": ".data.collator",
    "load_demo_dataset": ".data.embedded",
    "MMTrainer": ".training.trainer",
    "MMTrainingArguments": ".training.arguments",
    "TaskGradientsCallback": ".training.task_gradients",
    "MultiTaskMetrics": ".training.metrics",
}

AutoConfig.register(MMTransformerConfig.model_type, MMTransformerConfig)
# With two classes for one config, `AutoModel` takes the one that the checkpoint was saved from.
AutoModel.register(MMTransformerConfig, (MMTransformerForMultiTask, MMTransformerModel))
AutoProcessor.register(MMTransformerConfig, MMTransformerProcessor)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Classification",
    "DataMixture",
    "DataSource",
    "FeatureCache",
    "Fusion",
    "Generation",
    "MMDataCollator",
    "MMTrainer",
    "MMTrainingArguments",
    "MMTransformerConfig",
    "MMTransformerForMultiTask",
    "MMTransformerModel",
    "MMTransformerModelOutput",
    "MMTransformerOutput",
    "MMTransformerPreTrainedModel",
    "MMTransformerProcessor",
    "Matching",
    "MultiLabel",
    "MultiTaskMetrics",
    "Regression",
    "Retrieval",
    "Stream",
    "Task",
    "TaskGradientsCallback",
    "TokenClassification",
    "load_demo_dataset",
    "register_fusion",
    "register_task",
]
