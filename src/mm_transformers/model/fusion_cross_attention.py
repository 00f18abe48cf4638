"""Text tokens attend to the tokens of the other streams."""

from typing import ClassVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import FusionAttention, FusionMLP, Gate, KeyMask, key_mask, stream_mask


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

    def forward(self, text_states: torch.Tensor, mask: KeyMask, streams: list[Stream], *tokens: torch.Tensor):
        # The tokens come by themselves because checkpointing hands gradients to tensors only.
        streams = [stream._replace(tokens=given) for stream, given in zip(streams, tokens, strict=True)]
        attended, weights = self.cross_attention(self.attention_norm(text_states), streams, mask)
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
        mask = key_mask(self.config, text_states, stream_mask(streams))
        # What differs from row to row is worked out once, not in every layer.
        streams = [s if s.offsets is None else Stream(s.name, s.hidden_states) for s in streams]
        tokens = [stream.tokens for stream in streams]
        for layer in self.layers:
            text_states, weights = layer(text_states, mask, streams, *tokens)
            record.add(text_states, (["text"], [stream.name for stream in streams], weights))
        return text_states
