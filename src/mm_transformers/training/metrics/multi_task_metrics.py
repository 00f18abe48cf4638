"""Metrics that run offline, and the `compute_metrics` function that applies them to every task."""

import copy
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Optional

import datasets
import evaluate
import numpy as np
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction
from transformers.utils import logging

from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.tasks import Task
from .retrieval_metrics import RetrievalRecall
from .text_metrics import Bleu, ChrF, ExactMatch, RougeL, TextMetric


logger = logging.get_logger(__name__)


class ArrayMetric(evaluate.Metric):
    """
    A metric whose code is in the package: `evaluate.load` would fetch it from the Hub.

    Subclasses set `key`, the name of the metric and of its result, define the values that they compare, and implement
    [`score`]. An undefined metric (F1 without any positive, correlation with a constant) is 0.0. It is never NaN, and
    never absent, since `metric_for_best_model` may name it.
    """

    key: ClassVar[str]
    # "int64" for class ids and for 0/1 rows, "float64" for numbers.
    value_type: ClassVar[str]
    # 1: one value per row or token; 2: one vector per row.
    ndims: ClassVar[tuple[int, ...]]
    # Whether a smaller value is better.
    less_is_better: ClassVar[bool] = False

    @classmethod
    def names(cls) -> list[str]:
        """The names of its results."""
        return [cls.key]

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.value_type)
        by_ndim = {1: value, 2: datasets.Sequence(value)}
        # The first match is taken. Vectors come first: up to NumPy 2.3 a vector of length 1 counts as a number.
        features = [
            datasets.Features({"predictions": by_ndim[ndim], "references": by_ndim[ndim]})
            for ndim in sorted(self.ndims, reverse=True)
        ]
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="",
            features=features[0] if len(features) == 1 else features,
        )

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


class Accuracy(ArrayMetric):
    """Share of the rows (or tokens) whose class is right."""

    key, value_type, ndims = "accuracy", "int64", (1,)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.accuracy_score(references, predictions)


class SubsetAccuracy(ArrayMetric):
    """Share of the rows whose whole set of labels is right."""

    key, value_type, ndims = "subset_accuracy", "int64", (2,)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.accuracy_score(references, predictions)


class MacroF1(ArrayMetric):
    """
    Mean of the labels' F1, with equal weights.

    A label that occurs neither in the references nor in the predictions has no F1 and is left out of the mean.
    """

    key, value_type, ndims = "f1", "int64", (1, 2)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return _f1(references, predictions, "macro")


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


class MeanAbsoluteError(ArrayMetric):
    """Mean absolute error, in the unit of the labels."""

    key, value_type, ndims, less_is_better = "mae", "float64", (1, 2), True

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.mean_absolute_error(references, predictions)


class MeanSquaredError(ArrayMetric):
    """Mean squared error, in the squared unit of the labels."""

    key, value_type, ndims, less_is_better = "mse", "float64", (1, 2), True

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        return sklearn_metrics.mean_squared_error(references, predictions)


class Pearson(ArrayMetric):
    """
    Pearson's correlation, -1 to 1; of vectors, the mean over their values.

    It is 0.0 if one side is constant (so also for a single row): a constant explains nothing.
    """

    key, value_type, ndims = "pearson", "float64", (1, 2)

    def score(self, references: np.ndarray, predictions: np.ndarray) -> float:
        rows = len(references)
        columns = zip(references.reshape(rows, -1).T, predictions.reshape(rows, -1).T, strict=True)
        return float(np.mean([_pearson(x, y) for x, y in columns]))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    # Checked first: the rounded mean of a constant may differ from it, and the noise would correlate.
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


# The names in a task's `default_metrics` and in `MultiTaskMetrics(metrics=...)`.
_ARRAY_METRICS = (Accuracy, SubsetAccuracy, MacroF1, MicroF1, MeanAbsoluteError, MeanSquaredError, Pearson)
METRICS: Mapping[str, type[ArrayMetric | TextMetric | RetrievalRecall]] = MappingProxyType(
    {metric.key: metric for metric in (*_ARRAY_METRICS, Bleu, ChrF, ExactMatch, RougeL, RetrievalRecall)}
)

# The endings of names of metrics that are better when smaller.
LESS_IS_BETTER = ("loss", *(key for key, metric in METRICS.items() if getattr(metric, "less_is_better", False)))
# The same for metrics of others, which have no such attribute.
_ERRORS = ("error", "error_rate", "rmse", "wer", "cer", "ter", "perplexity")


def is_measured(value: Any) -> bool:
    """Whether a value from a file of results is a number; integers may be too large for a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def less_is_better(name: str) -> bool:
    """
    Whether a metric is the better the smaller it is, by its name; [`MultiTaskMetrics.less_is_better`] asks the metric.

    Args:
        name: such as `"mae"` or `"price_mae"`.
    """
    return any(name == ending or name.endswith(f"_{ending}") for ending in (*LESS_IS_BETTER, *_ERRORS))


def task_of_metric(metric: str, tasks: Iterable[str]) -> str | None:
    """The task of `{task}_{metric}`: the longest match, since one task name may begin another."""
    return max((task for task in tasks if metric.startswith(f"{task}_")), key=len, default=None)


def default_names(task: Task) -> list[str]:
    """The names of the results of a task's default metrics, without the name of the task."""
    return [name for metric in task.default_metrics for name in METRICS[metric].names()]


def headline(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> tuple[str, float]:
    """
    The name and the value of a task's first metric.

    Args:
        logits, labels: of rows (or words) that all have a label.
    """
    metric = METRICS[task.default_metrics[0]](keep_in_memory=True)
    predictions, references = (x.numpy() for x in task.predictions_and_references(logits, labels))
    return task.default_metrics[0], _compute(task.name, metric, predictions, references)[task.default_metrics[0]]


class MultiTaskMetrics:
    """
    The `compute_metrics` of a multi-task model: `Trainer(..., compute_metrics=MultiTaskMetrics(model.config))`.

    The input is an [`~transformers.EvalPrediction`] whose `predictions` and `label_ids` are dicts task -> array. The
    result is a flat dict of floats:

    - `{task}_loss`: the exact mean over the rows (or tokens) with a label, however the batches were formed.
    - `{task}_{metric}` for each of the task's metrics, over the same rows.

    A task without any label contributes nothing. Trainer gathers the rows of all ranks first, and adds `eval_`
    afterwards.

    Args:
        config ([`MMTransformerConfig`]): The config with the tasks.
        processor ([`MMTransformerProcessor`], *optional*): Decodes token ids, for metrics that compare texts.
        metrics (`dict[str, list[str | evaluate.Metric]]`, *optional*):
            By task name, names from [`METRICS`] or your own objects, which replace the task's default metrics. An empty
            list leaves the loss only. Of the results of your own object, the numbers are kept, each under its own name.

    Raises:
        ValueError: if a task or a metric is unknown.

    Example:

    ```python
    >>> metrics = {"sentiment": ["accuracy", evaluate.load("matthews_correlation")]}
    >>> compute_metrics = MultiTaskMetrics(model.config, processor, metrics)
    ```
    """

    def __init__(
        self,
        config: MMTransformerConfig,
        processor: Optional[MMTransformerProcessor] = None,
        metrics: Mapping[str, Sequence[str | evaluate.Metric]] | None = None,
    ):
        metrics = metrics or {}
        self.tasks: dict[str, Task] = config.get_tasks()
        self.tokenizer = getattr(processor, "tokenizer", None)
        writing = [name for name, task in self.tasks.items() if task.needs_decoder and metrics.get(name, True)]
        if writing and self.tokenizer is None:
            raise ValueError(
                f"Task {writing[0]!r} writes text, and decoding it needs the processor: MultiTaskMetrics(config, "
                "processor)."
            )
        unknown = sorted(set(metrics) - set(self.tasks))
        if unknown:
            raise ValueError(
                f"Metrics are given for task {unknown[0]!r}, but the tasks of the model are {', '.join(self.tasks)}."
            )
        self.metrics: dict[str, list[evaluate.Metric]] = {
            name: _build_metrics(name, metrics.get(name, task.default_metrics)) for name, task in self.tasks.items()
        }
        # By name: each metric, and the references that it was last given, if it does not say whether less is better.
        self._seen: dict[str, tuple[evaluate.Metric, Any]] = {}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        The losses and metrics of all tasks.

        Args:
            prediction: `predictions[task]` are the task's logits and `label_ids[task]` its labels, with rows along axis
                0. Missing labels are -100 (integers) or NaN (floats). For tasks that write, `predictions[task]` may be
                a dict, as from [`MMTrainer`]: `losses` (rows), summed over tokens, `generated_ids` (rows, length) and
                `references` (rows, bytes), the true texts. Without `references` the labels are decoded. Logits of such
                tasks give the loss only.

        Raises:
            ValueError: if the array of a task is missing, if a metric cannot compare the answers of the task, or if two
                metrics have the same name.
        """
        results: dict[str, float] = {}
        for name, task in self.tasks.items():
            labels = torch.as_tensor(_entry_of(name, prediction.label_ids, "label_ids"))
            answers = _entry_of(name, prediction.predictions, "predictions")
            if isinstance(answers, Mapping):
                total, count = torch.as_tensor(answers["losses"]).double().sum(), task.num_labelled(labels)
            else:
                answers = torch.as_tensor(answers)
                total, count = task.loss(answers, labels)
            if count == 0:
                continue
            results[f"{name}_loss"] = (total / count).item()
            if not torch.isfinite(total):
                logger.warning(
                    f"The loss of task {name!r} is {total.item()}, so its other metrics are not computed. Training "
                    "has probably diverged (try a smaller learning rate)."
                )
                continue
            if not self.metrics[name]:
                continue
            if isinstance(answers, Mapping) and "generated_ids" in answers:
                labelled = np.asarray(labels != -100).any(-1)
                written = self._read(np.asarray(answers["generated_ids"])[labelled])
                if "references" in answers:
                    cells = task.decode_references(np.asarray(answers["references"])[labelled])
                else:
                    cells = self._read(np.asarray(labels)[labelled])
                self._score(results, name, written, cells)
                continue
            if task.needs_decoder or isinstance(answers, Mapping):
                continue
            predictions, references = (x.numpy() for x in task.predictions_and_references(answers, labels))
            # Partly labelled rows have a loss, but metrics may not be able to use them.
            if len(references) == 0:
                continue
            self._score(results, name, predictions, references)
        return results

    def _score(self, results: dict[str, float], name: str, predictions: Any, references: Any) -> None:
        for metric in self.metrics[name]:
            for key, value in _compute(name, metric, predictions, references).items():
                if f"{name}_{key}" in results:
                    raise ValueError(f"Two metrics would be called '{name}_{key}'; leave one of them out.")
                results[f"{name}_{key}"] = value
                says = getattr(metric, "less_is_better", None) is not None
                self._seen[f"{name}_{key}"] = metric, None if says else references

    def less_is_better(self, name: str) -> bool:
        """
        Whether a metric is the better the smaller it is.

        A metric says so by an attribute `less_is_better`. One without it is asked by example, if it has been computed:
        whether it gives right answers less than those of other rows. The loss, and metrics that have not been computed,
        go by their name.

        Args:
            name: `{task}_{metric}`, as in the results.
        """
        task = task_of_metric(name, self.tasks)
        if name not in self._seen or task is None:
            return less_is_better(name)
        metric, references = self._seen[name]
        declared = getattr(metric, "less_is_better", None)
        if declared is None and not self.tasks[task].compares_rows:
            others = [*references[1:], *references[:1]]
            key = name.removeprefix(f"{task}_")
            right, wrong = (_compute(task, metric, answers, references)[key] for answers in (references, others))
            declared = right < wrong if right != wrong else None
        return less_is_better(name) if declared is None else bool(declared)

    def _read(self, ids: np.ndarray) -> list[str]:
        padding = self.tokenizer.pad_token_id
        return self.tokenizer.batch_decode(np.where(ids == -100, padding, ids), skip_special_tokens=True)


class WithLosses:
    """
    A `compute_metrics` with the exact losses of all rows, and the results of another one.

    Args:
        config ([`MMTransformerConfig`]): The config with the tasks.
        own (*optional*): The other one.
    """

    def __init__(self, config: MMTransformerConfig, own: Callable[[EvalPrediction], dict[str, float]] | None = None):
        self.losses = MultiTaskMetrics(config, metrics=dict.fromkeys(config.get_tasks(), ()))
        self.own = own

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        answers, labels = prediction.predictions, prediction.label_ids
        losses = copy.copy(self.losses)
        # A custom collator may have labels of some tasks only, in another form.
        is_ours = isinstance(answers, Mapping) and isinstance(labels, Mapping)
        losses.tasks = {n: t for n, t in losses.tasks.items() if is_ours and n in answers and n in labels}
        return losses(prediction) | ({} if self.own is None else self.own(prediction))


def _build_metrics(task: str, metrics: Sequence[str | evaluate.Metric]) -> list[evaluate.Metric]:
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise ValueError(f"Task {task!r}: metrics must be a list of names or evaluate.Metric objects, not {metrics!r}.")
    built = []
    for metric in metrics:
        if isinstance(metric, str) and metric in METRICS:
            # In memory, because every rank computes: the default cache file would be locked by one of them.
            built.append(METRICS[metric](keep_in_memory=True))
        elif not isinstance(metric, evaluate.EvaluationModule):
            raise ValueError(
                f"Task {task!r}: unknown metric {metric!r}; known are {', '.join(METRICS)}, or pass an evaluate.Metric."
            )
        elif metric.num_process != 1:
            raise ValueError(
                f"Task {task!r}: metric {metric.name!r} was made with num_process={metric.num_process}, but Trainer "
                "already gathers the rows of all processes; make it with num_process=1."
            )
        else:
            built.append(metric)
    return built


def _entry_of(task: str, arrays: Any, field: str) -> Any:
    if not isinstance(arrays, Mapping) or task not in arrays:
        found = f"only {', '.join(arrays)}" if isinstance(arrays, Mapping) else f"a {type(arrays).__name__}"
        raise ValueError(f"EvalPrediction.{field} must be a dict with an array for task {task!r}, but is {found}.")
    return arrays[task]


def _compute(task: str, metric: evaluate.Metric, predictions: Any, references: Any) -> dict[str, float]:
    if isinstance(metric, (ArrayMetric, TextMetric, RetrievalRecall)) and not metric.fits(references):
        fitting = ", ".join(key for key, known in METRICS.items() if known.fits(references))
        raise ValueError(f"Metric {metric.key!r} cannot compare the answers of task {task!r}; these can: {fitting}.")
    values = metric.compute(predictions=predictions, references=references)
    # Loggers take numbers only: no lists of values per class, no texts.
    return {key: float(value) for key, value in values.items() if isinstance(value, numbers.Real)}
