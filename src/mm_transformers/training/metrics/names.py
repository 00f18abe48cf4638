"""What the name of a metric says."""

from collections.abc import Iterable
from typing import Any

from .base import METRICS, TaskMetric


# Endings of names of metrics from elsewhere that are better when smaller.
_ERRORS = ("error", "error_rate", "rmse", "wer", "cer", "ter", "perplexity")


def is_measured(value: Any) -> bool:
    """Whether a value from a file of results is a number; integers may be too large for a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def is_known_error(name: str) -> bool:
    """Whether the loss, or a registered metric that is better when smaller, has this name."""
    metric = metric_named(name)
    return _ends(name, "loss") if metric is None else metric.less_is_better


def less_is_better(name: str) -> bool:
    """
    Whether a metric is the better the smaller it is, by its name; [`MultiTaskMetrics.less_is_better`] asks the metric.

    Args:
        name: such as `"mae"` or `"price_mae"`.
    """
    metric = metric_named(name)
    return any(_ends(name, end) for end in ("loss", *_ERRORS)) if metric is None else metric.less_is_better


def metric_named(name: str) -> type[TaskMetric] | None:
    """
    The registered metric with a result of this name; `None` if there is none.

    Args:
        name: such as `"mae"`, `"price_mae"` or `"eval_price_mae"`. Of several endings the longest one counts.
    """
    found = {result: metric for metric in METRICS.values() for result in (metric.key, *metric.names())}
    longest = max((result for result in found if _ends(name, result)), key=len, default=None)
    return None if longest is None else found[longest]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f"_{ending}")


def task_of_metric(metric: str, tasks: Iterable[str]) -> str | None:
    """The task of `{task}_{metric}`: the longest match, since one task name may begin another."""
    return max((task for task in tasks if metric.startswith(f"{task}_")), key=len, default=None)
