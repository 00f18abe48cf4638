"""Answers that a decoder-only language model writes: it continues the text of each row, behind the fusion."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from .decoders import language_model_class
from .encoder_classes import arguments_of
from .encoders import max_text_positions
from .fusion_base import FusionOutput
from .fusion_behind import BehindRun, LastStates
from .fusion_layers import kept_keys
from .generation import WritingTask, answer_ids, refuse_assistant, refuse_pieces, stated_length, writing_tasks
from .joint_reading import joint_run
from .padding import roll_rows
from .row_streams import TextRun, other_streams


def read_contiguously(head: nn.Module) -> None:
    """Lets the head of a language model read states without gaps: on CPUs, bfloat16 with gaps takes 60 times longer."""
    head.register_forward_pre_hook(_without_gaps)


def _without_gaps(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


class LanguageModelWriter:
    """
    Continues the text of each row by the language model that is the text encoder: the text is the prompt.

    The language model of transformers runs as it is, with its own head, cache and settings. The other modalities enter
    behind its last hidden states, between its layers, or as a prefix. No fused state depends on a later token, so
    answers are written token by token.

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
        return self._logits(task, self._run(fused), ids, mask, labels)

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
        shown = _begun(given)
        ids, mask = self._prompts(task, self.model.prompt_ids(input_ids, attention_mask), shown)
        to_the_left = -_places_to_the_right(shown)

        def encode_prompts(states: torch.Tensor) -> Any:
            return encode(roll_rows(states[:, : given.shape[1]], to_the_left))

        reading = BehindRun(self.model, len(ids), encode=encode_prompts)
        return self._logits(task, reading, ids, mask, labels), reading.fused

    def read_jointly(
        self, task: WritingTask, labels: Optional[torch.Tensor], encoded: dict[str, Any]
    ) -> tuple[torch.Tensor, FusionOutput]:
        """
        [`logits`], and the fused states of the texts, from one pass of a language model that reads other modalities.

        Args:
            labels: as [`logits`] takes them.
            encoded: modality -> its tokens, as [`MMTransformerModel.encode_rows`] gives them.
        """
        text, run = encoded["text"], joint_run(self.model, encoded)
        ids, mask = self._prompts(task, text.row_ids, text.mask)
        seen: list[torch.Tensor] = []
        with LastStates(seen.append).shown_to(self.text_model):
            logits = self._logits(task, run, ids, mask, labels)
        states = self.model.in_fusion_dtype(run.text_states(seen[0])[:, : text.mask.shape[1]])
        return logits, run.output(roll_rows(states, -_places_to_the_right(text.mask)))

    def _run(self, fused: Any) -> TextRun:
        """One use of the language model for rows that were encoded."""
        if self.model.reads_jointly:
            return joint_run(self.model, fused.encoded)
        return BehindRun(self.model, len(fused.encoded["text"].mask), other_streams(fused.encoded))

    def _logits(
        self,
        task: WritingTask,
        reading: TextRun,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: Optional[torch.Tensor],
    ) -> torch.Tensor:
        if labels is None:
            # The language model takes part in every backward pass, as heads do.
            labels = torch.full((len(ids), 1), -100, device=ids.device)
        length, known = labels.shape[1], labels[:, :-1] != -100
        given = reading.inputs(
            torch.cat([ids, labels[:, :-1].masked_fill(~known, 0)], dim=1),
            torch.cat([mask, known], dim=1),
            num_packed=ids.shape[1],
        )
        mask = given["attention_mask"]
        self._check_length(task, mask)
        options: dict[str, Any] = {}
        takes = arguments_of(language_model_class(self.model.config.text_config))
        if "position_ids" in takes:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = length
        with reading.shown_to(self.text_model):
            outputs = self.text_model(**given, use_cache=False, **options)
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
            ValueError: if an option cannot work here, such as `assistant_model`, or as [`logits`].
        """
        refuse_assistant(options)
        options = self._with_lengths(task, options)
        text = fused.encoded["text"]
        ids, mask = self._prompts(task, text.row_ids, text.mask)
        run = self._run(fused)
        prompts = run.inputs(ids, mask)
        if run.num_before:
            refuse_pieces(options, self.text_model.generation_config)
        self._check_length(task, prompts["attention_mask"], options.get("max_new_tokens") or 1)
        config, given = self.text_model.generation_config, options.get("generation_config")
        if config.pad_token_id is None and getattr(given, "pad_token_id", None) is None:
            options.setdefault("pad_token_id", self._end_id())
        with run.shown_to(self.text_model), kept_keys():
            written = self.text_model.generate(**prompts, **options)
        start = ids[0, ids.shape[1] - len(self.start_ids(task)) :]

        def answers(sequences: torch.Tensor) -> torch.Tensor:
            sequences = sequences[:, prompts["input_ids"].shape[1] :]
            return torch.cat([start.expand(len(sequences), -1), sequences], 1)

        if isinstance(written, torch.Tensor):
            return answers(written)
        written.sequences = answers(written.sequences)
        return written

    def without_start(self, task: WritingTask, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
        """
        The generated ids, (batch, length) int64, without the [`start_ids`].

        Raises:
            ValueError: if there is not exactly one answer per row.
        """
        return answer_ids(task, ids, num_rows, len(self.start_ids(task)))

    def _with_lengths(self, task: WritingTask, options: dict[str, Any]) -> dict[str, Any]:
        given = options.get("generation_config") or self.text_model.generation_config
        fewest = options["min_length"] if options.get("min_length") is not None else given.min_length
        said = options.get("min_new_tokens") is not None or given.min_new_tokens is not None
        if fewest and not said:
            # As `max_length` below.
            options = {**options, "min_length": 0, "min_new_tokens": max(0, fewest - len(self.start_ids(task)))}
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
        mask = _begun(mask)
        to_the_right = _places_to_the_right(mask)
        ids, mask = roll_rows(ids, to_the_right), roll_rows(mask, to_the_right)
        start = torch.tensor(self.start_ids(task), dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        return torch.cat([ids, start], 1), torch.cat([mask, torch.ones_like(start, dtype=torch.bool)], 1)


def _begun(mask: torch.Tensor) -> torch.Tensor:
    """The mask of texts, (batch, length) bool, with the first place of rows that have none: there a text begins."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (~mask.any(-1, keepdim=True) & first)


def _places_to_the_right(mask: torch.Tensor) -> torch.Tensor:
    """By how many places to roll each row to the left (below 0: to the right) until its last token is at the end."""
    length = mask.shape[1]
    places = torch.arange(1, length + 1, device=mask.device)
    return (mask * places).amax(1).clamp(min=1) - length


def longest_prompt(config: Any) -> Optional[int]:
    """
    The longest text of a row, in tokens, that leaves room for the answers of a language model.

    Args:
        config ([`MMTransformerConfig`]): Of the model.

    Returns:
        The number of tokens; `None` without such a limit.
    """
    if not config.has_language_model:
        return None
    positions, tasks = max_text_positions(config.text_config), writing_tasks(config.get_tasks())
    longest = max(task.max_length + len(task.decoder_start_ids or []) - 1 for task in tasks.values())
    return None if positions is None else positions - longest
