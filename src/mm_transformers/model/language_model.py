"""Answers that a decoder-only language model writes: it continues the text of each row, behind the fusion."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from .decoders import language_model_class
from .encoder_classes import arguments_of
from .encoders import max_text_positions
from .fusion_base import Stream
from .fusion_layers import kept_keys
from .generation import WritingTask, answer_ids, refuse_assistant, stated_length, writing_tasks
from .padding import roll_rows
from .task_base import Task


# A hook belongs to a module, which several threads may run at once; each has its own fusion.
_running: ContextVar[Optional["_FusedStates"]] = ContextVar("_running", default=None)


class LanguageModelWriter:
    """
    Continues the text of each row by the language model that is the text encoder: the text is the prompt.

    The language model of transformers runs as it is, with its own head, cache and settings. A hook replaces its last
    hidden states by the fused ones. No fused state depends on a later token, so answers are written token by token.

    Args:
        model ([`MMTransformerModel`]): Its `text_model` is a decoder-only language model.

    Example:

    ```python
    >>> writer = LanguageModelWriter(model.model)
    >>> ids = writer.generate(model.tasks["caption"], model.model(**inputs), num_beams=4)
    ```
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text_model: PreTrainedModel = model.text_model

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

        Raises:
            ValueError: if text and answer are too long for the language model, or the ids of the texts are unknown.
        """
        text = fused.encoded["text"]
        ids, mask = self._prompts(task, text.row_ids, text.mask)
        return self._logits(task, _FusedStates.of(self.model, fused), ids, mask, labels)

    def read(
        self,
        task: WritingTask,
        labels: Optional[torch.Tensor],
        encode: Callable[[torch.Tensor], Any],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        """
        [`logits`], and the output for the rows, from one pass of the language model over texts and answers.

        Args:
            labels: as [`logits`] takes them.
            encode: from the states of the texts, (batch, text_len, width), to the [`MMTransformerModelOutput`].
            input_ids, attention_mask: of the texts.
        """
        given = attention_mask.bool()
        first = torch.arange(given.shape[1], device=given.device) == 0
        shown = given | (~given.any(-1, keepdim=True) & first)
        ids, mask = self._prompts(task, self.model.prompt_ids(input_ids, attention_mask), shown)
        to_the_left = -_places_to_the_right(shown)

        def encode_prompts(states: torch.Tensor) -> Any:
            return encode(roll_rows(states[:, : given.shape[1]], to_the_left))

        reading = _FusedStates(self.model, len(ids), encode=encode_prompts)
        return self._logits(task, reading, ids, mask, labels), reading.fused

    def _logits(
        self,
        task: WritingTask,
        reading: "_FusedStates",
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: Optional[torch.Tensor],
    ) -> torch.Tensor:
        if labels is None:
            # The language model takes part in every backward pass, as heads do.
            labels = torch.full((len(ids), 1), -100, device=ids.device)
        length, known = labels.shape[1], labels[:, :-1] != -100
        reading.mask = mask = torch.cat([mask, known], dim=1)
        self._check_length(task, mask)
        options: dict[str, Any] = {}
        takes = arguments_of(language_model_class(self.model.config.text_config))
        if "position_ids" in takes:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = length
        with reading.shown_to(self.text_model):
            outputs = self.text_model(
                input_ids=torch.cat([ids, labels[:, :-1].masked_fill(~known, 0)], dim=1),
                attention_mask=mask.to(torch.int64),
                use_cache=False,
                **options,
            )
        logits = outputs.logits[:, -length:]
        # Heads read the vector of rows without a text; it takes part in every backward pass, too.
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
            ValueError: if `assistant_model` is given, or as [`logits`].
        """
        refuse_assistant(options)
        options = self._with_length(task, options)
        text = fused.encoded["text"]
        ids, mask = self._prompts(task, text.row_ids, text.mask)
        self._check_length(task, mask, options.get("max_new_tokens") or 1)
        config, given = self.text_model.generation_config, options.get("generation_config")
        if config.pad_token_id is None and getattr(given, "pad_token_id", None) is None:
            options.setdefault("pad_token_id", self._end_id())
        with _FusedStates.of(self.model, fused).shown_to(self.text_model), kept_keys():
            written = self.text_model.generate(input_ids=ids, attention_mask=mask.to(torch.int64), **options)
        before = ids.shape[1] - len(self.start_ids(task))
        if isinstance(written, torch.Tensor):
            return written[:, before:]
        written.sequences = written.sequences[:, before:]
        return written

    def without_start(self, task: WritingTask, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
        """
        The generated ids, (batch, length) int64, without the [`start_ids`].

        Raises:
            ValueError: if there is not exactly one answer per row.
        """
        return answer_ids(task, ids, num_rows, len(self.start_ids(task)))

    def _with_length(self, task: WritingTask, options: dict[str, Any]) -> dict[str, Any]:
        stated, most = stated_length(options), task.max_length
        if stated == "max_new_tokens":
            return options
        if stated == "max_length":
            # In transformers it includes the text; here, as with an encoder-decoder, the start ids and the answer.
            most = options.get(stated) or options["generation_config"].max_length
            most = max(1, most - len(self.start_ids(task)))
        return {**{name: value for name, value in options.items() if name != "max_length"}, "max_new_tokens": most}

    def _check_length(self, task: WritingTask, mask: torch.Tensor, num_new: int = 1) -> None:
        """
        Raises:
            ValueError: if the language model has too few positions for texts and answers.
        """
        positions = max_text_positions(self.model.config.text_config)
        # The last token that is written is never read again. The width comes first, since counting waits for a GPU.
        if positions is None or torch.compiler.is_compiling() or mask.shape[1] + num_new - 1 <= positions:
            return
        longest = int(mask.sum(1).max()) + num_new - 1
        if longest > positions:
            raise ValueError(
                f"Task {task.name!r}: text and answer have up to {longest} tokens, but the language model has "
                f"{positions} positions: shorten the text by processor(..., max_length=...), or max_length of the task."
            )

    def _end_id(self) -> int:
        ends = self.text_model.generation_config.eos_token_id
        return (ends[0] if isinstance(ends, (list, tuple)) else ends) or 0

    def _prompts(
        self, task: WritingTask, ids: Optional[torch.Tensor], mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and the mask (batch, length) of texts and start ids, with the padding on the left."""
        if ids is None:
            raise ValueError(
                f"Task {task.name!r}: the language model continues the texts, so give them as input_ids, also beside "
                "text_features."
            )
        to_the_right = _places_to_the_right(mask)
        ids, mask = roll_rows(ids, to_the_right), roll_rows(mask, to_the_right)
        start = torch.tensor(self.start_ids(task), dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        return torch.cat([ids, start], 1), torch.cat([mask, torch.ones_like(start, dtype=torch.bool)], 1)


class _FusedStates:
    """
    Replaces the last hidden states of a language model by fused ones.

    Args:
        model: the [`MMTransformerModel`].
        num_rows: the number of rows.
        streams: the other modalities of the rows.
        encode: instead of `streams`: from all states to the [`MMTransformerModelOutput`] that has them.
    """

    def __init__(
        self,
        model: Any,
        num_rows: int,
        streams: Optional[list[Stream]] = None,
        encode: Optional[Callable[[torch.Tensor], Any]] = None,
    ) -> None:
        self.model, self.num_rows, self.streams, self.encode = model, num_rows, streams, encode
        self.mask: Optional[torch.Tensor] = None  # of the tokens; all by default
        self._is_inside = False  # whether the language model without head is running
        self.fused: Any = None

    @classmethod
    def of(cls, model: Any, fused: Any) -> "_FusedStates":
        return cls(model, len(fused.encoded["text"].mask), _others(fused))

    @contextmanager
    def shown_to(self, text_model: PreTrainedModel) -> Iterator[None]:
        """Within the block the head of the language model reads the fused states."""
        base = text_model.base_model
        hooks = [base.register_forward_pre_hook(self._enter), base.register_forward_hook(self._leave)]
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
        if decoder is not base:
            # The head of OPT calls the decoder inside.
            hooks.append(decoder.register_forward_hook(self._replace))
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if _running.get() is self:
            self._is_inside = True

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if _running.get() is not self:
            return None
        self._is_inside = False
        return self._replace(module, inputs, output)

    def _replace(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if _running.get() is not self or self._is_inside:
            return None
        states = output[0]
        if self.encode is not None:
            self.fused = self.encode(states)
            self.streams = _others(self.fused)
        if not self.streams:
            return None
        copies = states.shape[0] // self.num_rows
        if copies > 1:
            # Beams of a row, and several answers to it, stand side by side.
            rows = torch.arange(self.num_rows, device=states.device).repeat_interleave(copies)
            self.streams, self.num_rows = [stream.of_rows(rows) for stream in self.streams], states.shape[0]
        mask = states.new_ones(states.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        fused = self.model.fusion(states, mask, self.streams).hidden_states
        if isinstance(output, tuple):
            return (fused, *output[1:])
        output.last_hidden_state = fused
        return output


def _others(fused: Any) -> list[Stream]:
    return [stream for name, stream in fused.encoded.items() if name != "text"]


def _places_to_the_right(mask: torch.Tensor) -> torch.Tensor:
    """By how many places to roll each row to the left (below 0: to the right) until its last token is at the end."""
    length = mask.shape[1]
    places = torch.arange(1, length + 1, device=mask.device)
    return (mask * places).amax(1).clamp(min=1) - length


def longest_answer(tasks: dict[str, Task]) -> int:
    """The most tokens that a language model reads after a text."""
    return max(task.max_length + len(task.decoder_start_ids or []) - 1 for task in writing_tasks(tasks).values())
