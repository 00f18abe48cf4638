"""How a model with a decoder writes the answers of its `Generation` tasks."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Optional

import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from .modeling_outputs import MMTransformerModelOutput


class _CanGenerate:
    """A classmethod in transformers. Here the class can write, and a model can if one of its tasks does."""

    def __get__(self, model: Any, owner: type) -> Callable[[], bool]:
        return lambda: model is None or model.config.has_decoder


class TextWriting:
    """
    The part of [`MMTransformerForMultiTask`] that writes. The decoder is the pretrained encoder-decoder itself, given
    the fused states as what its encoder gave: beams, caches, tied weights and special tokens are its own.
    """

    # `config`, `tasks` and `model` are those of the model that this is a part of.
    config: Any
    tasks: dict[str, Any]
    model: Any

    can_generate = _CanGenerate()

    def read_written(
        self, task: Any, encoder_outputs: MMTransformerModelOutput, labels: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """What the decoder says at each place of the labels, given the labels before it."""
        states = encoder_outputs.last_hidden_state
        if labels is None:
            # The decoder takes part in every backward pass, as heads do.
            labels = torch.full((states.shape[0], 1), -100, device=states.device)
        start = torch.tensor(self.decoder_start_ids(task), device=labels.device)
        pad = self.model.text_model.config.pad_token_id or 0
        decoder_input_ids = torch.cat(
            [start.expand(labels.shape[0], -1), labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)], dim=1
        )
        outputs = self.model.text_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=encoder_outputs.attention_mask.to(torch.int64),
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        )
        return outputs.logits[:, len(start) - 1 :]

    def decoder_start_ids(self, task: Any) -> list[int]:
        """The ids that the decoder is given before it writes the answer of this task."""
        if task.decoder_start_ids is not None:
            return task.decoder_start_ids
        config = self.generation_config
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        if start is None:
            raise ValueError(
                f"Task {task.name!r}: the decoder does not say with which token it starts; say it by "
                "Generation(..., decoder_start_ids=[...])."
            )
        return [start] if config.forced_bos_token_id is None else [start, config.forced_bos_token_id]

    @torch.no_grad()
    def generate(
        self,
        task: Optional[str] = None,
        encoder_outputs: Optional[MMTransformerModelOutput] = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Lets the decoder write the answers of one task: `processor.batch_decode(ids, skip_special_tokens=True)` reads
        them. Encoders and fusion run once per row, whatever the number of beams and steps.

        Args:
            task (`str`, *optional*): Name of a [`Generation`] task; may be left out if there is only one.
            encoder_outputs ([`MMTransformerModelOutput`], *optional*):
                What `self.model` gave for these inputs, if that is known already.
            kwargs: the inputs of [`MMTransformerModel.forward`]; everything else (`num_beams`, `do_sample`,
                `max_new_tokens`, `generation_config`, `return_dict_in_generate`, ...) is for
                [`~transformers.GenerationMixin.generate`].

        Returns:
            (batch, length) int64: the ids of the tokens; the first ones are those that the decoder starts with,
            [`decoder_start_ids`].

        Raises:
            ValueError: if there is no such task, it does not write, or `assistant_model` is given.
        """
        writing: dict[str, Any] = {name: known for name, known in self.tasks.items() if known.needs_decoder}
        if task is None and len(writing) == 1:
            task = next(iter(writing))
        if task not in writing:
            raise ValueError(
                f"generate(task=...) must name a task that writes text, one of {list(writing)}, but is {task!r}."
            )
        if kwargs.get("assistant_model") is not None:
            raise ValueError(
                "generate cannot use assistant_model, to which the fused states of this model mean nothing; "
                "leave it out."
            )
        # What is asked to be shown is for the decoder to show.
        known = inspect.signature(type(self.model).forward).parameters
        inputs = {name: kwargs.pop(name) for name in known if name in kwargs and not name.startswith("output_")}
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "word_index")}
        if encoder_outputs is None:
            encoder_outputs = self.model(**inputs)
        states = encoder_outputs.last_hidden_state
        given = kwargs.get("generation_config")
        # 20 is what older releases of transformers have by default.
        says_length = given is not None and (given.max_new_tokens or given.max_length not in (None, 20))
        if not says_length and not {"max_length", "max_new_tokens"} & set(kwargs):
            kwargs["max_new_tokens"] = writing[task].max_length
        start = torch.tensor(self.decoder_start_ids(writing[task]), device=states.device)
        with self._nothing_forced():
            return self.model.text_model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=encoder_outputs.attention_mask.to(torch.int64),
                decoder_start_token_id=start[0].item(),
                decoder_input_ids=start.repeat(states.shape[0], 1),
                **kwargs,
            )

    @torch.no_grad()
    def forward_and_write(
        self, labels: Optional[dict[str, torch.Tensor]] = None, generation_kwargs: Any = None, **inputs
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """
        The output of the model, and what the decoder writes for each task that writes, (batch, length) int64 without
        what it starts with; encoders and fusion run once for all of it.

        Args:
            labels, inputs: as [`MMTransformerForMultiTask.forward`] takes them.
            generation_kwargs (`dict`, *optional*): For [`~transformers.GenerationMixin.generate`].
        """
        encoded = self.model(**inputs)
        # Not by a call of the model: under FSDP this already is one.
        outputs = self.forward(encoder_outputs=encoded, labels=labels)  # type: ignore[attr-defined]
        written = {}
        for name, task in self.tasks.items():
            if task.needs_decoder:
                written[name] = self.write(task, encoded, **(generation_kwargs or {}))
        return outputs, written

    def write(self, task: Any, encoder_outputs: MMTransformerModelOutput, **kwargs) -> torch.Tensor:
        """
        The answer of each row, (batch, length) int64, without what the decoder starts with.

        Args:
            task ([`Generation`]): That which is answered.
            encoder_outputs, kwargs: as [`generate`] takes them.

        Raises:
            ValueError: if the decoder gives another number of answers than one per row.
        """
        ids = self.generate(task.name, encoder_outputs, **kwargs)
        num_rows = len(encoder_outputs.last_hidden_state)
        if not isinstance(ids, torch.Tensor) or len(ids) != num_rows:
            raise ValueError(
                f"Task {task.name!r}: a row has one answer, so num_return_sequences must be 1, and "
                "return_dict_in_generate False; model.generate(...) gives more."
            )
        return ids[:, len(self.decoder_start_ids(task)) :]

    @contextmanager
    def _nothing_forced(self):
        """What the pretrained model would force the decoder to begin with is among what it starts with, if wanted."""
        config = self.generation_config
        forced = config.forced_bos_token_id
        config.forced_bos_token_id = None
        try:
            yield
        finally:
            config.forced_bos_token_id = forced

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """Called by `from_pretrained`, to read what `save_pretrained` wrote."""
        self.model.text_model.adjust_generation_fn(*args, **kwargs)

    @property
    def generation_config(self) -> Optional[GenerationConfig]:
        """That of the decoder."""
        model = getattr(self, "model", None)  # there is none while the model is being built
        return model.text_model.generation_config if model is not None and self.can_generate() else None

    @generation_config.setter
    def generation_config(self, value: Optional[GenerationConfig]):
        if getattr(self, "model", None) is not None and self.can_generate():
            self.model.text_model.generation_config = value
