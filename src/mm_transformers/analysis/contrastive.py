"""Measures whether the picture makes the right text more probable than a wrong one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.sources import batches
from ..model.answers import evaluation_mode
from ..model.modeling_mm_transformer import MMTransformerForMultiTask


def contrastive_accuracy(
    model: MMTransformerForMultiTask,
    collator: Callable[[list[Any]], dict[str, Any]],
    rows: Sequence[Any],
    task: str,
    wrong: Sequence[str],
    batch_size: int = 32,
) -> float:
    """
    The share of rows in which the right text has a lower perplexity than the wrong one: the measure of CoMMuTE.

    See https://arxiv.org/abs/2212.10140. If both texts are right for some picture, a model that ignores the picture has
    0.5 by construction. Equal perplexities count half.

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        collator ([`MMDataCollator`]): Makes batches of the rows.
        rows: a data set with the columns that the collator reads; the column of the task holds the right texts.
        task (`str`): Name of a [`Generation`] task.
        wrong (`list[str]`): A wrong text for each row.
        batch_size (`int`, *optional*, defaults to 32): Rows per batch.

    Raises:
        ValueError: if the task does not write, the number of wrong texts differs from that of rows, or a right text is
            missing.

    Example:

    ```python
    >>> accuracy = contrastive_accuracy(model, collator, translations, "german", wrong=["Der Hund ist blau."])
    ```
    """
    kind = model.tasks.get(task)
    if kind is None or not kind.needs_decoder:
        raise ValueError(f"task must be the name of a task that writes text, but is {task!r}.")
    if len(wrong) != len(rows):
        raise ValueError(f"There must be one wrong text per row, but there are {len(wrong)} for {len(rows)} rows.")
    wins = 0.0
    for numbers, batch_rows in batches(rows, batch_size):
        wrong_rows = [{**row, kind.column: wrong[number]} for number, row in zip(numbers, batch_rows, strict=True)]
        right_scores, wrong_scores = (log_perplexities(model, collator(r), task) for r in (batch_rows, wrong_rows))
        if right_scores.isnan().any():
            number = numbers[int(right_scores.isnan().nonzero()[0])]
            raise ValueError(f"Row {number:,} has no text for task {task!r}.")
        if wrong_scores.isnan().any():
            number = numbers[int(wrong_scores.isnan().nonzero()[0])]
            raise ValueError(f"Row {number:,} has no wrong text to compare with.")
        wins += (right_scores < wrong_scores).sum().item() + 0.5 * (right_scores == wrong_scores).sum().item()
    return wins / len(rows)


@torch.no_grad()
def log_perplexities(model: MMTransformerForMultiTask, batch: dict[str, Any], task: str) -> torch.Tensor:
    """
    (rows,): the mean loss of the tokens of each row's text, NaN without a text.

    Args:
        model: runs in evaluation mode, whatever its mode.
        batch: of a collator, with labels; these are taken out of it.
        task (`str`): Name of a task that writes.
    """
    labels = batch.pop("labels")[task].to(model.device)
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    with evaluation_mode(model):
        logits = model(**inputs, labels={task: labels}).logits[task]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    known = labels != -100
    return losses.sum(1) / torch.where(known.any(1), known.sum(1), torch.nan)
