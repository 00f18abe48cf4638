"""Pooled vectors, concatenated: the plain baseline."""

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import Gate, masked_mean


@register_fusion
class LateFusion(Fusion):
    """
    Adds the output of an MLP of two layers to every text token: the baseline that the other kinds must beat.

    The MLP reads the mean of the text tokens and the mean of each stream (0 if a row lacks it), concatenated. No token
    attends to another token. `num_fusion_layers` and `num_fusion_attention_heads` have no effect.
    """

    kind: ClassVar[str] = "late"

    def __init__(self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int) -> None:
        super().__init__(config, stream_names, text_hidden_size)
        width = config.fusion_hidden_size
        self.norm = nn.LayerNorm((1 + len(stream_names)) * width)
        self.fc1 = nn.Linear((1 + len(stream_names)) * width, 4 * width)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.gate = Gate()

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        pooled = {stream.name: masked_mean(stream.hidden_states, stream.mask) for stream in streams}
        text = masked_mean(text_states, text_mask)
        parts = [text] + [pooled.get(name, torch.zeros_like(text)) for name in self.stream_names]
        update = self.dropout(self.fc2(self.activation(self.fc1(self.norm(torch.cat(parts, dim=-1))))))
        text_states = text_states + self.gate(update)[:, None]
        record.add(text_states)
        return text_states
