"""Computes the relevance of each input of each row from a recorded forward pass."""

from typing import Any, NamedTuple, Optional

import torch

from ...model.fusion_base import AttentionStep, Stream
from ...model.modeling_mm_transformer import MMTransformerModelOutput
from .methods import AttentionMethod, zeros_if_none
from .probe_relevance import ProbeReading, by_row
from .recording import Seen
from .relevance import Relevance, follow


def relevance_of_inputs(
    seen: Seen, outputs: MMTransformerModelOutput, scores: torch.Tensor, method: AttentionMethod
) -> dict[str, torch.Tensor]:
    """
    The relevance of each input, followed back from the answer.

    The path starts at the text tokens on which the answer depends, all alike, and goes through the fusion and the
    encoders. It starts at the encoder outputs if the head reads these, or if the fusion has no attention. Encoders
    without attention of all tokens to all are not followed: there, tokens count by the gradient of the answer times
    their activation.

    A head with a linear probe reads the mean encoder outputs and the change by the fusion; see [`_read_with_probe`].

    Args:
        outputs: of the recorded forward pass.
        scores (batch,): of the answers; each must depend on its own row alone.

    Returns:
        "text": (batch, text_len); "vision", "audio", if the batch has them: (batch, max_items, encoder tokens of an
            item). Float32, >= 0.
    """
    encoded: Any = outputs.encoded
    names = list(encoded)
    states: list[Any] = [outputs.last_hidden_state, *(stream.tokens for stream in encoded.values())]
    watched, features = seen.attentions(), [features for _, features in seen.probes]
    inputs = [*watched, *states, *features]
    rest = iter(torch.autograd.grad(scores.sum(), inputs, allow_unused=True, retain_graph=bool(features)))
    of_attentions, of_states, of_features = ([next(rest) for _ in part] for part in (watched, states, features))
    probe = ProbeReading.of(seen, of_features)
    of_probe = None if probe is None else probe.parts(seen, encoded)
    with torch.no_grad():
        weights = [
            method.weigh(attention.float(), zeros_if_none(gradient, attention).float())
            for attention, gradient in zip(watched, of_attentions, strict=True)
        ]
        seen = seen.replaced(weights).in_order()
        in_encoders = {name: _in_encoder(seen, name, method) for name in names}
        starts = dict(in_encoders)
        if seen.text_in_fusion:
            length = seen.num_tokens["text"]
            starts["text"] = torch.eye(length, device=scores.device).expand(len(scores), -1, -1)
        relevance = Relevance({name: _in_fusion(seen, encoded[name], starts[name], method) for name in names})
        before: Optional[Relevance] = None
        if seen.fusion and of_states[0] is not None:
            before = relevance.copy()
            follow(relevance, seen.fusion, method.rule)
            if not seen.text_in_fusion:
                # Rows with text only leave the fusion unchanged.
                added = torch.zeros_like(relevance.matrix[:, before.matrix.shape[1] :])
                unchanged = torch.cat([before.matrix, added], 1)
                relevance.matrix = torch.where(_has_any(encoded)[:, None, None], relevance.matrix, unchanged)
            read = {"text": _Read.of(states[0], of_states[0], encoded["text"])}
            if seen.read_places is not None:
                places = seen.read_places
                read = {"text": _Read(*(values.gather(1, places) for values in read["text"]))}
        else:
            of_encoders = zip(names, states[1:], of_states[1:], strict=True)
            read = {name: _Read.of(state, gradient, encoded[name]) for name, state, gradient in of_encoders}
        if of_probe is None:
            found = _read_by_head(read, relevance, before, seen, encoded, method)
        else:
            found = _read_with_probe(read, relevance, before, of_probe, in_encoders, encoded, method)
        lengths = [relevance.inputs([name]).numel() for name in names]
        parts = dict(zip(names, found.split(lengths, dim=1), strict=True))
        return {
            name: part if name == "text" else part.unflatten(1, (encoded[name].item_index.shape[1], -1))
            for name, part in parts.items()
        }


class _Read(NamedTuple):
    """
    The use of some tokens by an answer.

    Args:
        depends (batch, tokens): 1 if the answer depends on the token, else 0.
        evidence (batch, tokens): gradient times activation if it is evidence for the answer, else 0; as in Grad-CAM
            (https://arxiv.org/abs/1610.02391).
    """

    depends: torch.Tensor
    evidence: torch.Tensor

    @classmethod
    def of(cls, state: torch.Tensor, gradient: Optional[torch.Tensor], stream: Stream) -> "_Read":
        gradient = zeros_if_none(gradient, state)
        evidence = (state * gradient).float().sum(-1).clamp(min=0)
        return cls(*(by_row(values, stream).flatten(1) for values in (gradient.any(-1).float(), evidence)))


def _read_by_head(
    read: dict[str, _Read],
    relevance: Relevance,
    before: Optional[Relevance],
    seen: Seen,
    encoded: dict[str, Stream],
    method: AttentionMethod,
) -> torch.Tensor:
    """
    The relevance of the inputs for a head.

    Args:
        read: the fused text, or all encoder outputs.
        relevance: in these.
        before: the relevance before the fusion, if the fusion has attention.

    Returns:
        (batch, inputs)
    """
    found = torch.zeros_like(relevance.matrix[:, 0])
    for name, (depends, evidence) in read.items():
        depends, evidence = _distribution(depends), _distribution(evidence)
        in_fusion = name == "text" and seen.text_in_fusion
        is_followed = method.through_encoders and (in_fusion or bool(seen.encoders.get(name)))
        if is_followed:
            weights = depends
        elif before is not None and not method.by_gradients:
            weights = depends if in_fusion else torch.where(_has_any(encoded)[:, None], depends, evidence)
        else:
            weights = evidence
        mixed, itself = relevance.of([name], relevance.names), relevance.identity([name])
        if not method.counts_itself:
            mixed = mixed - itself
            if not is_followed:
                found += _read(evidence, itself)
        found += _read(weights, mixed)
    return found


def _read_with_probe(
    read: dict[str, _Read],
    relevance: Relevance,
    before: Optional[Relevance],
    of_probe: dict[str, torch.Tensor],
    in_encoders: dict[str, torch.Tensor],
    encoded: dict[str, Stream],
    method: AttentionMethod,
) -> torch.Tensor:
    """
    The same for a head with a linear probe.

    The head reads only the change of the text states by the fusion, so only what the fusion added counts. The probe
    reads the mean encoder outputs. Each token counts by its positive part of the score, and is followed through its
    encoder. Gradients give both in units of the score; methods without gradients weight both equally.

    Args:
        of_probe: see [`ProbeReading.parts`].
        in_encoders: see [`_in_encoder`].
    """
    names = relevance.names
    parts = {name: of_probe[name].clamp(min=0) for name in names}
    evidence = {name: states.evidence for name, states in read.items()} if before is None else {}
    if not method.by_gradients:
        total = torch.stack([v.flatten(1).sum(1) for v in (*parts.values(), *evidence.values())]).sum(0)
        parts, evidence = ({n: _share(values, total) for n, values in both.items()} for both in (parts, evidence))
    inputs = [_read(parts[name], by_row(in_encoders[name], encoded[name])).flatten(1) for name in names]
    found = torch.cat(inputs, 1)
    for name, values in evidence.items():
        found += _read(values, relevance.of([name], names))
    if before is not None:
        added = (relevance.of(["text"], names) - before.of(["text"], names)).clamp(min=0)
        # The gradients of attentions already include the share of each token in the answer.
        depends = read["text"].depends if method.by_gradients else _distribution(read["text"].depends)
        found += _read(depends, added)
    return found


def _has_any(encoded: dict[str, Stream]) -> torch.Tensor:
    """(batch,) bool: the rows with another modality beside text."""
    return torch.stack([stream.present for name, stream in encoded.items() if name != "text"]).any(0)


def _distribution(weights: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) -> (batch, tokens), scaled to sum to 1; rows of zeros stay zero."""
    return _share(weights, weights.sum(-1))


def _share(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(batch, ...), (batch,) -> (batch, ...)"""
    return values / total.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (values.ndim - 1))


def _read(weights: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """(batch, ..., tokens), (batch, ..., tokens, inputs) -> (batch, ..., inputs)"""
    return (weights[..., None, :] @ relevance)[..., 0, :]


def _in_encoder(seen: Seen, name: str, method: AttentionMethod) -> torch.Tensor:
    """The relevance of the encoder's tokens in each encoder output: (items, tokens of the encoder, the same)."""
    layers, states = seen.encoders.get(name, ()) if method.through_encoders else (), seen.states[name]
    identity = torch.eye(seen.num_tokens[name], device=states.device).expand(len(states), -1, -1)
    inside = Relevance({"tokens": identity})
    follow(inside, [[AttentionStep(("tokens",), ("tokens",), weights)] for weights in layers], method.rule)
    return method.rule.leaving(inside.matrix)


def _in_fusion(seen: Seen, stream: Stream, in_encoder: torch.Tensor, method: AttentionMethod) -> torch.Tensor:
    """(batch, tokens in the fusion, tokens of the encoder), of all the items of each row."""
    found = in_encoder
    if stream.name == "vision" and seen.reduction:
        inside = Relevance({"tokens": in_encoder})
        follow(inside, [[step] for step in seen.reduction], method.rule)
        found = inside.of(["vision"], ["tokens"])
    elif stream.name == "vision" and seen.merged is not None:
        found = seen.merged.float() @ found
    if stream.item_index is None:
        return found
    found = by_row(found, stream)
    slots = torch.eye(found.shape[1], device=found.device)
    return torch.einsum("bsnm,st->bsntm", found, slots).flatten(3, 4).flatten(1, 2)
