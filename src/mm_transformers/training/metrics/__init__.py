"""Metrics, and the `compute_metrics` of a model with several tasks."""

from .multi_task_metrics import (
    LESS_IS_BETTER,
    METRICS,
    MultiTaskMetrics,
    WithLosses,
    default_names,
    headline,
    is_measured,
    less_is_better,
    task_of_metric,
)


__all__ = [
    "LESS_IS_BETTER",
    "METRICS",
    "MultiTaskMetrics",
    "WithLosses",
    "default_names",
    "headline",
    "is_measured",
    "less_is_better",
    "task_of_metric",
]
