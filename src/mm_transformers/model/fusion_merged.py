"""All tokens in one self-attention."""

from typing import ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import FusionAttention, FusionMLP, Gate, KeyMask, concatenate, key_mask


class SelfAttentionLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer over text tokens and others; the updates of the text may be gated."""

    def __init__(self, config: PreTrainedConfig, gated: bool = True) -> None:
        super().__init__()
        width = config.fusion_hidden_size
        self.attention_norm = nn.LayerNorm(width)
        self.self_attention = FusionAttention(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FusionMLP(config)
        self.attention_gate, self.mlp_gate = (Gate() if gated else nn.Identity() for _ in range(2))

    def forward(
        self, text_states: torch.Tensor, other_states: torch.Tensor, mask: KeyMask
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        length = text_states.shape[1]
        states = self.attention_norm(torch.cat([text_states, other_states], dim=1))
        attended, weights = self.self_attention(states, states, mask)
        text_states = text_states + self.attention_gate(attended[:, :length])
        other_states = other_states + attended[:, length:]
        update = self.mlp(self.mlp_norm(torch.cat([text_states, other_states], dim=1)))
        text_states = text_states + self.mlp_gate(update[:, :length])
        other_states = other_states + update[:, length:]
        return text_states, other_states, weights


@register_fusion
class MergedFusion(Fusion):
    """
    Transformer layers over the text tokens and those of all streams, side by side.

    This is the "merged attention" of METER (https://arxiv.org/abs/2111.02387) and VisualBERT
    (https://arxiv.org/abs/1908.03557). Its attention maps are (batch, heads, text_len + stream_len, text_len +
    stream_len).
    """

    kind: ClassVar[str] = "merged"

    def __init__(self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int) -> None:
        super().__init__(config, stream_names, text_hidden_size)
        self.layers = nn.ModuleList(SelfAttentionLayer(config) for _ in range(config.num_fusion_layers))

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        other_states, other_mask = concatenate(streams)
        mask = key_mask(
            self.config, torch.cat([text_states, other_states], dim=1), torch.cat([text_mask, other_mask], dim=1)
        )
        names = ["text", *(stream.name for stream in streams)]
        for layer in self.layers:
            text_states, other_states, weights = layer(text_states, other_states, mask)
            record.add(text_states, (names, names, weights))
        return text_states
