"""The `compute_metrics` of a model with several tasks."""

import copy
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import evaluate
import numpy as np
import torch
from transformers import EvalPrediction
from transformers.utils import logging

from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.tasks import Task
from .base import METRICS, TaskMetric
from .names import less_is_better, task_of_metric


logger = logging.get_logger(__name__)


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
            By task name, names of registered metrics or your own objects, which replace the metrics of the task. An
            empty list leaves the loss only. Of the results of your own object, the numbers are kept, each by its name.

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
            name: _build_metrics(name, metrics.get(name, task.metric_names)) for name, task in self.tasks.items()
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
                " Import the module of your own metric (with @register_metric) first."
            )
        elif metric.num_process != 1:
            raise ValueError(
                f"Task {task!r}: metric {metric.name!r} was made with num_process={metric.num_process}, but Trainer "
                "already gathers the rows of all processes; make it with num_process=1."
            )
        else:
            built.append(metric)
    return built


def result_names(task: Task) -> list[str]:
    """
    The names of the results of a task's metrics, without the name of the task.

    Raises:
        ValueError: if a metric is unknown.
    """
    return [name for metric in _build_metrics(task.name, task.metric_names) for name in metric.names()]


def headline(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    The value of a task's first metric; of several results, the first one.

    Args:
        logits, labels: of rows (or words) that all have a label.
    """
    metric = METRICS[task.metric_names[0]](keep_in_memory=True)
    predictions, references = (x.numpy() for x in task.predictions_and_references(logits, labels))
    return _compute(task.name, metric, predictions, references)[metric.names()[0]]


def _entry_of(task: str, arrays: Any, field: str) -> Any:
    if not isinstance(arrays, Mapping) or task not in arrays:
        found = f"only {', '.join(arrays)}" if isinstance(arrays, Mapping) else f"a {type(arrays).__name__}"
        raise ValueError(f"EvalPrediction.{field} must be a dict with an array for task {task!r}, but is {found}.")
    return arrays[task]


def _compute(task: str, metric: evaluate.Metric, predictions: Any, references: Any) -> dict[str, float]:
    if isinstance(metric, TaskMetric) and not metric.fits(references):
        fitting = ", ".join(key for key, known in METRICS.items() if known.fits(references))
        raise ValueError(f"Metric {metric.key!r} cannot compare the answers of task {task!r}; these can: {fitting}.")
    values = metric.compute(predictions=predictions, references=references)
    # Loggers take numbers only: no lists of values per class, no texts.
    return {key: float(value) for key, value in values.items() if isinstance(value, numbers.Real)}
