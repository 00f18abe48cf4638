"""Any number of labels for the whole row."""

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .class_weights import BALANCED, check_weights, known_weights, weight_tensor
from .conformal import LEVELS, risk_thresholds
from .label_cells import PADDING, as_scalar, check_labels, is_missing, label_id, label_scores, shorten_value
from .label_lists import split_labels
from .linear_problem import BinaryProblem
from .task_base import NO_CONTEXT, Judgement, LabelContext, PooledHead, Task, register_task
from .thresholds import best_threshold, check_thresholds


@register_task
@dataclass
class MultiLabel(Task):
    """
    Predicts for each of `labels` whether the row has it.

    The loss is binary cross-entropy, averaged over the labels of a row.

    Logits (batch, num_labels); labels (batch, num_labels) float32 of 0 and 1, NaN where missing. A cell is a list of
    label names or ids, or a list with a truth value for each label. An empty list means no label, and `None` means not
    known. In a text, labels stand in a list (`["red", "blue"]`) or between separators (`red|blue`). A blank text is the
    same as `None`. In a list, -100 is ignored.

    Args:
        labels (`list[str]`): The label names; their order gives the ids.
        threshold (`float` or `dict[str, float]`, *optional*, defaults to 0.5):
            The lowest probability of a label in the answer; a dict has one for each label (0.5 for labels that it
            leaves out). [`tune_thresholds`] finds them on validation rows.
        pos_weight (`str` or `dict[str, float]`, *optional*):
            Factors of the loss of each label in rows that have it, as in `torch.nn.BCEWithLogitsLoss`. `None` for 1, a
            dict (1 for labels that it leaves out), or `"balanced"`: the number of training rows without the label,
            divided by the number with it. [`MMTrainer`] replaces `"balanced"` by these numbers before training. A label
            that all rows have, or none, gets 1. The loss is weighted in training and evaluation. Probabilities of rare
            labels rise, so `threshold` may need to rise as well.

    Example:

    ```python
    >>> MultiLabel("tags", labels=["indoors", "people", "animals"], threshold=0.4)
    ```
    """

    labels: list[str] = field(default_factory=list)
    threshold: float | dict[str, float] = field(default=0.5, kw_only=True)
    pos_weight: Optional[str | dict[str, float]] = field(default=None, kw_only=True)

    kind: ClassVar[str] = "multi_label"
    default_metrics: ClassVar[tuple[str, ...]] = ("f1", "f1_micro", "subset_accuracy")
    main_metric: ClassVar[Optional[str]] = "f1_micro"
    hub_task: ClassVar[str] = "text-classification"
    can_tune: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = check_labels(self.name, self.labels)
        self.threshold = check_thresholds(self.name, self.threshold, self.labels)
        self.pos_weight = check_weights(self, "pos_weight")

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> nn.Module:
        return PooledHead(hidden_size, len(self.labels), config.classifier_dropout)

    def linear_problem(self) -> BinaryProblem:
        return BinaryProblem(len(self.labels), label_weights=known_weights(self, "pos_weight"))

    @classmethod
    def read_text(cls, text: str, separator: str) -> Optional[list[Any]]:
        return split_labels(text, separator) if text.strip() else None

    def read_known_text(self, text: str, separator: str) -> Optional[list[Any]]:
        # A label may be called "(1)" or "a|b", which otherwise is a list.
        names = [name for name in (text, text.strip()) if name in self.labels]
        return names[:1] or self.read_text(text, separator)

    def encode_label(self, value: Any, text: str) -> Optional[list[int]]:
        if is_missing(value):
            return None
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, (list, tuple, set)):
            raise ValueError(
                f"task {self.name!r}: expected a list of labels ([] if none applies, None if it is not known), but "
                f"got {shorten_value(value)} of type {type(value).__name__}"
            )
        value = [as_scalar(item) for item in value]
        value = [item for item in value if not isinstance(item, numbers.Real) or item != PADDING]
        if value and all(isinstance(item, bool) for item in value) and len(value) == len(self.labels):
            return [i for i, holds in enumerate(value) if holds]
        ids = [label_id(self.name, self.labels, item) for item in value]
        has_twice, are_numbers = len(set(ids)) < len(ids), not any(isinstance(item, str) for item in value)
        # Of two labels, [0, 1] may be the ids of both, or say that the second holds; of one, [0] that it does not hold.
        is_unclear = has_twice or (len(value) == len(self.labels) <= 2 and set(value) <= {0, 1})
        are_flags = has_twice and len(value) == len(self.labels) and set(value) <= {"0", "1"}
        if (are_numbers and is_unclear) or are_flags:
            raise ValueError(
                f"task {self.name!r}: expected a list of the labels that hold, not a 0 or 1 for each label, but got "
                f"{shorten_value(value)}; give names, or True or False for each label"
            )
        return ids

    @property
    def unresolved(self) -> tuple[str, ...]:
        return ("pos_weight",) if self.pos_weight == BALANCED else ()

    def prepare_for(self, labels: Iterable[Any]) -> None:
        if self.unresolved:
            known = [set(label) for label in labels if label is not None]
            positive = Counter(label for row in known for label in row)
            counts = [positive[i] for i in range(len(self.labels))]
            ratios = [(len(known) - count) / count if 0 < count < len(known) else 1.0 for count in counts]
            self.pos_weight = dict(zip(self.labels, ratios, strict=True))

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        labels = torch.zeros(len(values), len(self.labels))
        for row, value in enumerate(values):
            if value is None:
                labels[row] = float("nan")
            else:
                labels[row, value] = 1.0
        return labels

    def label_shape(self, logits: torch.Tensor) -> tuple[int, ...]:
        return logits.shape

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = ~labels.isnan()
        targets = torch.where(known, labels, torch.zeros_like(labels)).float()
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), targets, reduction="none", pos_weight=weight_tensor(self, "pos_weight", logits.device)
        )
        losses = losses * known
        return (losses.sum(-1) / known.sum(-1).clamp(min=1)).sum(), self.num_labelled(labels)

    def decode(
        self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None, threshold: Optional[float] = None
    ) -> list[dict[str, Any]]:
        """For each row the labels with a probability of at least `threshold` (default: the task's), and all labels."""
        probabilities = self.probabilities(logits)
        chosen = self.chosen(probabilities) if threshold is None else probabilities >= threshold
        return [
            {
                "labels": [name for name, holds in zip(self.labels, row, strict=True) if holds],
                "scores": dict(zip(self.labels, scores, strict=True)),
            }
            for row, scores in zip(chosen.tolist(), probabilities.tolist(), strict=True)
        ]

    def chosen(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The labels of the answer, (..., num_labels) bool."""
        threshold = self.threshold
        if isinstance(threshold, dict):
            # Not in float32, in which a threshold could fall on a probability.
            of_labels = torch.tensor([threshold[label] for label in self.labels], dtype=torch.float64)
            return probabilities.double() >= of_labels.to(probabilities.device)
        return probabilities >= threshold

    def tune(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Sets a threshold for each label, with the highest F1 on these rows."""
        before = self.threshold
        found = {}
        for i, label in enumerate(self.labels):
            known = ~labels[:, i].isnan()
            probabilities = self.probabilities(logits)[known, i]
            otherwise = before[label] if isinstance(before, dict) else before
            found[label] = best_threshold(probabilities, labels[known, i] == 1, otherwise)
        self.threshold = found
        return dict(found)

    def show_answer(self, answer: dict[str, Any]) -> str:
        return ", ".join(answer["labels"]) or "none of the labels"

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid()

    def temper(self, logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
        """Each logit is divided by the temperature of its own label."""
        return logits.float() / temperatures

    def log_likelihood(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        signs = torch.where(labels == 1, 1.0, -1.0)
        of_labels = nn.functional.logsigmoid(signs * logits.float()).mean(-1)
        return torch.where(labels.isnan().any(-1), torch.nan, of_labels)

    def decode_calibrated(
        self, logits: torch.Tensor, calibrated: torch.Tensor, word_index: Optional[torch.Tensor] = None, **options: Any
    ) -> list[dict[str, Any]]:
        """The labels stay those of the thresholds of the task, which were chosen without a calibration."""
        answers = self.decode(calibrated, word_index, **options)
        if options.get("threshold") is None:
            for answer, own in zip(answers, self.decode(logits), strict=True):
                answer["labels"] = own["labels"]
        return answers

    def conformal_thresholds(
        self, logits: torch.Tensor, labels: torch.Tensor, levels: Sequence[float] = LEVELS
    ) -> tuple[list[float], int]:
        """The coverage is the mean share of the true labels in the set."""
        known = ~labels.isnan().any(-1)
        return risk_thresholds(1 - self.probabilities(logits[known]), labels[known] == 1, levels), int(known.sum())

    def add_region(self, answers: list[Any], logits: torch.Tensor, thresholds: Sequence[float]) -> None:
        """
        Adds the labels that cannot be excluded, `"set"`.

        `"abstain"` is true if these are all labels, but the answer has only some; and where no promise can be kept.
        """
        within = ~(1 - self.probabilities(logits) > torch.tensor(thresholds, device=logits.device)[:, None])
        for answer, row, threshold in zip(answers, within.tolist(), thresholds, strict=True):
            answer["set"] = [name for name, holds in zip(self.labels, row, strict=True) if holds]
            has_all = len(answer["labels"]) == len(self.labels)
            answer["abstain"] = all(row) and (not has_all or threshold == math.inf)

    def answer_confidences(self, logits: torch.Tensor, calibrated: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The probability that all labels are right, if they were independent."""
        chosen = self.chosen(self.probabilities(logits))
        probabilities = self.probabilities(logits if calibrated is None else calibrated)
        return torch.where(chosen, probabilities, 1 - probabilities).prod(-1)

    def outcomes(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Right if all labels are."""
        right = (self.chosen(self.probabilities(logits)) == (labels == 1)).all(-1).float()
        return "right", torch.where(labels.isnan().any(-1), torch.nan, right)

    def judge(self, logits: torch.Tensor, label: torch.Tensor) -> Judgement:
        """All labels must be right; the confidence is the product of their probabilities."""
        probabilities = self.probabilities(logits)
        chosen = self.chosen(probabilities)
        answer = [name for name, holds in zip(self.labels, chosen.tolist(), strict=True) if holds]
        sure = float(self.answer_confidences(logits))
        if label.isnan().any():
            return Judgement(answer, confidence=sure)
        truth = [name for name, holds in zip(self.labels, label.tolist(), strict=True) if holds == 1]
        return Judgement(answer, truth, answer == truth, sure)

    def judge_calibrated(self, logits: torch.Tensor, calibrated: torch.Tensor, label: torch.Tensor) -> Judgement:
        """The labels stay those of the thresholds of the task."""
        return self.judge(logits, label)._replace(confidence=float(self.answer_confidences(logits, calibrated)))

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """The score of one label; by default the most probable."""
        return label_scores(self, logits, answers)

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labelled = ~labels.isnan().any(-1)
        predictions = self.chosen(self.probabilities(logits[labelled]))
        return predictions.long(), labels[labelled].long()
