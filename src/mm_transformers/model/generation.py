"""Answers that a decoder writes: the decoder of a pretrained encoder-decoder reads the fused states."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Optional, Protocol, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .modalities import own_inputs
from .task_base import Task
from .text_tokens import end_id


class FusedText(Protocol):
    """The fused text tokens of a batch, such as a [`MMTransformerModelOutput`]."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """(batch, text_len, text hidden size)"""

    @property
    def attention_mask(self) -> torch.Tensor:
        """(batch, text_len) bool"""


class WritingTask(Protocol):
    """A task whose answer a decoder writes, such as [`Generation`]."""

    name: str
    max_length: int
    decoder_start_ids: Optional[list[int]]


class AnswerDecoder:
    """
    Makes the decoder of an encoder-decoder read fused states instead of its encoder outputs.

    Beams, caches, tied weights and special tokens are those of the pretrained model.

    Args:
        text_model (`PreTrainedModel`): An encoder-decoder of transformers. Only its decoder runs.

    Example:

    ```python
    >>> decoder = AnswerDecoder(model.model.text_model)
    >>> ids = decoder.generate(model.tasks["german"], model.model(**inputs), num_beams=4)
    ```
    """

    def __init__(self, text_model: PreTrainedModel) -> None:
        self.text_model = text_model

    def start_ids(self, task: WritingTask) -> list[int]:
        """
        The ids that the decoder gets before it writes an answer.

        Raises:
            ValueError: if neither the task nor the decoder says with which token it starts.
        """
        if task.decoder_start_ids is not None:
            return task.decoder_start_ids
        config = self.text_model.generation_config
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        if start is None:
            raise ValueError(
                f"Task {task.name!r}: the config of the decoder has no start token. Give it by Generation(..., "
                "decoder_start_ids=[...])."
            )
        return [start] if config.forced_bos_token_id is None else [start, config.forced_bos_token_id]

    def logits(self, task: WritingTask, fused: FusedText, labels: Optional[torch.Tensor] = None) -> torch.Tensor:
        """
        The logits at each place of the labels, given the labels before it (teacher forcing).

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Token ids, -100 at padding.

        Returns:
            (batch, length, vocabulary); with a length of 1 without labels.
        """
        states = fused.last_hidden_state.to(self.text_model.dtype)
        if labels is None:
            # The decoder takes part in every backward pass, as heads do.
            labels = torch.full((states.shape[0], 1), -100, device=states.device)
        start = torch.tensor(self.start_ids(task), device=labels.device)
        pad = self.text_model.config.pad_token_id or 0
        decoder_input_ids = torch.cat(
            [start.expand(labels.shape[0], -1), labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)], dim=1
        )
        outputs = self.text_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=fused.attention_mask.to(torch.int64),
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        )
        return outputs.logits[:, len(start) - 1 :]

    def generate(self, task: WritingTask, fused: FusedText, **options: Any) -> torch.Tensor:
        """
        Writes one answer per row.

        Args:
            options: for [`~transformers.GenerationMixin.generate`]; by default the answer has at most
                `task.max_length` tokens.

        Returns:
            (batch, length) int64, with the [`start_ids`] first.

        Raises:
            ValueError: if `assistant_model` is given.
        """
        refuse_assistant(options)
        states = fused.last_hidden_state.to(self.text_model.dtype)
        if stated_length(options) is None:
            options["max_new_tokens"] = task.max_length
        # A forced first token, as of mBART, is among the start ids. The config stays as it is: threads share it.
        forced = getattr(options.get("generation_config"), "forced_bos_token_id", None)
        options.setdefault("forced_bos_token_id", forced)
        start = torch.tensor(self.start_ids(task), device=states.device)
        return self.text_model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=fused.attention_mask.to(torch.int64),
            decoder_start_token_id=start[0].item(),
            decoder_input_ids=start.repeat(states.shape[0], 1),
            **options,
        )

    def without_start(self, task: WritingTask, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
        """
        The generated ids, (batch, length) int64, without the [`start_ids`].

        Raises:
            ValueError: if there is not exactly one answer per row.
        """
        return answer_ids(task, ids, num_rows, len(self.start_ids(task)))


def answer_ids(task: WritingTask, ids: Any, num_rows: int, num_start_ids: int) -> torch.Tensor:
    """
    The generated ids without those at the start.

    Raises:
        ValueError: if there is not exactly one answer per row.
    """
    if not isinstance(ids, torch.Tensor) or len(ids) != num_rows:
        raise ValueError(
            f"Task {task.name!r}: a row has one answer, so num_return_sequences must be 1 and "
            "return_dict_in_generate False. For more, call model.generate(...)."
        )
    return ids[:, num_start_ids:]


def refuse_assistant(options: Mapping[str, Any]) -> None:
    """
    Refuses the option of `generate` that cannot work here.

    Raises:
        ValueError: if `assistant_model` is among the options of `generate`.
    """
    if options.get("assistant_model") is not None:
        raise ValueError(
            "generate does not support assistant_model, which cannot read the fused states of this model: leave it out."
        )


def refuse_pieces(options: Mapping[str, Any], config: Any) -> None:
    """
    Refuses the options of `generate` by which a language model reads a prompt with a prefix in several pieces.

    Args:
        config: the generation config of the model.

    Raises:
        ValueError: if one of them is given.
    """
    given = options.get("generation_config") or config
    for name in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
        if options.get(name) is not None or getattr(given, name, None) is not None:
            raise ValueError(f"generate does not support {name} with fusion_type='prefix': leave it out.")


def stop_at_end(model: Any, tokenizer: Any) -> None:
    """
    Lets `generate` stop also at the token with which the tokenizer ends the answers of training rows.

    The config of the pretrained model may name another one, or none.

    Args:
        model ([`MMTransformerForMultiTask`]): Its generation config is changed, if it writes.
        tokenizer: that of transformers.
    """
    config = model.generation_config
    end = end_id(tokenizer)
    if config is None or end is None:
        return
    stops = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    if end not in stops:
        known = [stop for stop in stops if stop is not None]
        config.eos_token_id = [*known, end] if known else end


def repeatable(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options of `generate` for scores and explanations: without random draws, also if the generation config of the
    pretrained model asks for them.

    Args:
        model ([`MMTransformerForMultiTask`]): The model that writes.
        options: as a caller gives them; `do_sample` and `generation_config` are kept.
    """
    config = model.generation_config
    if config is None or not config.do_sample or options.keys() & {"do_sample", "generation_config"}:
        return dict(options)
    return {"do_sample": False, **options}


def stated_length(options: Mapping[str, Any]) -> Optional[str]:
    """Which option of `generate` limits the length, "max_new_tokens" or "max_length"; `None` if none does."""
    given = options.get("generation_config")
    for name in ("max_new_tokens", "max_length"):
        if options.get(name) is not None:
            return name
    if given is not None and given.max_new_tokens:
        return "max_new_tokens"
    # 20 is the default of older releases of transformers.
    return "max_length" if given is not None and given.max_length not in (None, 20) else None


def writing_tasks(tasks: Mapping[str, Task]) -> dict[str, WritingTask]:
    """Those tasks whose answers a decoder writes, by name."""
    return {name: cast(WritingTask, task) for name, task in tasks.items() if task.needs_decoder}


def task_that_writes(tasks: Mapping[str, Task], name: Optional[str]) -> WritingTask:
    """
    The task of a name; without a name the only one that writes.

    Raises:
        ValueError: if there is no such task, or it does not write.
    """
    writing = writing_tasks(tasks)
    if name is None and len(writing) == 1:
        name = next(iter(writing))
    if name not in writing:
        raise ValueError(
            f"generate(task=...) must name a task that writes text, one of {list(writing)}, but is {name!r}."
        )
    return writing[name]


def split_inputs(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Splits the arguments of `generate` into those of a model and those of the decoder.

    Args:
        forward: That of the model. `output_attentions`, ... are for the decoder, though the model knows them.
        arguments: With `labels` and `word_index`, which neither of them takes, if the caller gives a whole batch.
    """
    known = {name for name in inspect.signature(forward).parameters if not name.startswith("output_")}
    known |= own_inputs(dict(arguments)).keys()
    inputs = {name: value for name, value in arguments.items() if name in known}
    others = {name: value for name, value in arguments.items() if name not in {*known, "labels", "word_index"}}
    return inputs, others
