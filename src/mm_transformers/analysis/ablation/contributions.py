"""Contributions of modalities, computed from measured scores, no models."""

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from math import factorial

import torch


def subsets(names: Sequence[str]) -> list[frozenset[str]]:
    """All subsets, the smallest first."""
    return [
        frozenset(chosen) for chosen in chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))
    ]


def shapley_values(names: Sequence[str], worth: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """
    The exact Shapley value of each modality (https://arxiv.org/abs/1705.07874).

    It is the mean gain when the modality is added, over all orders of adding them. The values sum to the worth of all
    less the worth of none.

    Args:
        worth: of a set of modalities, such as the accuracy with these alone. It is called once for each set.
    """
    total = len(names)
    # Each is needed several times, and may be a pass of a model.
    worths = {kept: worth(kept) for kept in subsets(names)}
    values = {}
    for name in names:
        others = [other for other in names if other != name]
        values[name] = sum(
            factorial(len(before)) * factorial(total - len(before) - 1) / factorial(total)
            * (worths[before | {name}] - worths[before])
            for before in subsets(others)
        )  # fmt: skip
    return values


def perceptual_score(score: float, shuffled: float, less_is_better: bool = False) -> float:
    """
    The loss of score when a modality comes from another row, as a share of the score; 0 if there is no score to lose.

    It is from Gat et al. 2021 (https://arxiv.org/abs/2110.14375), normalised by the model's own score.
    """
    lost = shuffled - score if less_is_better else score - shuffled
    return lost / abs(score) if score else 0.0


def additive_projection(of_texts: torch.Tensor, of_others: torch.Tensor) -> torch.Tensor:
    """
    EMAP (Hessel and Lee 2020, https://arxiv.org/abs/2010.06572): the sum of two functions that is nearest to the model.

    One function reads the text, the other the rest. The difference between the scores of the model and of this sum is
    due to interaction.

    Args:
        of_texts (n, ...): the mean logits of each text, over the pictures (and sounds) of all n rows.
        of_others (n, ...): those of the pictures (and sounds) of each row, over all n texts.

    Returns:
        (n, ...): the logits of the sum for each row's own text and pictures.
    """
    return of_texts + of_others - of_texts.mean(0)
