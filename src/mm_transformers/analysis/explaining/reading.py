"""From what was seen of a forward pass to the relevance of each input of each row."""

from typing import Any

import torch

from ...model.fusion_base import AttentionStep, Stream
from ...model.modeling_outputs import MMTransformerModelOutput
from .methods import AttentionMethod, zeros_if_none
from .relevance import Relevance, follow
from .watching import Seen


def relevance_of_inputs(
    seen: Seen, outputs: MMTransformerModelOutput, scores: torch.Tensor, method: AttentionMethod
) -> dict[str, torch.Tensor]:
    """
    Follows an answer back through what was read: from the text tokens that the head took it from, through the fusion
    and the encoders.

    Heads that read what the encoders gave, and fusions without attention, say through the gradient of the answer times
    the tokens which of these count (Shrikumar et al. 2017, https://arxiv.org/abs/1704.02685).

    Args:
        outputs: of the forward pass that was seen.
        scores (batch,): of the answers; each must depend on its own row alone.

    Returns:
        "text": (batch, text_len); "vision", "audio", where the batch has them: (batch, max_items, tokens that the
        encoder gives of an item). Float32, >= 0.
    """
    encoded: Any = outputs.encoded
    states: list[Any] = [outputs.last_hidden_state, *(stream.tokens for stream in encoded.values())]
    watched = seen.attentions()
    gradients = torch.autograd.grad(scores.sum(), [*watched, *states], allow_unused=True)
    of_attentions, of_states = gradients[: len(watched)], gradients[len(watched) :]
    with torch.no_grad():
        weights = [
            method.weigh(attention.float(), zeros_if_none(gradient, attention).float())
            for attention, gradient in zip(watched, of_attentions, strict=True)
        ]
        seen = seen.replaced(weights)
        relevance = Relevance({name: _from_encoder(seen, name, stream, method) for name, stream in encoded.items()})
        evidence = [_evidence(state, gradient) for state, gradient in zip(states, of_states, strict=True)]
        if seen.fusion and of_states[0] is not None:
            shown: Any = outputs.attention_mask
            starts = torch.where(evidence[0].any(-1, keepdim=True), evidence[0], shown.float())
            untouched = relevance.of(["text"], list(encoded))
            follow(relevance, seen.fusion, method.rule)
            # Rows that have nothing beside their text leave the fusion as they came.
            has_any = torch.stack([s.present for name, s in encoded.items() if name != "text"]).any(0)
            mixed = torch.where(has_any[:, None, None], relevance.of(["text"], list(encoded)), untouched)
        else:
            names = list(encoded)
            starts = torch.cat(
                [_by_row(evidence[1 + i], encoded[name]).flatten(1) for i, name in enumerate(names)], dim=1
            )
            mixed = relevance.of(names, names)
        starts = starts / starts.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        found = (starts[:, None] @ mixed)[:, 0]
        lengths = [relevance.inputs([name]).numel() for name in encoded]
        parts = dict(zip(encoded, found.split(lengths, dim=1), strict=True))
        return {
            name: part if name == "text" else part.unflatten(1, (encoded[name].item_index.shape[1], -1))
            for name, part in parts.items()
        }


def _evidence(states: torch.Tensor, gradient: Any) -> torch.Tensor:
    """(items, tokens): how much of the answer the state of each token speaks for."""
    return (states * zeros_if_none(gradient, states)).float().sum(-1).clamp(min=0)


def _from_encoder(seen: Seen, name: str, stream: Stream, method: AttentionMethod) -> torch.Tensor:
    """(batch, tokens in the fusion, tokens of the encoder), of all the items of each row."""
    layers = seen.encoders.get(name, ()) if method.through_encoders else ()
    items, num_tokens = stream.tokens.shape[0], seen.num_tokens[name]
    identity = torch.eye(num_tokens, device=stream.tokens.device).expand(items, -1, -1)
    inside = Relevance({"tokens": identity})
    follow(inside, [[AttentionStep(("tokens",), ("tokens",), weights)] for weights in layers], method.rule)
    if name == "vision" and seen.reduction:
        follow(inside, [[step] for step in seen.reduction], method.rule)
        found = inside.of(["vision"], ["tokens"])
    else:
        found = inside.matrix
        if name == "vision" and seen.merged is not None:
            found = seen.merged.float() @ found
    if stream.item_index is None:
        return found
    by_row = _by_row(found, stream)
    slots = torch.eye(by_row.shape[1], device=found.device)
    return torch.einsum("bsnm,st->bsntm", by_row, slots).flatten(3, 4).flatten(1, 2)


def _by_row(of_items: torch.Tensor, stream: Stream) -> torch.Tensor:
    """(items, ...) -> (batch, max_items, ...), 0 where a row has none; of the text as it is."""
    if stream.item_index is None:
        return of_items
    has_item = (stream.item_index >= 0).reshape(*stream.item_index.shape, *[1] * (of_items.ndim - 1))
    return of_items[stream.item_index.clamp(min=0)] * has_item
