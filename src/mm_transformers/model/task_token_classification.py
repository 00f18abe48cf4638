"""One label out of several, for each word of the text."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .class_weights import BALANCED, balanced_weights, check_weights, known_weights, weight_tensor
from .label_cells import check_labels, is_missing, label_id, shorten_value
from .label_lists import split_labels
from .linear_problem import MultinomialProblem
from .task_base import NO_CONTEXT, LabelContext, Task, register_task
from .task_classification import check_label_smoothing, cross_entropy_sum


logger = logging.get_logger(__name__)


def split_words(text: str) -> list[tuple[int, int]]:
    """Start and end of the words of a text, separated by white space."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def index_words(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """
    The number of the word that starts at each token.

    It is -1 at tokens that start no word (later pieces of a word, special tokens, padding).

    Args:
        text: the tokenized text.
        offsets: start and end of each token in the text, from a fast tokenizer; (0, 0) for special tokens.
    """
    words, index, word = split_words(text), [], 0
    for start, end in offsets:
        # Byte-level tokens begin with the space before their word, so the first overlap counts.
        while word < len(words) and words[word][1] <= start:
            word += 1
        if word < len(words) and start < end and end > words[word][0]:
            index.append(word)
            word += 1
        else:
            index.append(-1)
    return index


@register_task
@dataclass
class TokenClassification(Task):
    """
    Chooses one of `labels` for each word: named entities, parts of speech, words that the picture shows, ...

    The loss is cross-entropy, averaged over the labelled words.

    Logits (batch, text_len, num_labels); labels (batch, text_len) int64, at the first token of each labelled word, -100
    elsewhere. A cell is a list with a label name, an id or `None` for each word; words are separated by white space. In
    a text, labels stand in a list (`["O", "NAME"]`) or between white space. Needs a fast tokenizer.

    Args:
        labels (`list[str]`): The label names; their order gives the ids.
        class_weights, label_smoothing: See [`Classification`]; words are counted, not rows.

    Example:

    ```python
    >>> TokenClassification("entities", labels=["O", "PERSON", "PLACE"])
    ```
    """

    labels: list[str] = field(default_factory=list)
    class_weights: Optional[str | dict[str, float]] = field(default=None, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)

    kind: ClassVar[str] = "token_classification"
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "f1_micro")
    hub_task: ClassVar[str] = "token-classification"
    is_token_level: ClassVar[bool] = True
    answer_keys: ClassVar[tuple[str, ...]] = ("label", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = check_labels(self.name, self.labels)
        if len(self.labels) < 2:
            raise ValueError(f"Task {self.name!r}: it needs at least two labels, but got {self.labels}.")
        self.class_weights = check_weights(self, "class_weights")
        self.label_smoothing = check_label_smoothing(self)

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> nn.Module:
        return TokenHead(hidden_size, len(self.labels), config.classifier_dropout)

    def linear_problem(self) -> MultinomialProblem:
        weights = known_weights(self, "class_weights")
        return MultinomialProblem(len(self.labels), per_token=True, label_weights=weights)

    @classmethod
    def read_text(cls, text: str, separator: str) -> Optional[list[Any]]:
        return split_labels(text, None) if text.strip() else None

    def read_known_text(self, text: str, separator: str) -> Optional[list[Any]]:
        # A label may be called "(1)", which otherwise is a list.
        words = text.split()
        return words if words and set(words) <= set(self.labels) else self.read_text(text, separator)

    def encode_label(self, value: Any, text: str) -> Optional[list[int]]:
        if is_missing(value):
            return None
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            raise ValueError(
                f"task {self.name!r}: expected a list with one label per word, but got {shorten_value(value)} of type "
                f"{type(value).__name__}"
            )
        num_words = sum(1 for _ in re.finditer(r"\S+", text))  # without a list of their places
        if len(value) != num_words:
            raise ValueError(f"task {self.name!r}: got {len(value)} labels for a text of {num_words} words")
        return [-100 if is_missing(item) else label_id(self.name, self.labels, item) for item in value]

    @property
    def unresolved(self) -> tuple[str, ...]:
        return ("class_weights",) if self.class_weights == BALANCED else ()

    def prepare_for(self, labels: Iterable[Any]) -> None:
        if self.unresolved:
            counts = Counter(label for row in labels for label in row or [])
            self.class_weights = balanced_weights(self.labels, [counts[i] for i in range(len(self.labels))])

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        word_index = context.word_index
        if word_index is None:
            raise ValueError(f"Task {self.name!r} labels words, so `collate_labels` needs `word_index`.")
        labels = torch.full_like(word_index, -100)
        for row, value in enumerate(values):
            if value is not None:
                starts = word_index[row] >= 0
                words = torch.tensor(value, dtype=torch.int64)
                labels[row, starts] = words[word_index[row, starts]]
                if (words != -100).sum() > (labels[row] != -100).sum():
                    logger.warning_once(
                        f"Task {self.name!r}: some words with labels have no token, since the text is longer than "
                        "max_length or the tokenizer drops their characters. Loss and metrics ignore them."
                    )
        return labels

    def label_shape(self, logits: torch.Tensor) -> tuple[int, ...]:
        return logits.shape[:-1]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight_tensor(self, "class_weights", logits.device)
        return cross_entropy_sum(logits, labels, weight, self.label_smoothing), self.num_labelled(labels)

    def decode(self, logits: torch.Tensor, word_index: Optional[torch.Tensor] = None) -> list[list[dict[str, Any]]]:
        """
        The label and the score of each word, or of each token if `word_index` is not given: one list per row.

        A word without a token has the label `None` and the score 0.0, so that answers stay aligned with the words. An
        example is a word of characters that the tokenizer drops. Words beyond `max_length` are left out.
        """
        scores, ids = logits.float().softmax(-1).max(-1)
        if word_index is None:
            word_index = torch.arange(ids.shape[1]).expand_as(ids)
        answers = []
        for row, score, words in zip(ids.tolist(), scores.tolist(), word_index.tolist(), strict=True):
            chosen: list[dict[str, Any]] = [{"label": None, "score": 0.0} for _ in range(max(words, default=-1) + 1)]
            for i, p, word in zip(row, score, words, strict=True):
                if word >= 0:
                    chosen[word] = {"label": self.labels[i], "score": p}
            answers.append(chosen)
        return answers

    def show_answer(self, answer: Any) -> str:
        return ", ".join(word["label"] or "–" for word in answer) or "nothing"

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().softmax(-1)

    def add_probabilities(
        self, answers: list[Any], logits: torch.Tensor, word_index: Optional[torch.Tensor] = None
    ) -> None:
        """Each word gets those of its first token; a word without a token has none."""
        if word_index is None:
            word_index = torch.arange(logits.shape[1]).expand(logits.shape[:2])
        for answer, row, words in zip(answers, self.probabilities(logits).tolist(), word_index.tolist(), strict=True):
            for token, word in zip(row, words, strict=True):
                if word >= 0:
                    answer[word]["probabilities"] = dict(zip(self.labels, token, strict=True))

    def complete_answer(self, answer: Any, text: str) -> Any:
        missing = len(split_words(text)) - len(answer)
        return answer + [{"label": None, "score": 0.0}] * missing

    def answer_with_words(self, answer: Any, text: str) -> Any:
        """Each word with its answer and its place in the text; words without a token have no answer."""
        return [
            {"word": text[start:end], **of_word, "start": start, "end": end}
            for (start, end), of_word in zip(split_words(text), answer, strict=False)
            if of_word.get("label", text) is not None
        ]

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """
        The sum over the tokens of the logit of a label.

        `answers` gives one label for all tokens, or a list with one for each. The default is the label with the highest
        logit.
        """
        tokens = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if places is None else places
        ids = logits.argmax(-1)
        for row, answer in enumerate(answers):
            if isinstance(answer, (list, tuple)):
                if len(answer) != int(tokens[row].sum()):
                    raise ValueError(
                        f"Task {self.name!r}: the answer has {len(answer)} labels for {int(tokens[row].sum())} words; "
                        "give one label for all, or one for each."
                    )
                found = [label_id(self.name, self.labels, label) for label in answer]
                ids[row, tokens[row]] = torch.tensor(found, dtype=torch.int64, device=ids.device)
            elif answer is not None:
                ids[row] = label_id(self.name, self.labels, answer)
        scores = (logits.gather(-1, ids[..., None])[..., 0] * tokens).sum(-1)
        chosen = [[self.labels[i] for i in row[shown].tolist()] for row, shown in zip(ids, tokens, strict=True)]
        return scores, [labels[0] if len(labels) == 1 else labels for labels in chosen]

    def predictions_and_references(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labelled = labels != -100
        return logits.argmax(-1)[labelled], labels[labelled]


class TokenHead(nn.Module):
    """Dropout and a projection of each token: (batch, text_len, hidden_size) -> (batch, text_len, num_outputs)."""

    def __init__(self, hidden_size: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, num_outputs)

    def forward(self, outputs: Any) -> torch.Tensor:
        return self.out_proj(self.dropout(outputs.last_hidden_state))
