"""What the linear models of a start tell about other rows, and about labels that may be wrong."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...model.linear_problem import LinearProblem
from ...model.task_base import Task
from .linear_models import LinearModel, held_out_logits
from .verdict import Verdict


# A label counts as doubtful below this likelihood by a model that was fitted without its row.
DOUBTFUL = 0.05


class DoubtfulLabel(NamedTuple):
    """
    A label that a linear model, fitted without its row, finds unlikely.

    Args:
        row (`int`): The number of the row in the training data set, from 0. In a mixture, the rows of all data sets are
            numbered one after the other.
        label: the label of the row, as the task shows it.
        likely: the answer of the linear model.
        likelihood (`float`): The likelihood of the label, from 0 to 1.
    """

    row: int
    label: Any
    likely: Any
    likelihood: float


@dataclass
class Study:
    """
    Asks a training for more than its start: set `trainer.study` before `train()`.

    Training fills the last two fields.

    Args:
        rows: further labelled rows on which the simple models are scored, such as test rows; `None` for none.
        verdicts (`dict[str, Verdict]`): Task -> the scores of the simple models on `rows`.
        doubtful (`dict[str, list[DoubtfulLabel]]`): Task -> labels of training rows that may be wrong, the most
            doubtful first. Only for tasks whose linear model gives probabilities.

    Example:

    ```python
    >>> trainer.study = Study(data["test"])
    >>> trainer.train()
    >>> [label.row for label in trainer.study.doubtful["topic"]]
    ```
    """

    rows: Any = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    doubtful: dict[str, list[DoubtfulLabel]] = field(default_factory=dict)


def doubtful_labels(
    task: Task, problem: LinearProblem, blocks: Any, model: LinearModel, items: Any
) -> list[DoubtfulLabel]:
    """
    The labels that a cross-validated linear model finds unlikely.

    Args:
        model: the solution, for the way in which it was fitted.
        items: features, labels, groups and numbers of the labelled training rows.
    """
    if problem.per_token:
        return []
    logits, is_known = held_out_logits(problem, blocks, items.features, items.labels, items.groups, model)
    likelihoods = problem.likelihoods(logits, problem.shaped(items.labels))
    if likelihoods is None:
        return []
    chosen = np.flatnonzero(is_known & (likelihoods < DOUBTFUL))
    found = []
    scores, labels = problem.as_tensors(logits, items.labels)
    for i in chosen[np.argsort(likelihoods[chosen], kind="stable")]:
        judged = task.judge(scores[i], labels[i])
        # Where the answer agrees with the label, the model is only unsure.
        if judged.is_right is not True:
            found.append(DoubtfulLabel(int(items.rows[i]), judged.truth, judged.answer, float(likelihoods[i])))
    return found
