"""Fusion through a few shared latents."""

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from .fusion_base import Fusion, FusionRecord, Stream, register_fusion
from .fusion_layers import KeyMask, Latents, key_mask
from .fusion_merged import SelfAttentionLayer


class BottleneckLayer(nn.Module):
    """First the latents read every stream, then the text reads the latents: one layer is enough to fuse."""

    def __init__(self, config: PreTrainedConfig, stream_names: list[str]) -> None:
        super().__init__()
        self.streams = nn.ModuleDict({name: SelfAttentionLayer(config, gated=False) for name in stream_names})
        self.text = SelfAttentionLayer(config)


@register_fusion
class BottleneckFusion(Fusion):
    """
    Every stream attends to itself and to `num_latents` shared latents (MBT, https://arxiv.org/abs/2107.00135).

    The output latents of the streams of a row are averaged. Attention costs (length of stream)^2 per stream, not (sum
    of lengths)^2. Within a layer the text comes last, while MBT updates all streams at once. Its attention maps are
    those of the text side, (batch, heads, text_len + num_latents, text_len + num_latents).

    Args:
        num_latents (`int`, *optional*, defaults to 4): Number of shared latents.
    """

    kind: ClassVar[str] = "bottleneck"

    def __init__(
        self, config: PreTrainedConfig, stream_names: list[str], text_hidden_size: int, num_latents: int = 4
    ) -> None:
        super().__init__(config, stream_names, text_hidden_size)
        if not isinstance(num_latents, int) or num_latents < 1:
            raise ValueError(f"num_latents in fusion_kwargs must be an integer >= 1, but is {num_latents!r}.")
        self.latents = Latents(num_latents, config.fusion_hidden_size)
        self.layers = nn.ModuleList(BottleneckLayer(config, stream_names) for _ in range(config.num_fusion_layers))

    def fuse(
        self, text_states: torch.Tensor, text_mask: torch.Tensor, streams: list[Stream], record: FusionRecord
    ) -> torch.Tensor:
        latents = self.latents(text_states.shape[0])

        def mask_of(states: torch.Tensor, mask: torch.Tensor) -> KeyMask:
            # Latents always exist, so no row is completely masked.
            visible = torch.ones_like(latents[..., 0], dtype=torch.bool)
            return key_mask(self.config, torch.cat([states, latents], 1), torch.cat([mask, visible], 1))

        text_key_mask = mask_of(text_states, text_mask)
        stream_masks = [mask_of(stream.hidden_states, stream.mask) for stream in streams]
        states = [stream.hidden_states for stream in streams]
        weights = torch.stack([stream.present for stream in streams]).to(text_states.dtype)[..., None, None]
        for layer in self.layers:
            updates, steps = [], []
            for i, stream in enumerate(streams):
                states[i], update, shown = layer.streams[stream.name](states[i], latents, stream_masks[i])
                updates.append(update)
                steps.append(([stream.name, "latents"], [stream.name, "latents"], shown))
            latents = (torch.stack(updates) * weights).sum(0) / weights.sum(0).clamp(min=1)
            text_states, latents, attentions = layer.text(text_states, latents, text_key_mask)
            record.add(text_states, *steps, (["text", "latents"], ["text", "latents"], attentions))
        return text_states
