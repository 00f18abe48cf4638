"""Thresholds hold the truth as often as they promise; the references are loops over the definition."""

import math

import numpy as np
import pytest
import torch

from mm_transformers import Classification, MultiLabel, Regression
from mm_transformers.model.conformal import LEVELS, level_of, quantile_thresholds, risk_thresholds, stored


@pytest.mark.parametrize("num_rows", [0, 1, 9, 10, 57])
def test_the_threshold_is_the_smallest_that_covers_enough(num_rows):
    scores = np.random.default_rng(num_rows).normal(size=num_rows)
    for level, found in zip(LEVELS, quantile_thresholds(torch.tensor(scores)), strict=True):
        # Of n + 1 exchangeable scores, the last is at most the threshold with probability k / (n + 1).
        allowed = [s for s in scores if (scores <= s).sum() >= level * (num_rows + 1) - 1e-9]
        assert found == (min(allowed) if allowed else math.inf)


def test_too_few_rows_promise_nothing():
    thresholds = quantile_thresholds(torch.arange(9.0))
    assert thresholds[level_of(0.9)] == 8
    assert thresholds[level_of(0.905)] == math.inf


@pytest.mark.parametrize("num_rows", [3, 12])
def test_the_risk_of_missing_labels_is_controlled(num_rows):
    rng = np.random.default_rng(num_rows)
    scores, holds = rng.random((num_rows, 4)), rng.random((num_rows, 4)) < 0.4

    def risk(threshold):
        missed = [(row[own] > threshold).mean() if own.any() else 0.0 for row, own in zip(scores, holds, strict=True)]
        return num_rows / (num_rows + 1) * np.mean(missed) + 1 / (num_rows + 1)

    candidates = [-math.inf, *sorted(scores[holds])]
    for level, found in zip(LEVELS, risk_thresholds(torch.tensor(scores), torch.tensor(holds)), strict=True):
        allowed = [t for t in candidates if risk(t) <= 1 - level + 1e-9]
        assert found == (allowed[0] if allowed else math.inf)


def test_coverage_is_kept_over_many_splits():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        scores = rng.exponential(size=60)
        threshold = quantile_thresholds(torch.tensor(scores[:30]), [0.8])[0]
        covered.append((scores[30:] <= threshold).mean())
    assert np.mean(covered) == pytest.approx(25 / 31, abs=0.015)


def test_nothing_is_promised_by_answers_that_are_no_numbers():
    """A score of NaN is worse than all others; it was the threshold -1e30, and the interval [1e30, -1e30]."""
    scores = torch.tensor([0.1, math.nan, 0.2, math.nan])
    assert quantile_thresholds(scores, [0.4, 0.75]) == pytest.approx([0.2, math.inf])
    assert stored(quantile_thresholds(scores, [0.75])) == [None]
    holds = torch.ones(4, 1, dtype=torch.bool)
    expected = risk_thresholds(torch.where(scores.isnan(), 9.0, scores)[:, None], holds, [0.3, 0.7])
    assert expected[1] == 9
    assert risk_thresholds(scores[:, None], holds, [0.3, 0.7]) == [expected[0], math.inf]
    assert stored([math.nan]) == [None]


@pytest.mark.parametrize(
    "task", [Classification("a", labels=["x", "y"]), MultiLabel("a", labels=["x", "y"]), Regression("a")]
)
def test_an_answer_that_is_no_number_abstains(task):
    logits = torch.full((1,) if isinstance(task, Regression) else (1, 2), math.nan)
    answers = task.decode(logits)
    task.add_region(answers, logits, [0.5])
    assert answers[0]["abstain"] is True


def test_one_tag_is_answered_where_the_set_agrees():
    task = MultiLabel("a", labels=["x"])
    logits = torch.tensor([[9.0], [-0.5], [-9.0], [9.0]])
    answers = task.decode(logits)
    task.add_region(answers, logits, [0.7, 0.7, 0.7, math.inf])
    assert [answer["set"] for answer in answers] == [["x"], ["x"], [], ["x"]]
    assert [answer["abstain"] for answer in answers] == [False, True, False, True]


def test_stored_thresholds_are_never_smaller():
    values = [0.123456789, 12345.6789, 0.0, -0.000123456789, 1e-12, math.inf, -math.inf]
    found = stored(values)
    assert found[5] is None
    for value, kept in zip(values[:5], found, strict=False):
        assert value <= kept <= value + 2e-5 * abs(value)
    assert found[6] < -1e20


@pytest.mark.parametrize("coverage", [0, 1, -0.5, True, "0.9", math.nan])
def test_a_coverage_that_cannot_be_promised_is_refused(coverage):
    with pytest.raises(ValueError, match="coverage must be above 0 and at most 0.995"):
        level_of(coverage)


@pytest.mark.slow
def test_sets_are_those_of_crepes():
    crepes = pytest.importorskip("crepes")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=300)
    truth = np.array([rng.choice(5, p=row) for row in p])
    groups = rng.integers(0, 3, 300)
    known, new = slice(0, 200), slice(200, 300)
    theirs = crepes.ConformalClassifier().fit(1 - p[known][np.arange(200), truth[known]], bins=groups[known])
    sets = theirs.predict_set(1 - p[new], bins=groups[new], confidence=0.9, smoothing=False)
    for group in range(3):
        own = groups[known] == group
        scores = 1 - p[known][own, truth[known][own]]
        threshold = quantile_thresholds(torch.tensor(scores), [0.9])[0]
        there = groups[new] == group
        assert np.array_equal(1 - p[new][there] <= threshold, sets[there].astype(bool))
