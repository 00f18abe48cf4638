"""Passes relevance through attentions: matrices only, no models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch

from ...model.fusion_base import AttentionStep


class Relevance:
    """
    The share of each input in each token, (batch, tokens, inputs), while attentions mix the tokens.

    Tokens and inputs come in groups, such as "text" and "vision". A group that exists only inside a model, such as
    latents, has no inputs.

    Args:
        groups: name -> (batch, tokens, inputs), the shares at the start; for the identity, each token is an input.
    """

    def __init__(self, groups: Mapping[str, torch.Tensor]):
        first = next(iter(groups.values()))
        self._tokens: dict[str, range] = {}
        self._inputs: dict[str, range] = {}
        self.matrix = first.new_zeros(first.shape[0], 0, sum(start.shape[2] for start in groups.values()))
        for name, start in groups.items():
            self._add(name, start.shape[1], start.shape[2])
            self.matrix[:, self.tokens([name]), self._inputs[name].start : self._inputs[name].stop] = start

    def tokens(self, names: Iterable[str]) -> torch.Tensor:
        """The indices of the tokens of these groups: (tokens,) int64."""
        return self._places(self._tokens, names)

    def inputs(self, names: Iterable[str]) -> torch.Tensor:
        """The indices of their inputs: (inputs,) int64."""
        return self._places(self._inputs, names)

    def of(self, names: Sequence[str], inputs: Sequence[str]) -> torch.Tensor:
        """The relevance of the inputs of some groups for the tokens of others: (batch, tokens, inputs)."""
        return self.matrix[:, self.tokens(names)][:, :, self.inputs(inputs)]

    @property
    def names(self) -> list[str]:
        """The groups that have inputs, in order."""
        return [name for name, places in self._inputs.items() if len(places)]

    def identity(self, names: Sequence[str]) -> torch.Tensor:
        """(tokens, inputs): 1 where a token of these groups is the input; for groups with as many tokens as inputs."""
        result = self.matrix.new_zeros(sum(len(self._tokens[name]) for name in names), self.matrix.shape[2])
        start = 0
        for name in names:
            length, inputs = len(self._tokens[name]), self._inputs[name]
            if length == len(inputs):
                result[start : start + length, inputs.start : inputs.stop] = torch.eye(length)
            start += length
        return result

    def meet(self, step: AttentionStep) -> None:
        """Adds the unknown group of a step: it gets the remaining places, with no relevance."""
        for names, length in ((step.queries, step.weights.shape[-2]), (step.keys, step.weights.shape[-1])):
            for name in names:
                if name not in self._tokens:
                    self._add(name, length - len(self.tokens(known for known in names if known in self._tokens)), 0)

    def copy(self) -> "Relevance":
        other = object.__new__(Relevance)
        other._tokens, other._inputs, other.matrix = dict(self._tokens), dict(self._inputs), self.matrix.clone()
        return other

    def _add(self, name: str, num_tokens: int, num_inputs: int) -> None:
        batch, tokens, width = self.matrix.shape
        used = sum(len(places) for places in self._inputs.values())
        self._tokens[name] = range(tokens, tokens + num_tokens)
        self._inputs[name] = range(used, used + num_inputs)
        self.matrix = torch.cat([self.matrix, self.matrix.new_zeros(batch, num_tokens, width)], 1)

    def _places(self, ranges: Mapping[str, range], names: Iterable[str]) -> torch.Tensor:
        places = [place for name in names for place in ranges.get(name, ())]
        return torch.tensor(places, dtype=torch.int64, device=self.matrix.device)


def follow(relevance: Relevance, layers: Sequence[Sequence[AttentionStep]], rule: "Rule") -> Relevance:
    """
    The relevance after these layers, with weights (batch, queries, keys), one attention for all heads.

    The argument is changed.
    """
    for steps in layers if rule.all_layers else layers[-1:]:
        for step in steps:
            relevance.meet(step)
        before = relevance.copy()
        for step in steps:
            if step.queries == step.keys:
                places = relevance.tokens(step.queries)
                relevance.matrix[:, places] = rule.within(relevance.matrix[:, places], step.weights)
            else:
                places = relevance.tokens(step.queries)
                own = relevance.matrix[:, places]
                rule.across(relevance, before, step)
                # A row that attends to nothing stays as it is.
                attends = step.weights.flatten(1).any(-1)[:, None, None]
                relevance.matrix[:, places] = torch.where(attends, relevance.matrix[:, places], own)
    return relevance


class Rule:
    """Combines the relevance from one attention with the existing relevance."""

    # Whether all layers are followed, or the last one only.
    all_layers: ClassVar[bool] = True

    def within(self, own: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Self-attention: the relevance (batch, tokens, inputs) after it."""
        raise NotImplementedError

    def across(self, relevance: Relevance, before: Relevance, step: AttentionStep) -> None:
        """Cross-attention: changes the rows of the queries; `before` is the relevance at the start of the layer."""
        places = relevance.tokens(step.queries)
        read = step.weights @ before.matrix[:, before.tokens(step.keys)]
        relevance.matrix[:, places] = self.joined(relevance.matrix[:, places], read)

    def joined(self, own: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return own + read

    def leaving(self, own: torch.Tensor) -> torch.Tensor:
        """The relevance in all tokens of one encoder as they enter the fusion."""
        return own


class Chefer(Rule):
    """
    The bi-modal rules of Chefer et al. 2021 (https://arxiv.org/abs/2103.15679, equations 6 to 11).

    Let s be the tokens that attend, and q those attended to. A self-attention adds A R_ss and A R_sq. A cross-attention
    adds norm(R_ss)^T A norm(R_qq) to R_sq and A R_qs to R_ss. Here norm scales the rows of what was added to the
    identity to a sum of 1. Rows to which nothing was added stay rows of the identity (the published code turns them
    into NaN).

    The same norm is applied at the end of an encoder; for a cross-attention this changes nothing. A self-attention over
    text and pictures together needs it: gradients add little beside the identity, so otherwise each patch would depend
    on itself only.
    """

    def within(self, own: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return own + weights @ own

    def across(self, relevance: Relevance, before: Relevance, step: AttentionStep) -> None:
        places = relevance.tokens(step.queries)
        reads, is_read = relevance.inputs(step.queries), relevance.inputs(step.keys)
        own, other = relevance.of(step.queries, step.queries), before.of(step.keys, step.keys)
        added = step.weights @ self.normalized(other)
        # Not square: tokens that replace others, such as those of a resampler, or latents, which are no inputs.
        if own.shape[1] == own.shape[2]:
            added = self.normalized(own).transpose(1, 2) @ added
        back = step.weights @ before.of(step.keys, step.queries)
        rows = relevance.matrix[:, places]
        rows[:, :, is_read] += added
        rows[:, :, reads] += back
        relevance.matrix[:, places] = rows

    def leaving(self, own: torch.Tensor) -> torch.Tensor:
        return self.normalized(own)

    @staticmethod
    def normalized(of_itself: torch.Tensor) -> torch.Tensor:
        identity = torch.zeros_like(of_itself)
        if of_itself.shape[1] == of_itself.shape[2]:
            identity += torch.eye(of_itself.shape[1], device=of_itself.device)
        added = of_itself - identity
        sums = added.sum(-1, keepdim=True)
        return torch.where(sums > 0, added / torch.where(sums > 0, sums, 1), 0) + identity


class Rollout(Rule):
    """
    Attention rollout (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928).

    The residual connection counts as much as the attention.
    """

    def within(self, own: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.joined(own, weights @ own)

    def joined(self, own: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return (own + read) / 2


class LastLayer(Rule):
    """The attention of the last layer, unchanged. A token that attends to nothing keeps its relevance."""

    all_layers: ClassVar[bool] = False

    def within(self, own: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.where(weights.any(-1, keepdim=True), weights @ own, own)
