"""Text tokens attend to the tokens of the other streams."""

from typing import ClassVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import FusionAttention, FusionMLP, Gate, KeyMask, concatenate, key_mask


class CrossAttentionLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        width = config.fusion_hidden_size
        self.attention_norm = nn.LayerNorm(width)
        self.cross_attention = FusionAttention(config)
        self.attention_gate = Gate()
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FusionMLP(config)
        self.mlp_gate = Gate()

    def forward(self, text_states: torch.Tensor, stream_states: torch.Tensor, mask: KeyMask):
        attended, weights = self.cross_attention(self.attention_norm(text_states), stream_states, mask)
        text_states = text_states + self.attention_gate(attended)
        text_states = text_states + self.mlp_gate(self.mlp(self.mlp_norm(text_states)))
        return text_states, weights


@register_fusion
class CrossAttentionFusion(Fusion):
    """
    Gated cross-attention and gated feed-forward layers on the text tokens, which attend to the tokens of all streams
    (Flamingo, https://arxiv.org/abs/2204.14198). Costs the least of the token-level kinds.
    """

    kind: ClassVar[str] = "cross_attention"

    def __init__(self, config, stream_names: list[str], text_hidden_size: int):
        super().__init__(config, stream_names, text_hidden_size)
        self.layers = nn.ModuleList(CrossAttentionLayer(config) for _ in range(config.num_fusion_layers))

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        stream_states, stream_mask = concatenate(streams)
        mask = key_mask(self.config, text_states, stream_mask, stream_states)
        for layer in self.layers:
            text_states, weights = layer(text_states, stream_states, mask)
            record.add(hidden_states=text_states, cross_attentions=weights)
        return text_states
