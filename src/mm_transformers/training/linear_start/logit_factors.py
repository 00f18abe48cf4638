"""The factors of the logits of a linear model, or of one model for each modality, with the lowest loss."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np


# Weight of a copy of a row without one of its modalities; the row itself has weight 1.
COPY_WEIGHT = 0.3
# Passes over the modalities in the search for their factors, and the least gain by these, a share of the loss.
NUM_PASSES, CLEAR_GAIN = 3, 0.25
# The largest number of logits in the search for the factors of modalities. With more, random rows are used.
MOST_LOGITS = 200_000
# Possible factors of logits.
SCALES = tuple(sorted((2 ** (i / 4) for i in range(-12, 13)), key=lambda scale: max(scale, 1 / scale)))  # 1 wins ties


# Inverse strength of the penalty -> the factor of each modality, or one of all.
Scales = dict[float, tuple[float, ...]]
# Logits of some items, and their places -> the loss of each.
Losses = Callable[[np.ndarray, Any], np.ndarray]

_ALL = slice(None)


def best_scales(
    losses: Losses, answers: dict[float, np.ndarray], counts: np.ndarray, rows: np.ndarray, may_differ: bool
) -> Scales:
    """
    The factors with which the logits of each strength have the lowest loss.

    Modalities have factors of their own only if the loss is then lower by a quarter and by two standard errors.
    Otherwise all have the same factor, since the factors of a few rows are noisy.

    Args:
        losses: logits (some items, num_outputs), and the places of these items -> (some items,).
        answers: strength -> logits (num_modalities + 1, num_items, num_outputs): the summands of each modality, then
            the biases.
        counts (num_items,): the weights of the items.
        rows (num_items,): the number of the row of each item. Repeated folds have the same rows again.
        may_differ: whether modalities may have factors of their own.
    """
    shared: Scales = {}
    own: Scales = {}
    gain, total = np.zeros(len(counts)), 0.0
    for strength, logits in answers.items():
        shared[strength] = min(((s,) for s in SCALES), key=lambda s: (counts * losses(scaled(logits, s), _ALL)).sum())
        own[strength] = shared[strength] * (len(logits) - 1)
        if may_differ and len(own[strength]) > 1:
            own[strength] = _factors(losses, logits, counts, own[strength])
            before, after = (counts * losses_with_copies(losses, logits, x[strength]) for x in (shared, own))
            gain += before - after
            total += before.sum()
    num_rows = max(len(np.unique(rows[counts > 0])), 1)
    is_clear = gain.mean() > 2 * gain.std() / np.sqrt(num_rows)
    return own if is_clear and gain.sum() > CLEAR_GAIN * total else shared


def scaled(logits: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
    """(num_items, num_outputs): the sum of the logits of all modalities, with a common factor or one for each."""
    if len(factors) == 1:
        return factors[0] * logits.sum(0)
    return np.tensordot(factors, logits[:-1], 1) + logits[-1]


def losses_with_copies(losses: Losses, logits: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
    """(num_items,): the losses of the items, and with a small weight those of copies without each modality."""
    total = scaled(logits, factors)
    found = losses(total, _ALL)
    each = np.broadcast_to(factors, len(logits) - 1)
    for i in range(len(each) if len(each) > 1 else 0):
        found = found + COPY_WEIGHT * losses(total - each[i] * logits[i], _ALL)
    return found


def _factors(losses: Losses, logits: np.ndarray, counts: np.ndarray, factors: tuple[float, ...]) -> tuple[float, ...]:
    """
    The factors of the modalities with the lowest loss, one after the other.

    Args:
        factors: the first ones.
    """
    items = _some_items(counts, logits.shape[-1])
    parts, bias, counts = logits[:-1, items], logits[-1, items], counts[items]
    there: np.ndarray = (parts != 0).any(-1)
    best = list(factors)
    for _ in range(NUM_PASSES):
        before = list(best)
        for i in np.flatnonzero(there.any(1)):
            # Other items do not have this modality, so its factor changes nothing there.
            rows = np.flatnonzero(there[i])
            rest = bias[rows] + sum(best[j] * parts[j, rows] for j in range(len(parts)) if j != i)
            own, weights = parts[i, rows], counts[rows].copy()
            copies = []
            for j in range(len(parts)):
                has = there[j, rows]
                if j != i and has.any():
                    some = rows[has]
                    copies.append((COPY_WEIGHT * counts[some], some, rest[has] - best[j] * parts[j, some], own[has]))
                if j != i:
                    weights += COPY_WEIGHT * counts[rows] * ~has  # the copy is the row itself

            terms = [(weights, rows, rest, own), *copies]
            best[i] = min(dict.fromkeys((best[i], 0.0, *SCALES)), key=partial(_loss, losses, items, terms))
        if best == before:
            break
    return tuple(best)


def _loss(losses: Losses, items: np.ndarray, terms: Sequence[tuple[Any, ...]], factor: float) -> float:
    """
    The loss with a factor of one modality.

    Args:
        terms: weights, places in `items`, logits of the other modalities, and logits of this one.
    """
    return sum(float(weights @ losses(rest + factor * own, items[rows])) for weights, rows, rest, own in terms)


def _some_items(counts: np.ndarray, num_outputs: int) -> np.ndarray:
    """The places of the items that count, or of a random choice, if they have too many logits."""
    items = np.flatnonzero(counts > 0)
    most = max(MOST_LOGITS // num_outputs, 1)
    if len(items) <= most:
        return items
    return np.sort(np.random.default_rng(0).permutation(items)[:most])
