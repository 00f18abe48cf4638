"""Written answers: translation, captions, answers in words."""

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .label_cells import as_scalar, is_null, shorten_value
from .task_base import NO_CONTEXT, LabelContext, Task, register_task
from .text_tokens import continuing_ids, end_id, needed_text, tokenize


logger = logging.get_logger(__name__)


@register_task
@dataclass
class Generation(Task):
    """
    Writes a text: translation, captioning, answers in words, turns of a dialogue, ...

    The loss is cross-entropy, averaged over the tokens of the labelled rows.

    A decoder reads the fused text tokens. It is that of the text encoder, if this is an encoder-decoder (Marian, BART,
    T5, NLLB, ...). A decoder-only language model (Llama, Qwen, GPT-2, ...) continues the text itself. The text of a row
    is the prompt, and the answer follows after a space. There is none after white space or a special token, or in
    scripts without spaces. Otherwise the decoder is built from `config.decoder_config`. Several tasks share it, and
    `decoder_start_ids` tells them apart. [`MMTransformerForMultiTask.generate`] writes the answers.

    Logits (batch, target_len, vocab_size), only if labels are given. Labels (batch, target_len) int64: the token ids up
    to the end of the text, then -100; -100 in rows without a label. A cell is a string.

    Args:
        max_length (`int`, *optional*, defaults to 64): Longest answer in tokens; longer labels are cut.
        decoder_start_ids (`list[int]`, *optional*):
            The ids with which the decoder starts; they are not predicted. A language code (mBART, M2M100, NLLB: the
            start token and the code) or the tokens of a prompt. Defaults to the `decoder_start_token_id` of the
            pretrained model, and its `forced_bos_token_id` if it has one. For a language model, they stand between the
            text and the answer; none by default.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the probability that is spread over the vocabulary (https://arxiv.org/abs/1512.00567).

    Example:

    ```python
    >>> Generation("german", max_length=32)
    ```
    """

    max_length: int = 64
    decoder_start_ids: Optional[list[int]] = None
    label_smoothing: float = 0.0

    kind: ClassVar[str] = "generation"
    default_metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf", "exact_match")
    hub_task: ClassVar[str] = "translation"
    needs_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"Task {self.name!r}: max_length must be an integer >= 1, but is {self.max_length!r}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"Task {self.name!r}: label_smoothing must be at least 0 and less than 1, but is "
                f"{self.label_smoothing!r}."
            )
        ids = self.decoder_start_ids
        if ids is not None and (not ids or not all(isinstance(i, int) and i >= 0 for i in ids)):
            raise ValueError(f"Task {self.name!r}: decoder_start_ids must be a list of token ids, but is {ids!r}.")

    def build_head(self, config: PreTrainedConfig, hidden_size: int) -> Optional[nn.Module]:
        return None

    @classmethod
    def read_text(cls, text: str, separator: str) -> str:
        return text  # a written text may be blank

    def encode_label(self, value: Any, text: str) -> Optional[str]:
        if is_null(value):
            return None
        value = as_scalar(value)
        if isinstance(value, bool):
            return str(value).lower()  # the form in tables
        if isinstance(value, numbers.Real):
            return str(value)
        if not isinstance(value, str):
            raise ValueError(
                f"task {self.name!r}: expected a text (None if it is missing), but got "
                f"{shorten_value(value)} of type {type(value).__name__}"
            )
        return value

    def collate_labels(self, values: list[Any], context: LabelContext = NO_CONTEXT) -> torch.Tensor:
        if context.tokenizer is None:
            raise ValueError(f"Task {self.name!r} writes text, so `collate_labels` needs the tokenizer.")
        prompts = [None] * len(values) if context.prompts is None else context.prompts
        labelled = [pair for pair in zip(values, prompts, strict=True) if pair[0] is not None]
        known = iter(self._target_ids(labelled, context.tokenizer))
        rows = [[] if value is None else next(known) for value in values]
        labels = torch.full((len(rows), max([len(row) for row in rows] + [1])), -100)
        for row, ids in zip(labels, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return labels

    def _target_ids(self, labelled: list[tuple[str, Optional[str]]], tokenizer: Any) -> list[list[int]]:
        """
        The target of the decoder: each text and its end token.

        Other special tokens of the tokenizer (a language code, [CLS]) belong to the start of the decoder.

        Args:
            labelled: each text, and the prompt that it continues; `None` if a decoder writes it.
        """
        end = end_id(tokenizer)
        if end is None:
            raise ValueError(f"task {self.name!r}: the tokenizer has no eos_token, which ends a text: set it")
        if not labelled:
            return []
        texts, prompts = zip(*labelled, strict=True)
        # M2M100's tokenizer has a mode for targets. It needs a language, which is not used without special tokens.
        needs_language = hasattr(tokenizer, "tgt_lang") and tokenizer.tgt_lang is None
        key = "text" if needs_language else "text_target"
        needed = [needed_text(tokenizer, text, self.max_length, key) for text in texts]
        if prompts[0] is None:
            encoded = tokenize(tokenizer, **{key: needed}, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            start = tokenizer.decode(self.decoder_start_ids) if self.decoder_start_ids else ""
            encoded = continuing_ids(tokenizer, needed, [start or prompt for prompt in prompts])
        longest = max(map(len, encoded))
        if longest >= self.max_length:
            logger.warning_once(
                f"Task {self.name!r}: a text of {'more than ' * (needed != texts)}{longest + 1} tokens (with the end "
                f"token) is longer than max_length={self.max_length}. The loss uses only its beginning; metrics use "
                "the whole text."
            )
        return [[*ids[: self.max_length - 1], end] for ids in encoded]

    def encode_references(self, values: list[Any]) -> torch.Tensor:
        """
        The bytes of the texts in UTF-8, since a tokenizer may not be able to write all of them.

        At most 64 bytes for each allowed token, since all rows of an evaluation are padded to the longest.
        """
        most = 64 * self.max_length
        texts = [None if value is None else list(value[:most].encode()[:most]) for value in values]
        rows = [torch.tensor([-100] if text is None else text, dtype=torch.int32) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def decode_references(self, references: Any) -> list[str]:
        rows = torch.as_tensor(references)
        return [row[row >= 0].to(torch.uint8).cpu().numpy().tobytes().decode(errors="ignore") for row in rows]

    def answer_scores(
        self, logits: torch.Tensor, answers: list[Any], places: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, list[Any]]:
        """The sum over the tokens of their logits; answers are lists of ids, and are required."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in answers], True, -100).to(logits.device)
        known = ids != -100
        if places is not None:
            known = known & places
        scores = logits[:, : ids.shape[1]].gather(-1, ids.clamp(min=0)[..., None])[..., 0]
        return (scores * known).sum(-1), answers

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=self.label_smoothing
        )
        return total, self.num_labelled(labels)
