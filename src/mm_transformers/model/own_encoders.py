"""Encoders that transformers lacks: the base class."""

from collections.abc import Mapping
from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from .fusion_layers import masked_mean


class OwnEncoder(nn.Module):
    """
    The base class of encoders that transformers lacks. They start with new weights and are trained with the model.

    A subclass sets `config_class`, and implements [`prepare`], [`blank_input`] and [`forward`]. An [`EncoderKind`]
    names it. A module with `init_own_parameters(std)` initialises its own parameters.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of `config_class`; `hidden_size` is the width of the tokens.

    Example:

    ```python
    >>> from mm_transformers.model.table import TableEncoder
    >>> issubclass(TableEncoder, OwnEncoder)
    True
    ```
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    # Whether a linear probe scales the linear features of an item to length 1.
    scales_linear_features: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def prepare(cls, config: Any, items: list[Any]) -> dict[str, torch.Tensor]:
        """The inputs of [`forward`] for at least one item, as the reader of the modality returns it."""
        raise NotImplementedError

    @classmethod
    def blank_input(cls, config: Any) -> dict[str, torch.Tensor]:
        """The inputs of [`forward`] for one item without content; its output is masked."""
        raise NotImplementedError

    @classmethod
    def linear_width(cls, config: Any) -> int:
        """The width of [`linear_features`]."""
        return config.hidden_size

    @classmethod
    def linear_tokens(cls, config: Any) -> list[int]:
        """The token that each of the linear features describes; needed only if they are not scaled."""
        raise NotImplementedError

    @classmethod
    def neutral(cls, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs without information, but not absent, for explanations; by default zeros."""
        return {name: torch.zeros_like(value) for name, value in inputs.items()}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """
        Encodes all items.

        Returns:
            The tokens (num_items, tokens, hidden_size), and which of them hold something, (num_items, tokens) bool;
            `None` if all do. Every parameter must have a gradient.
        """
        raise NotImplementedError

    def linear_features(
        self, tokens: torch.Tensor, mask: Optional[torch.Tensor], **inputs: torch.Tensor
    ) -> torch.Tensor:
        """
        The features of each item for a linear probe, (num_items, linear width); by default the mean of the tokens.

        Args:
            tokens, mask: the output of [`forward`].
            inputs: its inputs.
        """
        return tokens.mean(1) if mask is None else masked_mean(tokens, mask)
