"""A number for the whole row."""

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn

from .label_cells import NUMBER, as_scalar, is_null, shorten_value
from .linear_problem import RidgeProblem
from .task_base import NO_CONTEXT, Judgement, LabelContext, PooledHead, Task, register_task


@register_task
@dataclass
class Regression(Task):
    """
    Predicts one number per row: polarity, similarity, a rating, ... The loss is the squared error.

    Logits (batch,); labels (batch,) float32, NaN where missing. A cell is a number. Rescale targets far from the range
    of about -5 to 5 beforehand: the loss is in their unit squared.

    Example:

    ```python
    >>> Regression("rating", column="stars")
    ```
    """

    kind: ClassVar[str] = "regression"
    likelihood_scale: ClassVar[float] = 0.5
    default_metrics: ClassVar[tuple[str, ...]] = ("mae", "mse", "pearson")
    main_metric: ClassVar[Optional[str]] = "pearson"
    hub_task: ClassVar[str] = "text-classification"

    def build_head(self, config, hidden_size: int) -> nn.Module:
        return RegressionHead(hidden_size, 1, config.classifier_dropout)

    def linear_problem(self) -> RidgeProblem:
        return RidgeProblem(1)

    @classmethod
    def read_text(cls, text: str, separator: str) -> Any:
        number = text.strip()
        return float(number) if NUMBER.fullmatch(number) else (text if number else None)

    def encode_label(self, value: Any, text: str) -> Optional[float]:
        if is_null(value):
            return None
        value = as_scalar(value)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or abs(value) > torch.finfo(torch.float32).max:
            raise ValueError(
                f"task {self.name!r}: expected a finite number (of float32; None if it is missing), but got "
                f"{shorten_value(value)} of type {type(value).__name__}"
            )
        return float(value)

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)

    def label_shape(self, logits: torch.Tensor) -> tuple[int, ...]:
        return logits.shape

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = ~labels.isnan()
        # `where` and not a product: NaN * 0 is NaN, in the backward pass too.
        difference = torch.where(known, logits.float() - labels.float(), torch.zeros_like(logits, dtype=torch.float32))
        return difference.square().sum(), self.num_labelled(labels)

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[dict[str, Any]]:
        return [{"value": value} for value in logits.float().tolist()]

    def judge(self, logits: torch.Tensor, label: torch.Tensor) -> Judgement:
        return Judgement(float(logits), None if label.isnan() else float(label))

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """The score is the number itself."""
        if any(answer is not None for answer in answers):
            raise ValueError(
                f"Task {self.name!r} answers with a number, so there is no other answer to explain: leave out `answer`."
            )
        return logits, logits.float().tolist()

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = ~labels.isnan()
        return logits[known].float(), labels[known].float()


class RegressionHead(PooledHead):
    def forward(self, outputs: Any) -> torch.Tensor:
        return super().forward(outputs).squeeze(-1)
