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
    Follows an answer back through what was read: from the text tokens on which it depends, all alike, through the
    fusion and the encoders. Where the head reads what the encoders gave, or the fusion has no attention, from these.
    Tokens of encoders that are not looked into count by the gradient of the answer times their activation.

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
        names = list(encoded)
        relevance = Relevance({name: _from_encoder(seen, name, encoded[name], method) for name in names})
        before = relevance.copy()
        is_fused = bool(seen.fusion) and of_states[0] is not None
        if is_fused:
            follow(relevance, seen.fusion, method.rule)
            # Rows that have nothing beside their text leave the fusion as they came.
            has_any = torch.stack([encoded[name].present for name in names if name != "text"]).any(0)
            unchanged = torch.cat([before.matrix, torch.zeros_like(relevance.matrix[:, before.matrix.shape[1] :])], 1)
            relevance.matrix = torch.where(has_any[:, None, None], relevance.matrix, unchanged)
        found = torch.zeros_like(relevance.matrix[:, 0])
        for name, state, gradient in zip(
            ["text"] if is_fused else names,
            states[:1] if is_fused else states[1:],
            of_states[:1] if is_fused else of_states[1:],
            strict=True,
        ):
            gradient = zeros_if_none(gradient, state)
            depends = _distribution(_by_row(gradient.any(-1).float(), encoded[name]))
            # As in Grad-CAM (https://arxiv.org/abs/1610.02391).
            evidence = _distribution(_by_row((state * gradient).float().sum(-1).clamp(min=0), encoded[name]))
            is_followed = method.through_encoders and bool(seen.encoders.get(name))
            if is_followed:
                read = depends
            elif is_fused and not method.by_gradients:
                read = torch.where(has_any[:, None], depends, evidence)
            else:
                read = evidence
            mixed, itself = relevance.of([name], names), relevance.identity([name])
            if not method.counts_itself:
                mixed = mixed - itself
                if not is_followed:
                    found += _read(evidence, itself)
            found += _read(read, mixed)
        lengths = [relevance.inputs([name]).numel() for name in names]
        parts = dict(zip(names, found.split(lengths, dim=1), strict=True))
        return {
            name: part if name == "text" else part.unflatten(1, (encoded[name].item_index.shape[1], -1))
            for name, part in parts.items()
        }


def _distribution(weights: torch.Tensor) -> torch.Tensor:
    """(batch, ...) -> (batch, tokens), summing to 1 where there is anything."""
    weights = weights.flatten(1)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _read(weights: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """(batch, tokens), (batch, tokens, inputs) -> (batch, inputs)"""
    return (weights[:, None] @ relevance)[:, 0]


def _from_encoder(seen: Seen, name: str, stream: Stream, method: AttentionMethod) -> torch.Tensor:
    """(batch, tokens in the fusion, tokens of the encoder), of all the items of each row."""
    layers = seen.encoders.get(name, ()) if method.through_encoders else ()
    items, num_tokens = stream.tokens.shape[0], seen.num_tokens[name]
    identity = torch.eye(num_tokens, device=stream.tokens.device).expand(items, -1, -1)
    inside = Relevance({"tokens": identity})
    follow(inside, [[AttentionStep(("tokens",), ("tokens",), weights)] for weights in layers], method.rule)
    inside.matrix = method.rule.leaving(inside.matrix)
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
