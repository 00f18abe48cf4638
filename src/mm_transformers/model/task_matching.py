"""Predicts whether a picture (or sound) belongs to a text."""

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .label_cells import as_scalar, is_missing, shorten_value
from .pairs import encode_pair, labels_of_pairs_left, pair_ids, read_truth_value
from .task_base import NO_CONTEXT, Judgement, LabelContext, PooledHead, Task, register_task
from .task_retrieval import check_modality


@register_task
@dataclass
class Matching(Task):
    """
    Predicts whether text and picture (or sound) belong together, from the fused tokens.

    The loss is binary cross-entropy. If labels are given, each matching pair is also judged in two mismatched forms.
    They are its text with the picture of another row, and its picture with the text of another row. These are drawn by
    similarity (ALBEF, https://arxiv.org/abs/2107.07651; see [`MMTransformerForMultiTask.judge_mismatched`]). The
    similarity is that of a [`Retrieval`] task, if the model has one.

    No column is needed: every row with a text and a picture is a matching pair. In a column, a cell is True, False, or
    `None` if it is not known. A pair from any row of the batch is never a mismatch. [`MMTrainer`] evaluates mismatched
    pairs of the whole evaluation set, drawn at random with a fixed seed. So metrics do not depend on batches and
    processes. In your own loops, mismatched pairs come from the batch.

    Logits (batch, 1), or with labels (batch, 3): the row itself, its text with another picture, its picture with
    another text. NaN if the batch holds no mismatch. Labels (batch, 4) int64: 1 or 0, and fingerprints; -100 where
    missing.

    Args:
        modality (`str`, *optional*, defaults to `"vision"`): The modality to compare with the text: `"vision"` or
            `"audio"`.

    Example:

    ```python
    >>> Matching("fits")  # every row with a text and a picture is a pair that matches
    ```
    """

    modality: str = "vision"

    kind: ClassVar[str] = "matching"
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    hub_task: ClassVar[str] = "sentence-similarity"
    default_cell: ClassVar[Any] = True
    compares_rows: ClassVar[bool] = True
    needs_mismatches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_modality(self)

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> nn.Module:
        if self.modality not in config.modalities:
            raise ValueError(
                f"Task {self.name!r} compares texts with {self.modality!r}, but the model has no such encoder; it has "
                f"{', '.join(['text', *config.modalities])}."
            )
        return PooledHead(hidden_size, 1, config.classifier_dropout)

    @classmethod
    def read_text(cls, text: str, separator: str) -> Any:
        return read_truth_value(text, text) if text.strip() else None

    def encode_label(self, value: Any, text: str) -> Optional[bool]:
        value = as_scalar(value)
        if is_missing(value):
            return None
        if not isinstance(value, numbers.Number) or value not in (True, False):
            raise ValueError(
                f"task {self.name!r}: expected True or False (None if it is not known), but got "
                f"{shorten_value(value)} of type {type(value).__name__}"
            )
        return bool(value)

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        ids = pair_ids([encode_pair(self.name, None if v is None else True) for v in values], context, self.modality)
        verdicts = torch.tensor([-100 if value is None else int(value) for value in values])
        return torch.cat([torch.where(ids[:, 0] == -100, -100, verdicts)[:, None], ids], 1)

    def num_labelled(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[:, 0] != -100).sum().float()

    def labels_left(self, labels: torch.Tensor, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        return labels_of_pairs_left(labels, kept, self.modality)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean over the forms of each row."""
        known = self._known(logits, labels)
        losses = nn.functional.binary_cross_entropy_with_logits(
            torch.where(known, logits, 0.0).float(), self._targets(logits, labels), reduction="none"
        )
        return (torch.where(known, losses, 0.0).sum(1) / known.sum(1).clamp(min=1)).sum(), self.num_labelled(labels)

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[dict[str, Any]]:
        return [{"match": score > 0.5, "score": score} for score in logits[:, 0].float().sigmoid().tolist()]

    def show_answer(self, answer: dict[str, Any]) -> str:
        score = answer["score"]  # the probability of a match
        return f"yes ({100 * score:.0f}%)" if answer["match"] else f"no ({100 * (1 - score):.0f}%)"

    def read_answer(self, text: str) -> Any:
        return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)

    def judge(self, logits: torch.Tensor, label: torch.Tensor) -> Judgement:
        """Judges the row itself; mismatched pairs belong to no row."""
        score = float(logits.flatten()[0].sigmoid())
        truth = None if label[0] == -100 else bool(label[0])
        is_right = None if truth is None else (score > 0.5) == truth
        return Judgement(score > 0.5, truth, is_right, max(score, 1 - score))

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        verdicts = [
            score > 0 if answer is None else answer
            for score, answer in zip(logits[:, 0].tolist(), answers, strict=True)
        ]
        if any(verdict not in (True, False) for verdict in verdicts):
            raise ValueError(f"Task {self.name!r}: an answer must be True or False, but is {verdicts!r}.")
        signs = torch.tensor([1.0 if verdict else -1.0 for verdict in verdicts], device=logits.device)
        return logits[:, 0] * signs, [bool(verdict) for verdict in verdicts]

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._known(logits, labels)
        return (logits > 0)[known].to(torch.int64), self._targets(logits, labels)[known].to(torch.int64)

    @staticmethod
    def _known(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Of mismatched pairs NaN says that there is none; of the row itself, that the model has diverged.
        is_judged = ~logits.isnan()
        is_judged[:, 0] = True
        return is_judged & (labels[:, :1] != -100)

    @staticmethod
    def _targets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad((labels[:, :1] == 1).float(), (0, logits.shape[1] - 1))
