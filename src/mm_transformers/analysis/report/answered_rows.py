"""Rows with the answers of a model and their losses."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from accelerate.utils import send_to_device

from ...data.collator import MMDataCollator
from ...data.sources import batches
from ...model.label_cells import is_missing
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.predictions import Predictions


class Answered(NamedTuple):
    """
    One answer to one row.

    Args:
        number: the number of the row, from 0.
        group: its availability group, such as "text + vision".
        task: the name of the task.
        loss: the loss of the label, a mean over its parts (words, labels); `None` without a label.
        answer, truth, is_right, confidence, label_pairs: see [`Judgement`].
    """

    number: int
    group: str
    task: str
    loss: Optional[float]
    answer: Any
    truth: Any
    is_right: Optional[bool]
    confidence: Optional[float]
    label_pairs: tuple[tuple[str, str], ...]


def answers_to(
    model: MMTransformerForMultiTask, collator: MMDataCollator, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> Iterator[list[Answered]]:
    """
    All answers of heads, batch by batch; for tasks that write, the likelihood of the label.

    Raises:
        ValueError: as the collator, if a row cannot be read.
    """
    for numbers, of_batch in batches(rows, batch_size):
        yield _answer_batch(model, collator, numbers, of_batch)


def _answer_batch(
    model: MMTransformerForMultiTask, collator: MMDataCollator, numbers: Sequence[int], rows: list[Mapping[str, Any]]
) -> list[Answered]:
    batch = send_to_device(collator(rows), model.device)
    labels = batch.pop("labels")
    predictions = Predictions.of(model, batch)
    found = []
    for name, task in model.tasks.items():
        of_task = predictions.labelled_logits(name, labels[name])
        sure = of_task if task.needs_decoder else predictions.calibrated(name, of_task)
        for i, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            total, count = task.loss(of_task[i : i + 1], labels[name][i : i + 1])
            loss = float(total / count) if count > 0 else None
            if task.needs_other_rows:
                loss = None
            label, cell = labels[name][i], row.get(task.column or task.name)
            judged = (
                task.judge(of_task[i], label) if sure is of_task else task.judge_calibrated(of_task[i], sure[i], label)
            )
            if judged.truth is None and loss is not None and not is_missing(cell):
                judged = judged._replace(truth=cell)
            found.append(Answered(number, predictions.groups[i], name, loss, *judged))
    return found


def confusion(answers: Sequence[Answered], labels: Sequence[str]) -> list[list[int]]:
    """How often each label (rows) got each answer (columns)."""
    places = {label: i for i, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for answered in answers:
        for truth, answer in answered.label_pairs:
            counts[places[truth]][places[answer]] += 1
    return counts


def worst(answers: Sequence[Answered], count: int) -> list[Answered]:
    """The answers with the highest loss; none is right."""
    wrong = [answered for answered in answers if answered.loss is not None and answered.is_right is not True]
    return sorted(wrong, key=lambda answered: -(answered.loss or 0.0))[:count]


def most_confident_errors(answers: Sequence[Answered], count: int) -> list[Answered]:
    wrong = [answered for answered in answers if answered.is_right is False and answered.confidence is not None]
    return sorted(wrong, key=lambda answered: -(answered.confidence or 0.0))[:count]
