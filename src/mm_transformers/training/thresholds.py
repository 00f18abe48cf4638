"""Thresholds of labels, chosen on validation rows."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from ..data.collator import MMDataCollator
from ..data.sources import rows_of
from ..model.answers import evaluation_mode, unwrapped
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from .objective.task_options import share_options


def tune_thresholds(
    model: MMTransformerForMultiTask,
    collator: MMDataCollator | MMTransformerProcessor,
    rows: Any,
    batch_size: int = 32,
    num_workers: int = 0,
    holders: Sequence[Any] = (),
) -> dict[str, dict[str, float]]:
    """
    Sets the thresholds of [`MultiLabel`] tasks: for each label the one with the highest F1 on these rows.

    Answers, metrics and the saved model then use them. A label that all rows have, or none, keeps its threshold. Take
    validation rows: on training rows, probabilities are too certain. Scores on the rows that chose the thresholds are
    too high, so measure on others.

    Args:
        model ([`MMTransformerForMultiTask`]): Its tasks and config are changed.
        collator ([`MMDataCollator`]): The columns. The processor of the model stands for a collator with the default
            columns.
        rows: a data set, a list of dicts, a table of pandas, or a [`DataSource`]; all are read.
        batch_size, num_workers (`int`, *optional*): Rows per batch; processes that read files in the background.
        holders: objects with their own tasks in a dict `tasks`, such as [`MultiTaskMetrics`], which get the same.

    Returns:
        Task -> label -> threshold, of the tasks that were tuned.

    Raises:
        ValueError: one sentence, if the model has no such task, no row has a label, or a row cannot be read.

    Example:

    ```python
    >>> model.config.tasks = [MultiLabel("tags", labels=["red", "blue"]).to_dict()]
    >>> tagger = MMTransformerForMultiTask(model.config).eval()
    >>> rows = [{"text": "a red dog", "tags": ["red"]}, {"text": "the river", "tags": []}]
    >>> list(tune_thresholds(tagger, processor, rows)["tags"])
    ['red', 'blue']
    ```
    """
    model = unwrapped(model)
    tasks = [task for task in model.tasks.values() if task.can_tune]
    if not tasks:
        raise ValueError("No task of the model has thresholds; MultiLabel tasks have.")
    if isinstance(collator, MMTransformerProcessor):
        collator = MMDataCollator(collator, model.config)
    dataset, _ = rows_of(rows, collator)
    loader = DataLoader(dataset, batch_size, collate_fn=collator, num_workers=num_workers)
    logits: dict[str, list[torch.Tensor]] = {task.name: [] for task in tasks}
    labels: dict[str, list[torch.Tensor]] = {task.name: [] for task in tasks}
    with evaluation_mode(model), torch.no_grad():
        for batch in loader:
            of_batch = batch.pop("labels")
            found = model(**send_to_device(batch, model.device)).logits
            for task in tasks:
                logits[task.name].append(found[task.name].float().cpu())
                labels[task.name].append(of_batch[task.name])
    tuned = {}
    for task in tasks:
        known = torch.cat(labels[task.name]) if labels[task.name] else torch.empty(0)
        if not len(known) or not int(task.num_labelled(known)):
            raise ValueError(f"No row has a label of task {task.name!r}, so its thresholds cannot be chosen.")
        tuned[task.name] = task.tune(torch.cat(logits[task.name]), known)
    share_options(model, tasks, holders)
    return tuned
