"""One label out of several, for the whole row."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import torch
from torch import nn

from .task_base import (
    NO_CONTEXT,
    LabelContext,
    PooledHead,
    Task,
    check_labels,
    is_missing,
    label_id,
    label_scores,
    register_task,
)


@register_task
@dataclass
class Classification(Task):
    """
    Chooses one of `labels` for each row; cross-entropy. Sentiment, topic, intent, visual entailment, ...

    Logits (batch, num_labels); labels (batch,) int64, -100 where missing. A cell is a label name or an id.

    Args:
        labels (`list[str]`): The label names; their order gives the ids.

    Example:

    ```python
    >>> Classification("sentiment", labels=["negative", "neutral", "positive"], loss_weight=0.5)
    ```
    """

    labels: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "classification"
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "f1_micro")

    def __post_init__(self):
        super().__post_init__()
        self.labels = check_labels(self.name, self.labels)
        if len(self.labels) < 2:
            raise ValueError(f"Task {self.name!r}: a choice needs at least two labels, but got {self.labels}.")

    def build_head(self, config, hidden_size: int) -> nn.Module:
        return PooledHead(hidden_size, len(self.labels), config.classifier_dropout)

    def encode_label(self, value: Any, text: str) -> Optional[int]:
        return None if is_missing(value) else label_id(self.name, self.labels, value)

    def strata(self, labels: list[Any]) -> list[tuple[Hashable, ...]]:
        return [() if label is None else (label,) for label in labels]

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        return torch.tensor([-100 if value is None else value for value in values], dtype=torch.int64)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cross_entropy_sum(logits, labels), self.num_labelled(labels)

    def decode(
        self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None, top_k: Optional[int] = None
    ) -> list[Any]:
        """For each row the label with the highest probability; with `top_k` a list of as many, highest first."""
        scores, ids = logits.float().softmax(-1).topk(min(top_k or 1, len(self.labels)))
        answers = [
            [{"label": self.labels[i], "score": score} for i, score in zip(*row, strict=True)]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
        return [row[0] for row in answers] if top_k is None else answers

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        return label_scores(self, logits, answers)

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labelled = labels != -100
        return logits.argmax(-1)[labelled], labels[labelled]


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (..., num_labels) logits in float32, summed over the labels that are not -100."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )
