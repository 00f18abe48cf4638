"""What the name of a metric says."""

from collections.abc import Iterable
from typing import Any

from .base import METRICS


# Endings of names of metrics from elsewhere that are better when smaller.
_ERRORS = ("error", "error_rate", "rmse", "wer", "cer", "ter", "perplexity")


def is_measured(value: Any) -> bool:
    """Whether a value from a file of results is a number; integers may be too large for a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def is_known_error(name: str) -> bool:
    """Whether the loss, or a registered metric that is better when smaller, has this name."""
    return name.endswith(_known_errors())


def less_is_better(name: str) -> bool:
    """
    Whether a metric is the better the smaller it is, by its name; [`MultiTaskMetrics.less_is_better`] asks the metric.

    Args:
        name: such as `"mae"` or `"price_mae"`.
    """
    return any(name == ending or name.endswith(f"_{ending}") for ending in (*_known_errors(), *_ERRORS))


def _known_errors() -> tuple[str, ...]:
    return "loss", *(key for key, metric in METRICS.items() if metric.less_is_better)


def task_of_metric(metric: str, tasks: Iterable[str]) -> str | None:
    """The task of `{task}_{metric}`: the longest match, since one task name may begin another."""
    return max((task for task in tasks if metric.startswith(f"{task}_")), key=len, default=None)
