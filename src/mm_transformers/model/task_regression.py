"""A number for the whole row."""

import math
import numbers
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn

from .conformal import LEVELS, quantile_thresholds
from .label_cells import NO_NUMBER, NUMBER, as_scalar, is_finite_number, is_null, shorten, shorten_value
from .linear_problem import RidgeProblem
from .table import FURTHEST
from .task_base import NO_CONTEXT, Judgement, LabelContext, PooledHead, Task, register_task


# The standard deviation of normally distributed numbers whose median distance from their median is 1.
NORMAL_SPREAD = 1.4826


@register_task
@dataclass
class Regression(Task):
    """
    Predicts one number per row: polarity, similarity, a rating, ... The loss is the squared error, divided by the
    square of `scale`.

    Logits (batch,); labels (batch,) float32, NaN where missing. A cell is a number; texts such as "n/a" are missing.

    Args:
        scale (`float`, *optional*, defaults to 1.0):
            A typical difference between two numbers, such as the standard deviation of the training rows. Without it,
            a task of prices has a loss, and so a weight, that is millions of times that of other tasks.

    Raises:
        ValueError: if `scale` is no number above 0.

    Example:

    ```python
    >>> Regression("rating", column="stars")
    >>> Regression("price", scale=250.0)  # most prices are within some hundreds of each other
    ```
    """

    scale: float = 1.0

    kind: ClassVar[str] = "regression"
    likelihood_scale: ClassVar[float] = 0.5
    default_metrics: ClassVar[tuple[str, ...]] = ("mae", "mse", "pearson")
    main_metric: ClassVar[Optional[str]] = "pearson"
    hub_task: ClassVar[str] = "text-classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_finite_number(self.scale) or self.scale <= 0:
            raise ValueError(f"Task {self.name!r}: scale must be a number above 0, but is {shorten_value(self.scale)}.")
        self.scale = float(self.scale)

    def build_head(self, config: Any, hidden_size: int) -> nn.Module:
        return RegressionHead(hidden_size, 1, config.classifier_dropout, self.scale)

    @property
    def logit_unit(self) -> float:
        """Logits are numbers in the unit of the labels."""
        return max(1.0, self.scale)

    def linear_problem(self) -> RidgeProblem:
        return RidgeProblem(1)

    @classmethod
    def read_text(cls, text: str, separator: str) -> Any:
        number = text.strip()
        if number.lower() in NO_NUMBER:
            return None
        return float(number) if NUMBER.fullmatch(number) else (text if number else None)

    @classmethod
    def options_for(cls, cells: Iterable[Any]) -> dict[str, Any]:
        """The scale: the standard deviation."""
        values = [float(cell) for cell in map(as_scalar, cells) if is_finite_number(cell)]
        found = statistics.pstdev(values) if len(values) > 1 else 0.0
        return {"scale": float(f"{found:.3g}")} if found > 0 and math.isfinite(found) else {}

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

    def warning_about(self, labels: Sequence[Any]) -> Optional[str]:
        """Numbers far from the median, in robust standard deviations: those of the median distance that is not 0."""
        values = [value for value in labels if value is not None]
        if len(values) < 3:
            return None
        median = statistics.median(values)
        distances = [abs(value - median) for value in values]
        # With half of the numbers equal, the median distance is 0.
        spread = statistics.median(distances) or statistics.median([x for x in distances if x > 0] or [math.inf])
        furthest = FURTHEST * NORMAL_SPREAD * spread
        far = [row for row, value in enumerate(labels) if value is not None and abs(value - median) > furthest]
        if not far:
            return None
        row = max(far, key=lambda row: abs(labels[row] - median))
        others = f" ({len(far):,} rows have such numbers)" if len(far) > 1 else ""
        return (
            f"Task {self.name!r}: column {shorten(str(self.column))!r} has {labels[row]:.6g} in row {row:,} of the "
            f"training table, more than {FURTHEST:.0f} robust standard deviations from the median, {median:.6g}"
            f"{others}. Such numbers decide the loss: correct them, leave out their rows, or predict the logarithm."
        )

    def label_shape(self, logits: torch.Tensor) -> tuple[int, ...]:
        return logits.shape

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = ~labels.isnan()
        # `where` and not a product: NaN * 0 is NaN, in the backward pass too.
        difference = torch.where(known, logits.float() - labels.float(), torch.zeros_like(logits, dtype=torch.float32))
        return (difference / self.scale).square().sum(), self.num_labelled(labels)

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[dict[str, Any]]:
        return [{"value": value} for value in logits.float().tolist()]

    def conformal_thresholds(
        self, logits: torch.Tensor, labels: torch.Tensor, levels: Sequence[float] = LEVELS
    ) -> tuple[list[float], int]:
        """The score is the absolute error, so the threshold is half of the length of the interval."""
        known = ~labels.isnan()
        return quantile_thresholds((logits[known].double() - labels[known].double()).abs(), levels), int(known.sum())

    def add_region(self, answers: list[Any], logits: torch.Tensor, thresholds: Sequence[float]) -> None:
        """Adds the lowest and the highest number, `"interval"`: `None` if there is none, and then `"abstain"`."""
        for answer, radius in zip(answers, thresholds, strict=True):
            known = math.isfinite(radius) and math.isfinite(answer["value"])
            answer["interval"] = [answer["value"] - radius, answer["value"] + radius] if known else None
            answer["abstain"] = not known

    def outcomes(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The absolute error."""
        return "error", (logits.float() - labels.float()).abs()

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
    def __init__(self, hidden_size: int, num_outputs: int, dropout: float, scale: float = 1.0) -> None:
        super().__init__(hidden_size, num_outputs, dropout)
        self.scale = scale

    def forward(self, outputs: Any) -> torch.Tensor:
        # In the unit of the labels; so a step of the optimiser changes any number by its share of the scale.
        return super().forward(outputs).squeeze(-1) * self.scale
