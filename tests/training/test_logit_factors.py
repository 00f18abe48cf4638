"""The factors of the logits of modalities: those of a search by hand, its cost, and folds that are repeated."""

import numpy as np
import pytest

from mm_transformers.model.linear_problem import MultinomialProblem
from mm_transformers.training.linear_start import logit_factors
from mm_transformers.training.linear_start.logit_factors import COPY_WEIGHT, NUM_PASSES, SCALES, best_scales


def make_logits(seed, num=90, num_labels=3, shares=(1.0, 1.0, 0.6, 0.0), noise=(0.3, 1.0, 0.5, 0.0)):
    """Logits of one modality for each share of rows that have it, then biases; labels; weights of the rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_labels, size=num)
    parts = [
        (np.eye(num_labels)[labels] * rng.random() + 4 * scale * rng.normal(size=(num, num_labels)))
        * (rng.random(num) < share)[:, None]
        for share, scale in zip(shares, noise, strict=True)
    ]
    bias = np.tile(0.2 * rng.normal(size=num_labels), (num, 1))
    counts = rng.random(num) * (rng.random(num) < 0.9)
    return np.stack([*parts, bias]), labels, counts


class Losses:
    """The losses of logits, and how many were asked for."""

    def __init__(self, labels, num_labels):
        self.labels, self.problem = labels, MultinomialProblem(num_labels)
        self.num_calls = self.num_logits = 0

    def __call__(self, logits, items):
        self.num_calls += 1
        self.num_logits += logits.size
        return self.problem.losses(logits, self.labels[items])


def by_hand(losses, logits, counts, first):
    """Each factor in turn, with the loss of all rows and all of their copies computed anew."""

    def total(factors):
        found = losses(sum(f * part for f, part in zip(factors, logits, strict=False)) + logits[-1], slice(None))
        for i in range(len(factors)):
            rest = [0 if j == i else f for j, f in enumerate(factors)]
            copies = sum(f * part for f, part in zip(rest, logits, strict=False)) + logits[-1]
            found = found + COPY_WEIGHT * losses(copies, slice(None))
        return (counts * found).sum()

    best = list(first)
    for _ in range(NUM_PASSES):
        for i in range(len(best)):
            best = min(([*best[:i], s, *best[i + 1 :]] for s in (best[i], 0.0, *SCALES)), key=total)
    return tuple(best)


@pytest.mark.parametrize("seed", range(3))
def test_the_factors_are_those_of_a_search_by_hand(seed):
    logits, labels, counts = make_logits(seed)
    losses = Losses(labels, 3)
    found = logit_factors._factors(losses, logits, counts, (1.0,) * 4)
    assert found == by_hand(losses, logits, counts, (1.0,) * 4)
    assert len(set(found)) > 1
    assert found[3] == 1.0  # no row has this modality


def test_the_search_ends_where_a_pass_changes_nothing():
    logits, labels, counts = make_logits(0)
    found = logit_factors._factors(Losses(labels, 3), logits, counts, (1.0,) * 4)
    losses = Losses(labels, 3)
    assert logit_factors._factors(losses, logits, counts, found) == found
    # Three modalities that rows have; for each 26 factors, of all rows and of the copies without one of two others.
    assert losses.num_calls == 3 * 26 * 3


def test_with_many_classes_fewer_rows_are_searched(monkeypatch):
    monkeypatch.setattr(logit_factors, "MOST_LOGITS", 2_000)
    logits, labels, counts = make_logits(0, num=400, num_labels=20, shares=(1.0, 1.0, 1.0), noise=(0.1, 1.0, 0.2))
    losses = Losses(labels, 20)
    found = logit_factors._factors(losses, logits, counts, (1.0,) * 3)
    assert losses.num_logits <= losses.num_calls * 2_000
    assert losses.num_calls <= NUM_PASSES * 3 * 26 * 3
    assert found[1] < found[0]  # the second one is noise


def test_folds_that_are_repeated_tell_nothing_new():
    """Each row three times, as with repeated folds, gives the factors of each row once."""
    num_other = 0
    for seed in range(40):
        logits, labels, counts = make_logits(seed, num=24, num_labels=2, shares=(1.0, 1.0), noise=(0.1, 0.4))
        counts = np.ones(24)
        once = best_scales(Losses(labels, 2), {1.0: logits}, counts, np.arange(24), may_differ=True)
        again, more = np.tile(logits, (1, 3, 1)), Losses(np.tile(labels, 3), 2)
        rows = np.tile(np.arange(24), 3)
        assert best_scales(more, {1.0: again}, np.tile(counts, 3), rows, may_differ=True) == once
        num_other += best_scales(more, {1.0: again}, np.tile(counts, 3), np.arange(72), may_differ=True) != once
    assert num_other > 0  # with 72 rows some of these gains would be clear
