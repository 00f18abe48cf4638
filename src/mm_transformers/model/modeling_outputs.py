"""What the models return."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from transformers.utils import ModelOutput


@dataclass
class MMTransformerModelOutput(ModelOutput):
    """
    Output of [`MMTransformerModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, text_len, text hidden size)`):
            The text tokens, fused with what the row has beside text.
        pooler_output (`torch.FloatTensor` of shape `(batch, text hidden size)`):
            Mean of `last_hidden_state` over the tokens that are not padding.
        attention_mask (`torch.BoolTensor` of shape `(batch, text_len)`):
            Which tokens are not padding; in rows without a text the first, whose place a learned vector takes.
        encoded (`dict[str, Stream]`):
            What the encoders gave before the fusion: modality -> its tokens and their mask. Without a modality of which
            the batch has nothing.
        kept (`dict[str, torch.BoolTensor]`, *optional*, in training with modality dropout):
            Modality -> `(batch,)`, which rows have it after dropout.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, when `output_hidden_states=True`):
            Text tokens before and after each fusion layer, `(batch, text_len, fusion_hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, when `output_attentions=True`):
            Self-attention of each fusion layer, in the fusion kinds that have it.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*, when `output_attentions=True`):
            Attention of text tokens to the tokens of images and sound in each fusion layer, `(batch, heads, text_len,
            max_images * tokens per image + max_clips * tokens per clip)`; 0 in rows without any. Needs
            `attn_implementation="eager"`.
    """

    last_hidden_state: Optional[torch.Tensor] = None
    pooler_output: Optional[torch.Tensor] = None
    attention_mask: Optional[torch.Tensor] = None
    encoded: Optional[dict[str, Any]] = None
    kept: Optional[dict[str, torch.Tensor]] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    cross_attentions: Optional[tuple[torch.Tensor, ...]] = None


@dataclass
class MMTransformerOutput(ModelOutput):
    """
    Output of [`MMTransformerForMultiTask`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, when `labels` is given):
            Sum of `loss_weight * losses[task]` over the tasks, plus `losses["regularization"]`.
        losses (`dict[str, torch.Tensor]`, *optional*, when `labels` is given):
            For each task the mean loss of what is labelled, 0 if nothing is; and `"regularization"`, if there is one.
        logits (`dict[str, torch.Tensor]`): For each task what its head says; the task's class gives the shape.
        hidden_states, attentions, cross_attentions: see [`MMTransformerModelOutput`].
    """

    loss: Optional[torch.Tensor] = None
    losses: Optional[dict[str, torch.Tensor]] = None
    logits: Optional[dict[str, torch.Tensor]] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    cross_attentions: Optional[tuple[torch.Tensor, ...]] = None
