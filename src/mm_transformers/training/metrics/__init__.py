"""Metrics, and the `compute_metrics` of a model with several tasks."""

from ...deprecation import deprecated_names
from . import array_metrics, retrieval_metrics, text_metrics  # noqa: F401 (they register themselves)
from .base import METRICS, ArrayMetric, TaskMetric, TextMetric, register_metric
from .multi_task_metrics import MultiTaskMetrics, WithLosses, headline, result_names
from .names import is_known_error, is_measured, less_is_better, metric_named, task_of_metric


__getattr__ = deprecated_names(__name__, {"default_names": "result_names"}, removed_in="0.3")

__all__ = [
    "METRICS",
    "ArrayMetric",
    "MultiTaskMetrics",
    "TaskMetric",
    "TextMetric",
    "WithLosses",
    "headline",
    "is_known_error",
    "is_measured",
    "less_is_better",
    "metric_named",
    "register_metric",
    "result_names",
    "task_of_metric",
]
