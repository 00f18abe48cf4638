"""The fusion behind the last hidden states of a language model that writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from .fusion_base import Stream, with_change
from .row_streams import RowStreams, other_streams


# A hook belongs to a module, which several threads may run at once; each has its own change.
_running: ContextVar[Optional["LastStates"]] = ContextVar("_running", default=None)


class LastStates:
    """
    Changes the last hidden states of a language model.

    Args:
        change: from the states, (batch, length, width), to those that the head reads; `None` for the same.
    """

    def __init__(self, change: Callable[[torch.Tensor], Optional[torch.Tensor]]) -> None:
        self.change = change
        self._is_inside = False  # whether the language model without head is running

    @contextmanager
    def shown_to(self, text_model: PreTrainedModel) -> Iterator[None]:
        """Within the block the head of the language model reads the changed states."""
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
        states = self.change(output[0])
        if states is None:
            return None
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output


class BehindRun(RowStreams):
    """
    One use of a language model whose last hidden states are fused.

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
        super().__init__(streams or [], num_rows)
        self.model, self.encode = model, encode
        self.fused: Any = None

    def inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, num_packed: int = 0, to_the_right: bool = True
    ) -> dict[str, torch.Tensor]:
        """What the language model reads: the texts as they are."""
        self.mask = mask
        return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}

    @contextmanager
    def shown_to(self, text_model: PreTrainedModel) -> Iterator[None]:
        """Within the block the head of the language model reads the fused states."""
        with LastStates(self._fuse).shown_to(text_model):
            yield

    def _fuse(self, states: torch.Tensor) -> Optional[torch.Tensor]:
        if self.encode is not None:
            self.fused = self.encode(states)
            self.streams = other_streams(self.fused.encoded)
        streams = self.for_states(states)
        if not streams:
            return None
        given = self.model.in_fusion_dtype(states)
        fused = self.model.fusion(given, self.mask_for(states), streams).hidden_states
        return with_change(states, given, fused)
