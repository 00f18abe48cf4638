"""Text and the other streams attend to themselves and to each other."""

from typing import Any, ClassVar, Optional

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import FusionAttention, FusionMLP, Gate, KeyMask, concatenate, key_mask, stream_mask


class CoAttentionSide(nn.Module):
    """Self-attention, cross-attention and feed-forward of one side; through gates if the side is the text."""

    def __init__(self, config: PreTrainedConfig, gated: bool) -> None:
        super().__init__()
        width = config.fusion_hidden_size
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = FusionAttention(config)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = FusionAttention(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FusionMLP(config)
        self.self_gate, self.cross_gate, self.mlp_gate = (Gate() if gated else nn.Identity() for _ in range(3))

    def forward(
        self, states: torch.Tensor, others: torch.Tensor, self_mask: KeyMask, cross_mask: KeyMask
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        normed = self.self_norm(states)
        attended, self_weights = self.self_attention(normed, normed, self_mask)
        states = states + self.self_gate(attended)
        attended, cross_weights = self.cross_attention(self.cross_norm(states), others, cross_mask)
        states = states + self.cross_gate(attended)
        states = states + self.mlp_gate(self.mlp(self.mlp_norm(states)))
        return states, self_weights, cross_weights


class CoAttentionLayer(GradientCheckpointingLayer):
    def __init__(self, config: PreTrainedConfig, updates_streams: bool) -> None:
        super().__init__()
        self.text = CoAttentionSide(config, gated=True)
        self.stream = CoAttentionSide(config, gated=False) if updates_streams else None
        self.text_norm = nn.LayerNorm(config.fusion_hidden_size) if updates_streams else None
        self.stream_norm = nn.LayerNorm(config.fusion_hidden_size)

    def forward(
        self,
        text_states: torch.Tensor,
        stream_states: torch.Tensor,
        text_self: KeyMask,
        text_cross: KeyMask,
        stream_self: KeyMask,
        stream_cross: KeyMask,
    ) -> tuple[Any, ...]:
        # Both sides attend to the states before the layer.
        new_text, *shown = self.text(text_states, self.stream_norm(stream_states), text_self, text_cross)
        if self.stream is not None:
            normed = self.text_norm(text_states)
            stream_states, *others = self.stream(stream_states, normed, stream_self, stream_cross)
            shown += others
        return new_text, stream_states, *shown


@register_fusion
class CoAttentionFusion(Fusion):
    """
    Layers in which both sides attend to themselves and to each other.

    See LXMERT (https://arxiv.org/abs/1908.07490) and METER (https://arxiv.org/abs/2111.02387). All streams beside text
    form one side. The last layer updates only the text side, since nothing reads the other one afterwards.
    """

    kind: ClassVar[str] = "co_attention"

    def __init__(self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int) -> None:
        super().__init__(config, stream_names, text_hidden_size)
        last = config.num_fusion_layers - 1
        self.layers = nn.ModuleList(
            CoAttentionLayer(config, updates_streams=index < last) for index in range(config.num_fusion_layers)
        )

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        stream_states, _ = concatenate(streams)
        mask = stream_mask(streams)
        masks = (
            key_mask(self.config, text_states, text_mask),
            key_mask(self.config, text_states, mask),
            key_mask(self.config, stream_states, mask),
            key_mask(self.config, stream_states, text_mask),
        )
        text, others = ["text"], [stream.name for stream in streams]
        who_reads_whom = [(text, text), (text, others), (others, others), (others, text)]
        for layer in self.layers:
            text_states, stream_states, *weights = layer(text_states, stream_states, *masks)
            record.add(text_states, *((*sides, shown) for sides, shown in zip(who_reads_whom, weights, strict=False)))
        return text_states
