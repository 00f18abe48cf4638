"""
Pictures behind any Hugging Face text encoder, several tasks at once.

Each name is imported at its first use, so `import mm_transformers` needs no torch. The first use also registers the
model with the Auto classes and pipelines of transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .when_imported import call_when_imported


if TYPE_CHECKING:
    from .data.collator import MMDataCollator
    from .data.embedded import load_demo_dataset
    from .data.feature_cache import FeatureCache
    from .data.mixture import DataMixture
    from .data.sources import DataSource
    from .data.table_columns import table_columns
    from .fitting.estimators import MMClassifier, MMRegressor
    from .fitting.fit import FitResult, fit
    from .model.configuration_mm_transformer import MMTransformerConfig
    from .model.fusion import Fusion, Stream, register_fusion
    from .model.limits import Limits, set_limits
    from .model.modalities import register_modality
    from .model.modeling_mm_transformer import (
        MMTransformerForMultiTask,
        MMTransformerModel,
        MMTransformerModelOutput,
        MMTransformerOutput,
        MMTransformerPreTrainedModel,
    )
    from .model.processing_mm_transformer import MMTransformerProcessor
    from .model.table import TableConfig
    from .model.table_kinds import NumberColumn, TableColumn, register_column
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
    from .training.arguments import MMTrainingArguments
    from .training.metrics import ArrayMetric, MultiTaskMetrics, TextMetric, register_metric
    from .training.objective.task_gradients import TaskGradientsCallback
    from .training.predictor import Predictor
    from .training.thresholds import tune_thresholds
    from .training.trainer import MMTrainer

__version__ = "0.1.0.dev0"

_MODULES = {
    "data.collator": ["MMDataCollator"],
    "data.embedded": ["load_demo_dataset"],
    "data.feature_cache": ["FeatureCache"],
    "data.mixture": ["DataMixture"],
    "data.sources": ["DataSource"],
    "data.table_columns": ["table_columns"],
    "fitting.estimators": ["MMClassifier", "MMRegressor"],
    "fitting.fit": ["FitResult", "fit"],
    "model.configuration_mm_transformer": ["MMTransformerConfig"],
    "model.fusion": ["Fusion", "Stream", "register_fusion"],
    "model.limits": ["Limits", "set_limits"],
    "model.modalities": ["register_modality"],
    "model.modeling_mm_transformer": [
        "MMTransformerForMultiTask",
        "MMTransformerModel",
        "MMTransformerModelOutput",
        "MMTransformerOutput",
        "MMTransformerPreTrainedModel",
    ],
    "model.processing_mm_transformer": ["MMTransformerProcessor"],
    "model.table": ["TableConfig"],
    "model.table_kinds": ["NumberColumn", "TableColumn", "register_column"],
    "model.tasks": [
        "Classification",
        "Generation",
        "Matching",
        "MultiLabel",
        "Regression",
        "Retrieval",
        "Task",
        "TokenClassification",
        "register_task",
    ],
    "training.arguments": ["MMTrainingArguments"],
    "training.metrics": ["ArrayMetric", "MultiTaskMetrics", "TextMetric", "register_metric"],
    "training.objective.task_gradients": ["TaskGradientsCallback"],
    "training.predictor": ["Predictor"],
    "training.thresholds": ["tune_thresholds"],
    "training.trainer": ["MMTrainer"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def _register() -> None:
    from .sharing.registration import register

    register()


# Where transformers looks models up.
call_when_imported(
    [
        "transformers.models.auto.configuration_auto",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.processing_auto",
        "transformers.pipelines",
    ],
    _register,
)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ArrayMetric",
    "Classification",
    "DataMixture",
    "DataSource",
    "FeatureCache",
    "FitResult",
    "Fusion",
    "Generation",
    "Limits",
    "MMClassifier",
    "MMDataCollator",
    "MMRegressor",
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
    "NumberColumn",
    "Predictor",
    "Regression",
    "Retrieval",
    "Stream",
    "TableColumn",
    "TableConfig",
    "Task",
    "TaskGradientsCallback",
    "TextMetric",
    "TokenClassification",
    "fit",
    "load_demo_dataset",
    "register_column",
    "register_fusion",
    "register_metric",
    "register_modality",
    "register_task",
    "set_limits",
    "table_columns",
    "tune_thresholds",
]
