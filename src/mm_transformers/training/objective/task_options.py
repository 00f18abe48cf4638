"""Task options that depend on the training rows, such as balanced class weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.mixture import DataMixture
from ...data.row_labels import encoded_labels
from ...data.sources import DataSource, is_iterable
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.tasks import Task


logger = logging.get_logger(__name__)


def prepare_tasks(
    model: MMTransformerForMultiTask, dataset: Any, collator: MMDataCollator, *holders: Any
) -> list[Task]:
    """
    Determines the `unresolved` options of each task from the training labels, by [`Task.prepare_for`].

    The result is written into the config, so that a saved model has the same loss. Only the columns of these labels are
    read. Each process gets the same result. A second call does nothing.

    Args:
        model ([`MMTransformerForMultiTask`]): Its tasks and config are changed.
        dataset: the training rows, without held-out rows. In a [`DataMixture`] each row counts once, independent of
            `sampling`.
        collator ([`MMDataCollator`]): The column of texts.
        holders: objects with their own tasks in a dict `tasks`, such as [`MultiTaskMetrics`], which get the same.

    Returns:
        The tasks that have changed.

    Raises:
        ValueError: if the rows are a stream, or a cell is not a label.

    Example:

    ```python
    >>> prepare_tasks(trainer.fused_model, rows, trainer.data_collator, trainer.compute_metrics)
    ```
    """
    waiting = [task for task in model.tasks.values() if task.unresolved]
    if not waiting:
        return []
    sources = list(dataset.sources.values()) if isinstance(dataset, DataMixture) else [dataset]
    for source in sources:
        if is_iterable(source.dataset if isinstance(source, DataSource) else source):
            raise ValueError(
                f"Task {waiting[0].name!r}: {waiting[0].unresolved[0]} depends on all training rows, but they are a "
                "stream: give the weights as a dict from label to weight."
            )
    labels: dict[str, list[Any]] = {task.name: [] for task in waiting}
    for source in sources:
        encoded = encoded_labels(source, waiting, collator.text_column, collator.label_separator)
        for name, found in encoded.items():
            labels[name] += found
    for task in waiting:
        options = task.unresolved
        task.prepare_for(labels[task.name])
        for option in options:
            logger.info(f"Task {task.name!r}: {option} computed from the training rows: {getattr(task, option)}.")
    share_options(model, waiting, holders)
    return waiting


def balance_tasks(model: MMTransformerForMultiTask, counts: Mapping[str, Sequence[int]], *holders: Any) -> None:
    """
    Calls [`Task.balance`] for the tasks that started with balanced classes, and writes the result into the config.

    So training continues with the loss of the fitted linear model.

    Args:
        counts: task -> the number of training rows with each of its labels.
        model, holders: as in [`prepare_tasks`].
    """
    for name, numbers in counts.items():
        model.tasks[name].balance(numbers)
    share_options(model, list(model.tasks.values()), holders)


def share_options(model: MMTransformerForMultiTask, tasks: Sequence[Task], holders: Sequence[Any]) -> None:
    """Writes the options of the tasks of a model into its config, and gives changed tasks to the holders."""
    model.config.tasks = [task.to_dict() for task in model.tasks.values()]
    for holder in holders:
        if isinstance(getattr(holder, "tasks", None), dict):
            holder.tasks.update({task.name: task for task in tasks if task.name in holder.tasks})
