"""The methods of explanation."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Optional

import torch

from .relevance import Chefer, LastLayer, Rollout, Rule


class AttentionMethod(NamedTuple):
    """
    A method that follows attention.

    Args:
        weigh: attention and its gradient, both (batch, heads, queries, keys) -> (batch, queries, keys).
        rule: how relevance is passed on from layer to layer.
        through_encoders: whether the layers of the encoders count, or those of the fusion only.
        counts_itself: whether a token is relevant to itself, before any attention.
        by_gradients: whether the result depends on the answer.
    """

    weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rule: Rule
    through_encoders: bool
    counts_itself: bool = True
    by_gradients: bool = True


def mean_over_heads(attention: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return attention.mean(1)


def positive_evidence(attention: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The part of the attention that is evidence for the answer, averaged over heads."""
    return (attention * gradient).clamp(min=0).mean(1)


# Beside these: "random", the baseline, and "integrated_gradients", which uses no attention.
ATTENTION_METHODS: Mapping[str, AttentionMethod] = MappingProxyType(
    {
        "chefer": AttentionMethod(positive_evidence, Chefer(), True, counts_itself=False),
        "rollout": AttentionMethod(mean_over_heads, Rollout(), True, by_gradients=False),
        "gradient_attention": AttentionMethod(positive_evidence, LastLayer(), False),
        "attention": AttentionMethod(mean_over_heads, LastLayer(), False, by_gradients=False),
    }
)
METHODS = (*ATTENTION_METHODS, "integrated_gradients", "random")


def check_method(method: str) -> str:
    """
    The name of a known method.

    Raises:
        ValueError: if there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but is {method!r}.")
    return method


def zeros_if_none(gradient: Optional[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
