"""The graphs of a decoder: the first token of a text, and each further token with a cache."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput


# Inputs of the decoder.
STATES, STATES_MASK = "fused_states", "fused_mask"
SELF, CROSS, NEXT = "self", "cross", "next_self"
# Releases of transformers name the cache differently, in arguments and in outputs.
CACHE = next(field.name for field in fields(Seq2SeqLMOutput) if field.name in ("cache", "past_key_values"))


class DecoderGraph(nn.Module):
    """
    Reads the beginning of a text.

    Its outputs are the logits of the next token, (batch, 1, vocabulary). With `has_cache`, it also outputs the keys and
    values of each layer, (batch, heads, length, width). Those of the text are "self_key_0", "self_value_0" and so on.
    Those of the fused states are "cross_key_0", "cross_value_0" and so on.
    """

    def __init__(self, text_model: PreTrainedModel, has_cache: bool):
        super().__init__()
        self.text_model, self.config, self.has_cache = text_model, text_model.config, has_cache

    def forward(
        self, decoder_input_ids: torch.Tensor, fused_states: torch.Tensor, fused_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        outputs = self.text_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=fused_states),
            attention_mask=fused_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=self.has_cache,
        )
        cached = {}
        if self.has_cache:
            cache = outputs[CACHE]
            cached = {**named(SELF, cache.self_attention_cache), **named(CROSS, cache.cross_attention_cache)}
        return {"logits": outputs.logits[:, -1:], **cached}


class StepGraph(nn.Module):
    """
    Reads one more token of a text, (batch, 1), with the keys and values of [`DecoderGraph`].

    Its outputs are the logits of the next token, and the keys and values of the text, one token longer:
    "next_self_key_0", "next_self_value_0" and so on.
    """

    def __init__(self, text_model: PreTrainedModel):
        super().__init__()
        self.text_model, self.config = text_model, text_model.config

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        cache: Any = EncoderDecoderCache(*(DynamicCache(pairs(name, inputs)) for name in (SELF, CROSS)))
        outputs = self.text_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=inputs[STATES]),
            attention_mask=inputs[STATES_MASK],
            decoder_input_ids=inputs["decoder_input_ids"],
            use_cache=True,
            **{CACHE: cache},
        )
        return {"logits": outputs.logits[:, -1:], **named(NEXT, outputs[CACHE].self_attention_cache)}


def named(attention: str, cache: DynamicCache) -> dict[str, torch.Tensor]:
    """The keys and values of a cache, by name."""
    found: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(cache.layers):
        found |= {f"{attention}_key_{i}": layer.keys, f"{attention}_value_{i}": layer.values}
    return found


def pairs(attention: str, cached: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The key and the value of each layer."""
    count = sum(name.startswith(f"{attention}_key_") for name in cached)
    return [(cached[f"{attention}_key_{i}"], cached[f"{attention}_value_{i}"]) for i in range(count)]


@torch.no_grad()
def keeps_cache(text_model: PreTrainedModel, states: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a decoder keeps the keys and values of all tokens of each layer."""
    ids = torch.ones(len(states), 2, dtype=torch.int64, device=states.device)
    outputs = text_model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        decoder_input_ids=ids,
        use_cache=True,
    )
    cache = outputs.get(CACHE)
    if not isinstance(cache, EncoderDecoderCache):
        return False
    lengths = [(cache.self_attention_cache, ids.shape[1]), (cache.cross_attention_cache, states.shape[1])]
    return all(
        part.layers and all(getattr(layer, "keys", ids).shape[2:3] == (length,) for layer in part.layers)
        for part, length in lengths
    )
