"""Offline metrics of classes and numbers: those of scikit-learn, as `evaluate.Metric`s."""

import numpy as np
from sklearn import metrics as sklearn_metrics

from .base import ArrayMetric, register_metric


@register_metric
class Accuracy(ArrayMetric):
    """Share of the rows (or tokens) whose class is right."""

    key, value_type, ndims = "accuracy", "int64", (1,)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.accuracy_score(references, predictions)


@register_metric
class SubsetAccuracy(ArrayMetric):
    """Share of the rows whose whole set of labels is right."""

    key, value_type, ndims = "subset_accuracy", "int64", (2,)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.accuracy_score(references, predictions)


@register_metric
class MacroF1(ArrayMetric):
    """
    Mean of the labels' F1, with equal weights.

    A label that occurs neither in the references nor in the predictions has no F1 and is left out of the mean.
    """

    key, value_type, ndims = "f1", "int64", (1, 2)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return _f1(references, predictions, "macro")


@register_metric
class MicroF1(ArrayMetric):
    """F1 of all decisions pooled over the labels; with one class per row it is the accuracy."""

    key, value_type, ndims = "f1_micro", "int64", (1, 2)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return _f1(references, predictions, "micro")


def _f1(references: np.ndarray, predictions: np.ndarray, average: str) -> float:
    if references.ndim == 2 and references.shape[1] == 1:
        # Without this option, scikit-learn treats a single column as a choice between two classes.
        references, predictions, average = references[:, 0], predictions[:, 0], "binary"
    return sklearn_metrics.f1_score(references, predictions, average=average, zero_division=np.nan)


@register_metric
class MeanAbsoluteError(ArrayMetric):
    """Mean absolute error, in the unit of the labels."""

    key, value_type, ndims, less_is_better = "mae", "float64", (1, 2), True

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.mean_absolute_error(references, predictions)


@register_metric
class MeanSquaredError(ArrayMetric):
    """Mean squared error, in the squared unit of the labels."""

    key, value_type, ndims, less_is_better = "mse", "float64", (1, 2), True

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.mean_squared_error(references, predictions)


@register_metric
class Pearson(ArrayMetric):
    """
    Pearson's correlation, -1 to 1; of vectors, the mean over their values.

    It is 0.0 if one side is constant (so also for a single row): a constant explains nothing.
    """

    key, value_type, ndims, scale = "pearson", "float64", (1, 2), None

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        rows = len(references)
        columns = zip(references.reshape(rows, -1).T, predictions.reshape(rows, -1).T, strict=True)
        return float(np.mean([_pearson(x, y) for x, y in columns]))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    # Checked first: the rounded mean of a constant may differ from it, and the noise would correlate.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
