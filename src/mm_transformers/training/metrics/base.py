"""The base classes of metrics, and their registry."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Optional, TypeVar

import datasets
import evaluate
import numpy as np

from ...model.registry import registered


class TaskMetric(evaluate.Metric):
    """
    A metric whose code is in Python: `evaluate.load` would fetch it from the Hub.

    Subclasses set `key`, the name of the metric and of its result.
    """

    key: ClassVar[str]
    # Whether a smaller value is better. This also sets `scale = None`, if the class does not set it.
    less_is_better: ClassVar[bool] = False
    # The value that stands for 100%; `None` for numbers that are no shares, such as errors.
    scale: ClassVar[Optional[float]] = 1.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        says = any("scale" in vars(base) for base in cls.__mro__ if base is not TaskMetric)
        if cls.less_is_better and not says:
            cls.scale = None

    @classmethod
    def names(cls) -> list[str]:
        """The names of its results."""
        return [cls.key]

    @classmethod
    def fits(cls, references: Any) -> bool:
        """Whether the metric can compare such values."""
        raise NotImplementedError

    def columns(self) -> list[datasets.Features]:
        """The types of predictions and references that it takes; the first match is used."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        types = self.columns()
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="",
            features=types[0] if len(types) == 1 else types,
        )


M = TypeVar("M", bound=TaskMetric)

_METRICS: dict[str, type[TaskMetric]] = {}
# The names in `Task.metrics`, in `default_metrics` of task kinds, and in `MultiTaskMetrics(metrics=...)`.
METRICS: Mapping[str, type[TaskMetric]] = MappingProxyType(_METRICS)


def register_metric(cls: type[M]) -> type[M]:
    """
    Class decorator that registers a metric, so that tasks and recipes can name it by its `key`.

    Args:
        cls: a subclass of [`ArrayMetric`] or [`TextMetric`].

    Raises:
        ValueError: if `key` is missing or is already taken by another class.

    Example:

    ```python
    >>> @register_metric
    ... class LargestError(ArrayMetric):
    ...     key, value_type, ndims, less_is_better = "largest_error", "float64", (1,), True
    ...
    ...     def score(self, references, predictions):
    ...         return abs(references - predictions).max()

    >>> task = Regression("price", metrics=["mae", "largest_error"])  # in a recipe: metrics: [mae, largest_error]
    ```
    """
    registered(_METRICS, "metric", "key")(cls)
    return cls


class ArrayMetric(TaskMetric):
    """
    A metric of arrays: class ids, 0/1 rows or numbers.

    Subclasses set `key`, `value_type` and `ndims`, and implement [`score`]. An undefined metric (F1 without any
    positive, correlation with a constant) is 0.0. It is never NaN, and never absent, since `metric_for_best_model` may
    name it.

    Example:

    ```python
    >>> from sklearn.metrics import balanced_accuracy_score

    >>> @register_metric
    ... class BalancedAccuracy(ArrayMetric):
    ...     key, value_type, ndims = "balanced_accuracy", "int64", (1,)
    ...
    ...     def score(self, references, predictions):
    ...         return balanced_accuracy_score(references, predictions)

    >>> task = Classification("topic", ["animals", "food"], metrics=["balanced_accuracy", "f1"])
    ```
    """

    # "int64" for class ids and for 0/1 rows, "float64" for numbers.
    value_type: ClassVar[str]
    # 1: one value per row or token; 2: one vector per row.
    ndims: ClassVar[tuple[int, ...]]

    def columns(self) -> list[datasets.Features]:
        value = datasets.Value(self.value_type)
        by_ndim = {1: value, 2: datasets.Sequence(value)}
        # The first match is taken. Vectors come first: up to NumPy 2.3 a vector of length 1 counts as a number.
        return [
            datasets.Features({"predictions": by_ndim[ndim], "references": by_ndim[ndim]})
            for ndim in sorted(self.ndims, reverse=True)
        ]

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        score = float(self.score(np.asarray(references), np.asarray(predictions)))
        return {self.key: 0.0 if np.isnan(score) else score}

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        """The metric of two arrays of the same shape, (rows,) or (rows, values); NaN where it is not defined."""
        raise NotImplementedError

    @classmethod
    def fits(cls, references: Any) -> bool:
        """Whether the metric can compare such values. Numbers must not count as class ids: they would be truncated."""
        if not isinstance(references, np.ndarray):
            return False
        is_float = np.issubdtype(references.dtype, np.floating)
        return references.ndim in cls.ndims and not (is_float and cls.value_type == "int64")


class TextMetric(TaskMetric):
    """
    A metric of texts against one reference each.

    Subclasses set `key`, the name of the metric and of its result, and implement [`score`].

    Example:

    ```python
    >>> @register_metric
    ... class LengthError(TextMetric):
    ...     key, less_is_better = "length_error", True
    ...
    ...     def score(self, references, predictions):
    ...         return sum(abs(len(r) - len(p)) for r, p in zip(references, predictions)) / len(references)

    >>> task = Generation("caption", metrics=["bleu", "length_error"])
    ```
    """

    def columns(self) -> list[datasets.Features]:
        text = datasets.Value("string")
        return [datasets.Features({"predictions": text, "references": text})]

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.key: float(self.score(list(references), list(predictions)))}

    def score(self, references: list[str], predictions: list[str]) -> float:
        raise NotImplementedError

    @classmethod
    def fits(cls, references: Any) -> bool:
        """Whether the metric can compare such values."""
        return isinstance(references, list)
