"""How relevance goes through attentions, against matrices written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_transformers.analysis.explaining.relevance import Chefer, LastLayer, Relevance, Rollout, follow
from mm_transformers.model.fusion_base import AttentionStep


def weights(rng, queries: int, keys: int, batch: int = 1) -> torch.Tensor:
    values = torch.tensor(rng.random((batch, queries, keys)), dtype=torch.float64)
    return values / values.sum(-1, keepdim=True)


def start(**lengths: int) -> Relevance:
    return Relevance({name: torch.eye(n, dtype=torch.float64)[None] for name, n in lengths.items()})


def normalized(matrix: np.ndarray) -> np.ndarray:
    """Rows of what was added to the identity sum to 1; rows to which nothing was added are those of the identity."""
    result = np.eye(len(matrix))
    for i, row in enumerate(matrix - np.eye(len(matrix))):
        if row.sum() > 0:
            result[i] += row / row.sum()
    return result


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_chefer_is_equations_6_to_11(seed, num_words, num_patches):
    """Of a text and a picture: what each adds is worked out from what was there before any of it is assigned."""
    rng = np.random.default_rng(seed)
    text_self, image_self = weights(rng, num_words, num_words), weights(rng, num_patches, num_patches)
    text_cross, image_cross = weights(rng, num_words, num_patches), weights(rng, num_patches, num_words)
    steps = [
        AttentionStep(("text",), ("text",), text_self),
        AttentionStep(("text",), ("vision",), text_cross),
        AttentionStep(("vision",), ("vision",), image_self),
        AttentionStep(("vision",), ("text",), image_cross),
    ]
    found = follow(start(text=num_words, vision=num_patches), [steps, steps], Chefer())

    r_tt, r_ii = np.eye(num_words), np.eye(num_patches)
    r_ti, r_it = np.zeros((num_words, num_patches)), np.zeros((num_patches, num_words))
    a_tt, a_ii, a_ti, a_it = (x[0].numpy() for x in (text_self, image_self, text_cross, image_cross))
    for _ in range(2):
        before_tt, before_ii, before_ti, before_it = r_tt, r_ii, r_ti, r_it
        r_tt, r_ti = r_tt + a_tt @ r_tt, r_ti + a_tt @ r_ti
        r_ti, r_tt = r_ti + normalized(r_tt).T @ a_ti @ normalized(before_ii), r_tt + a_ti @ before_it
        r_ii, r_it = r_ii + a_ii @ r_ii, r_it + a_ii @ r_it
        r_it, r_ii = r_it + normalized(r_ii).T @ a_it @ normalized(before_tt), r_ii + a_it @ before_ti
    for (queries, inputs), expected in {
        ("text", "text"): r_tt, ("text", "vision"): r_ti, ("vision", "text"): r_it, ("vision", "vision"): r_ii,
    }.items():  # fmt: skip
        np.testing.assert_allclose(found.of([queries], [inputs])[0].numpy(), expected, rtol=1e-9)


def test_nothing_read_leaves_the_identity():
    """The published code divides zero by zero here."""
    empty = AttentionStep(("text",), ("vision",), torch.zeros(1, 3, 4, dtype=torch.float64))
    found = follow(start(text=3, vision=4), [[empty]], Chefer())
    assert torch.equal(found.matrix, torch.eye(7, dtype=torch.float64)[None])


def test_rollout_is_the_product_of_half_identity_and_half_attention():
    rng = np.random.default_rng(0)
    layers = [weights(rng, 4, 4) for _ in range(3)]
    found = follow(start(text=4), [[AttentionStep(("text",), ("text",), x)] for x in layers], Rollout())
    expected = np.eye(4)
    for layer in layers:
        expected = (np.eye(4) + layer[0].numpy()) / 2 @ expected
    np.testing.assert_allclose(found.matrix[0].numpy(), expected)
    assert found.matrix.sum(-1).allclose(torch.ones(1, 4, dtype=torch.float64))


def test_the_last_layer_alone():
    rng = np.random.default_rng(0)
    first, last = weights(rng, 3, 3), weights(rng, 3, 5)
    steps = [[AttentionStep(("text",), ("text",), first)], [AttentionStep(("text",), ("vision",), last)]]
    found = follow(start(text=3, vision=5), steps, LastLayer())
    assert torch.equal(found.of(["text"], ["text"]), torch.eye(3, dtype=torch.float64)[None])
    assert torch.equal(found.of(["text"], ["vision"]), last)


@pytest.mark.parametrize("rule", [Chefer(), Rollout(), LastLayer()])
def test_latents_carry_what_they_read(rule):
    """Text never sees the picture but through latents, which have nothing of their own."""
    rng = np.random.default_rng(0)
    layer = [
        AttentionStep(("vision", "latents"), ("vision", "latents"), weights(rng, 6, 6)),
        AttentionStep(("text", "latents"), ("text", "latents"), weights(rng, 5, 5)),
    ]
    found = follow(start(text=3, vision=4), [layer], rule)
    assert found.matrix.shape == (1, 3 + 4 + 2, 3 + 4)
    assert (found.of(["text"], ["vision"]) > 0).all()
    assert (found.of(["vision"], ["text"]) == 0).all(), "pictures see no text in this layer"
