"""Answers that a decoder-only language model writes: the model of the text, continued behind the fusion."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from .fusion_base import Stream
from .fusion_layers import kept_keys
from .generation import WritingTask, refuse_assistant, stated_length
from .padding import roll_rows


# The writer whose language model runs in this thread: hooks belong to the module, which several threads may share.
_running: ContextVar[Optional["LanguageModelWriter"]] = ContextVar("_running", default=None)


class LanguageModelWriter:
    """
    Continues the text of each row: the text is the prompt, the answer follows.

    The language model runs as it is, with its own head, cache and settings. A hook replaces its last hidden states by
    the fused ones. No text token reads a later one, so the answer can be written token by token.

    Args:
        model ([`MMTransformerModel`]): Its `text_model` is a decoder-only language model of transformers.

    Example:

    ```python
    >>> writer = LanguageModelWriter(model.model)
    >>> ids = writer.generate(model.tasks["caption"], model.model(**inputs), num_beams=4)
    ```
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text_model: PreTrainedModel = model.text_model
        self._streams: list[Stream] = []
        self._mask: Optional[torch.Tensor] = None
        self._num_rows = 0

    def start_ids(self, task: WritingTask) -> list[int]:
        """The ids between the text of a row and the answer; none by default."""
        return task.decoder_start_ids or []

    def logits(self, task: WritingTask, fused: Any, labels: Optional[torch.Tensor] = None) -> torch.Tensor:
        """
        The logits at each place of the labels, given the text and the labels before it (teacher forcing).

        Args:
            fused ([`MMTransformerModelOutput`]): The output for the rows.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Token ids, -100 at padding.

        Returns:
            (batch, length, vocabulary); with a length of 1 without labels.
        """
        ids, mask = self._prompts(task, fused)
        if labels is None:
            # The language model takes part in every backward pass, as heads do.
            labels = torch.full((ids.shape[0], 1), -100, device=ids.device)
        length, known = labels.shape[1], labels[:, :-1] != -100
        ids = torch.cat([ids, labels[:, :-1].masked_fill(~known, 0)], dim=1)
        mask = torch.cat([mask, known], dim=1)
        options: dict[str, Any] = {}
        takes = inspect.signature(type(self.text_model).forward).parameters
        if "position_ids" in takes:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = length
        with self._fusing(fused, mask):
            outputs = self.text_model(input_ids=ids, attention_mask=mask.to(torch.int64), use_cache=False, **options)
        logits = outputs.logits[:, -length:]
        # The vector of rows without a text is for heads; it takes part in every backward pass, too.
        null_text = getattr(self.model, "null_text", None)
        return logits if null_text is None else logits + 0.0 * null_text.weight.sum().to(logits.dtype)

    def generate(self, task: WritingTask, fused: Any, **options: Any) -> Any:
        """
        Writes one answer per row.

        Args:
            options: for [`~transformers.GenerationMixin.generate`]; by default the answer has at most
                `task.max_length` tokens.

        Returns:
            (batch, length) int64: the [`start_ids`] and the answer, without the text before them.

        Raises:
            ValueError: if `assistant_model` is given.
        """
        ids, mask = self._prompts(task, fused)
        start = self.start_ids(task)
        refuse_assistant(options)
        options = self._with_length(task, options)
        config, given = self.text_model.generation_config, options.get("generation_config")
        if config.pad_token_id is None and getattr(given, "pad_token_id", None) is None:
            options.setdefault("pad_token_id", self._end_id())
        with self._fusing(fused), kept_keys():
            written = self.text_model.generate(input_ids=ids, attention_mask=mask.to(torch.int64), **options)
        before = ids.shape[1] - len(start)
        if isinstance(written, torch.Tensor):
            return written[:, before:]
        written.sequences = written.sequences[:, before:]
        return written

    def _with_length(self, task: WritingTask, options: dict[str, Any]) -> dict[str, Any]:
        stated = stated_length(options)
        if stated == "max_new_tokens":
            return options
        most = task.max_length
        if stated == "max_length":
            # In transformers it includes the text; here, as with an encoder-decoder, the start ids and the answer.
            most = options.get(stated) or options["generation_config"].max_length
            most = max(1, most - len(self.start_ids(task)))
        return {**{name: value for name, value in options.items() if name != "max_length"}, "max_new_tokens": most}

    def _end_id(self) -> int:
        ends = self.text_model.generation_config.eos_token_id
        return (ends[0] if isinstance(ends, (list, tuple)) else ends) or 0

    def _prompts(self, task: WritingTask, fused: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and the mask (batch, length) of texts and start ids, with the padding on the left."""
        text = fused.encoded["text"]
        ids, mask = text.row_ids, text.mask
        if ids is None:
            raise ValueError(f"Task {task.name!r}: the language model continues the text, so it needs input_ids.")
        length = mask.shape[1]
        places = torch.arange(1, length + 1, device=mask.device)
        to_the_right = (mask * places).amax(1).clamp(min=1) - length
        ids, mask = roll_rows(ids, to_the_right), roll_rows(mask, to_the_right)
        start = torch.tensor(self.start_ids(task), dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        return torch.cat([ids, start], 1), torch.cat([mask, torch.ones_like(start, dtype=torch.bool)], 1)

    @contextmanager
    def _fusing(self, fused: Any, mask: Optional[torch.Tensor] = None) -> Iterator[None]:
        """
        Within the block the head of the language model reads fused states.

        Args:
            mask (batch, length) bool: of the ids that the language model gets; all are tokens by default.
        """
        self._streams = [stream for name, stream in fused.encoded.items() if name != "text"]
        self._mask, self._num_rows = mask, len(fused.last_hidden_state)
        hook = self.text_model.base_model.register_forward_hook(self._replace_states)
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            hook.remove()

    def _replace_states(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if _running.get() is not self or self.model.fusion is None or not self._streams:
            return None
        states = output[0]
        copies = states.shape[0] // self._num_rows
        if copies > 1:
            # Beams, and several answers to a row, stand side by side.
            rows = torch.arange(self._num_rows, device=states.device).repeat_interleave(copies)
            self._streams, self._num_rows = [stream.of_rows(rows) for stream in self._streams], states.shape[0]
        mask = self._mask if self._mask is not None else states.new_ones(states.shape[:2], dtype=torch.bool)
        fused = self.model.fusion(states, mask, self._streams).hidden_states
        if isinstance(output, tuple):
            return (fused, *output[1:])
        output.last_hidden_state = fused
        return output
