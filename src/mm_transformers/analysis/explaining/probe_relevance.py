"""The contribution of encoder outputs to an answer through the linear probe of its head."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch

from ...model.encoder_classes import as_tokens
from ...model.fusion_base import Stream
from ...model.linear_probe import LinearProbe
from .recording import Seen


class ProbeReading(NamedTuple):
    """
    The relevance of each encoder output for the score of a linear probe.

    A probe is linear, so each encoder output adds its own part to the score. The part is the product of the output with
    the weights of the answer. It is divided by the number of tokens and the length of their mean. The length counts as
    a constant. The parts of all tokens, the indicators and the bias sum to the score.

    Args:
        probe: the probe of the head that answers.
        features: the input of the probe.
        gradient: that of the answers' scores by the features, in their shape: the weights of each row's answer.
    """

    probe: LinearProbe
    features: torch.Tensor
    gradient: torch.Tensor

    @classmethod
    def of(cls, seen: Seen, gradients: Sequence[Optional[torch.Tensor]]) -> Optional["ProbeReading"]:
        """
        The reading of the probe on which the answers depend; `None` if they depend on none.

        Args:
            gradients: one for each of `seen.probes`.
        """
        for (probe, features), gradient in zip(seen.probes, gradients, strict=True):
            if gradient is not None:
                return cls(probe, features.detach(), gradient)
        return None

    def parts(self, seen: Seen, encoded: dict[str, Stream]) -> dict[str, torch.Tensor]:
        """
        The part of each token in the score, negative for evidence against the answer. Needs the graph of the forward
        pass.

        Modality -> (batch, max_items, encoder tokens of an item); for the text (batch, text_len).
        """
        found = {}
        for name, (block, _) in zip(self.probe.widths, self.probe.blocks, strict=True):
            weights = self.gradient[..., block].float()
            if self.probe.per_token and name == "text":
                found[name] = (self.features[..., block].float() * weights).sum(-1)
            elif name in encoded and name in self.probe.unscaled:
                found[name] = self._of_features(block, self.probe.unscaled[name], seen.num_tokens[name])
            elif name in encoded:
                weights = weights.sum(1) if self.probe.per_token else weights
                found[name] = _parts_of_means(encoded[name], seen.states[name], weights)
        return found

    def _of_features(self, block: slice, tokens: list[int], num_tokens: int) -> torch.Tensor:
        """
        The parts of the tokens of one item, (batch, 1, num_tokens), from features that describe one token each.

        Args:
            block: the place of the features.
            tokens: the token of each feature.
        """
        parts = self.features[..., block].float() * self.gradient[..., block].float()
        parts = parts.sum(1) if self.probe.per_token else parts
        found = parts.new_zeros(len(parts), num_tokens)
        return found.index_add(1, torch.tensor(tokens, device=parts.device), parts)[:, None]


def _parts_of_means(stream: Stream, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The parts of the tokens in the score, from the weights of their mean.

    Args:
        states: the encoder outputs, whose means the stream has.
        weights (batch, encoder width): of the mean, scaled to length 1.
    """
    item_means: Any = stream.item_means
    # The share of each encoder output in the mean of its item: 0 without a token.
    (shares,) = torch.autograd.grad(item_means.sum(), states, retain_graph=True)
    items = by_row((as_tokens(states) * as_tokens(shares)).detach().float(), stream)
    means: Any = stream.row_means
    lengths = means.detach().float().norm(dim=-1, keepdim=True)
    weights = weights / torch.where(lengths > 0, lengths, 1)
    if stream.item_index is None:
        return torch.einsum("btw,bw->bt", items, weights)
    num_items = (stream.item_index >= 0).sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bstw,bw->bst", items, weights / num_items)


def by_row(of_items: torch.Tensor, stream: Stream) -> torch.Tensor:
    """(items, ...) -> (batch, max_items, ...), 0 where a row has none; texts stay unchanged."""
    if stream.item_index is None:
        return of_items
    has_item = (stream.item_index >= 0).reshape(*stream.item_index.shape, *[1] * (of_items.ndim - 1))
    return of_items[stream.item_index.clamp(min=0)] * has_item
