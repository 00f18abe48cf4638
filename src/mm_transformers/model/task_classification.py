"""One label out of several, for the whole row."""

import numbers
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .class_weights import BALANCED, balanced_weights, check_weights, known_weights, weight_tensor
from .label_cells import check_labels, is_missing, label_id, label_scores
from .linear_problem import MultinomialProblem
from .task_base import NO_CONTEXT, LabelContext, PooledHead, Task, register_task


# The largest balanced weight that a task sets by itself.
MAX_BALANCED_WEIGHT = 10.0


@register_task
@dataclass
class Classification(Task):
    """
    Chooses one of `labels` for each row; cross-entropy. Sentiment, topic, intent, visual entailment, ...

    Logits (batch, num_labels); labels (batch,) int64, -100 where missing. A cell is a label name or an id.

    Args:
        labels (`list[str]`): The label names; their order gives the ids.
        class_weights (`str` or `dict[str, float]`, *optional*):
            Factors of the loss by the label of the row: a dict (1 for labels that it leaves out), or `"balanced"` for
            n / (k * n_c) over the training rows (n rows of k classes, n_c of class c), as scikit-learn has it.
            [`MMTrainer`] replaces `"balanced"` by these numbers before training. `None` stands for 1, and for balanced
            weights if the task starts as a linear model of balanced classes (see [`start_probes`]); `{}` is always 1.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target that is spread over all labels, at least 0 and below 1.

    Both are those of `torch.nn.CrossEntropyLoss`, in training and evaluation; answers and metrics know nothing of them.
    But the weighted sum is divided by the number of labelled rows, not by the sum of their weights: otherwise the
    weights of a batch with one class, or one row, would cancel. Over the training rows balanced weights have the mean
    1, so there both are the same. The weights of a dict are taken as they are.

    Example:

    ```python
    >>> Classification("sentiment", labels=["negative", "neutral", "positive"], loss_weight=0.5)
    ```
    """

    labels: list[str] = field(default_factory=list)
    class_weights: Optional[str | dict[str, float]] = field(default=None, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)

    kind: ClassVar[str] = "classification"
    takes_whole_numbers: ClassVar[bool] = True
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "f1_micro")
    hub_task: ClassVar[str] = "text-classification"
    auto_class: ClassVar[Optional[str]] = "AutoModelForSequenceClassification"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = check_labels(self.name, self.labels)
        if len(self.labels) < 2:
            raise ValueError(f"Task {self.name!r}: it needs at least two labels, but got {self.labels}.")
        self.class_weights = check_weights(self, "class_weights")
        self.label_smoothing = check_label_smoothing(self)

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> nn.Module:
        return PooledHead(hidden_size, len(self.labels), config.classifier_dropout)

    def linear_problem(self) -> MultinomialProblem:
        return MultinomialProblem(len(self.labels), label_weights=known_weights(self, "class_weights"))

    def encode_label(self, value: Any, text: str) -> Optional[int]:
        return None if is_missing(value) else label_id(self.name, self.labels, value)

    def strata(self, labels: list[Any]) -> list[tuple[Hashable, ...]]:
        return [() if label is None else (label,) for label in labels]

    @property
    def unresolved(self) -> tuple[str, ...]:
        return ("class_weights",) if self.class_weights == BALANCED else ()

    @property
    def decided_by_training(self) -> tuple[str, ...]:
        return ("class_weights",) if self.class_weights in (None, BALANCED) else ()

    def prepare_for(self, labels: Iterable[Any]) -> None:
        if self.unresolved:
            counts = Counter(labels)
            self.class_weights = balanced_weights(self.labels, [counts[i] for i in range(len(self.labels))])

    def balance(self, counts: Sequence[float]) -> None:
        if self.class_weights is None:
            # A single row of a rare class should not dominate a step.
            weights = balanced_weights(self.labels, list(counts))
            self.class_weights = {label: min(weight, MAX_BALANCED_WEIGHT) for label, weight in weights.items()}

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        return torch.tensor([-100 if value is None else value for value in values], dtype=torch.int64)

    def label_shape(self, logits: torch.Tensor) -> tuple[int, ...]:
        return logits.shape[:-1]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight_tensor(self, "class_weights", logits.device)
        return cross_entropy_sum(logits, labels, weight, self.label_smoothing), self.num_labelled(labels)

    def decode(
        self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None, top_k: Optional[int] = None
    ) -> list[Any]:
        """The most probable label of each row; with `top_k` a list of this length, highest first."""
        scores, ids = logits.float().softmax(-1).topk(min(top_k or 1, len(self.labels)))
        answers = [
            [{"label": self.labels[i], "score": score} for i, score in zip(*row, strict=True)]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
        return [row[0] for row in answers] if top_k is None else answers

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(-1)

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        return label_scores(self, logits, answers)

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labelled = labels != -100
        return logits.argmax(-1)[labelled], labels[labelled]


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weight: Optional[torch.Tensor] = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of (..., num_labels) logits in float32, summed over the labels that are not -100."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        weight,
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def check_label_smoothing(task: Any) -> float:
    """
    The value of the option `label_smoothing`.

    Raises:
        ValueError: if it is not a number of at least 0 and below 1.
    """
    value = task.label_smoothing
    if not isinstance(value, numbers.Real) or not 0 <= value < 1:
        raise ValueError(f"Task {task.name!r}: label_smoothing must be at least 0 and below 1, but is {value!r}.")
    return float(value)
