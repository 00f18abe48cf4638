"""Rows with what a model answers to them, and how wrong that is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch
from accelerate.utils import send_to_device

from ...data.collator import MMDataCollator
from ...model.answers import evaluation_mode
from ...model.task_base import is_missing


class Answered(NamedTuple):
    """
    One answer to one row.

    Args:
        number: of the row, from 0.
        task: its name.
        answer, truth: in words; `None` where the row has no label.
        right: whether they agree; `None` where that is no question (numbers, texts).
        confidence: probability of the answer; `None` where it has none.
        loss: of the label, a mean over its parts (words, labels).
    """

    number: int
    task: str
    answer: Any
    truth: Any
    right: Optional[bool]
    confidence: Optional[float]
    loss: Optional[float]


def answers_to(
    model: Any, collator: MMDataCollator, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> Iterator[list[Answered]]:
    """
    Of one batch after the other, all answers of tasks that a head gives; and, of tasks that write, how likely the
    label is.

    Raises:
        ValueError: as the collator, if a row cannot be read.
    """
    for start in range(0, len(rows), batch_size):
        numbers = range(start, min(start + batch_size, len(rows)))
        # A generator may be left at any `yield`, so the model is as it was at each.
        with evaluation_mode(model), torch.no_grad():
            found = _answer_batch(model, collator, numbers, [rows[i] for i in numbers])
        yield found


def _answer_batch(
    model: Any, collator: MMDataCollator, numbers: Sequence[int], rows: list[Mapping[str, Any]]
) -> list[Answered]:
    batch = send_to_device(collator(rows), model.device)
    labels = batch.pop("labels")
    outputs = model.model(**batch)
    logits = model(encoder_outputs=outputs).logits
    found = []
    for name, task in model.tasks.items():
        of_task = model.read_written(task, outputs, labels[name]) if task.needs_decoder else logits[name]
        for i, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            total, count = task.loss(of_task[i : i + 1], labels[name][i : i + 1])
            loss = float(total / count) if count > 0 else None
            if task.compares_rows and not task.needs_mismatches:
                loss = None  # which a row by itself has not
            cell = row.get(task.column)
            truth = None if loss is None or is_missing(cell) else cell
            found.append(Answered(number, name, *_judged(task, of_task[i], labels[name][i], truth), loss))
    return found


def _judged(task: Any, logits: torch.Tensor, label: torch.Tensor, truth: Any) -> tuple[Any, Any, Any, Any]:
    """Answer, truth, right, confidence."""
    if task.kind == "classification":
        confidence, chosen = logits.float().softmax(-1).max(-1)
        told = task.labels[int(label)] if label != -100 else None
        return task.labels[int(chosen)], told, bool(chosen == label) if told is not None else None, float(confidence)
    if task.kind == "multi_label":
        probabilities = logits.float().sigmoid()
        chosen = probabilities >= task.threshold
        answer = [name for name, on in zip(task.labels, chosen.tolist(), strict=True) if on]
        known = not label.isnan().any()
        told = [name for name, on in zip(task.labels, label.tolist(), strict=True) if on == 1] if known else None
        sure = torch.where(chosen, probabilities, 1 - probabilities).prod()
        return answer, told, bool((chosen == (label == 1)).all()) if known else None, float(sure)
    if task.kind == "token_classification":
        labelled = label != -100
        confidence, chosen = logits.float().softmax(-1).max(-1)
        answer = [task.labels[i] for i in chosen[labelled].tolist()]
        told = [task.labels[i] for i in label[labelled].tolist()] or None
        right = bool((chosen == label)[labelled].all()) if told else None
        return answer, told, right, float(confidence[labelled].min()) if told else None
    if task.kind == "regression":
        return float(logits), None if label.isnan() else float(label), None, None
    if task.kind == "matching":
        score = float(logits.flatten()[0].sigmoid())
        told = None if label[0] == -100 else bool(label[0])
        return score > 0.5, told, None if told is None else (score > 0.5) == told, max(score, 1 - score)
    return None, truth, None, None


def confusion(answers: Sequence[Answered], labels: Sequence[str]) -> list[list[int]]:
    """How often which label (rows) was answered by which (columns)."""
    places = {label: i for i, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for answered in answers:
        told, said = (x if isinstance(x, list) else [x] for x in (answered.truth, answered.answer))
        for truth, answer in zip(told, said, strict=False):
            if truth in places and answer in places:
                counts[places[truth]][places[answer]] += 1
    return counts


def worst(answers: Sequence[Answered], count: int) -> list[Answered]:
    """Those of the highest loss, of which none is right."""
    wrong = [answered for answered in answers if answered.loss is not None and answered.right is not True]
    return sorted(wrong, key=lambda answered: -(answered.loss or 0.0))[:count]


def most_confident_errors(answers: Sequence[Answered], count: int) -> list[Answered]:
    wrong = [answered for answered in answers if answered.right is False and answered.confidence is not None]
    return sorted(wrong, key=lambda answered: -(answered.confidence or 0.0))[:count]
