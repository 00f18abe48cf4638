"""
Under FlashAttention a row answers as under any other implementation. Its kernels need a GPU; here a loop over the rows
stands in for the one that takes sequences of different lengths, with its arguments and its limits: each query of row i,
`cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]`, sees the keys of that row, of which there must be one.
"""

import pytest
import torch
from tiny import make_image, make_model, make_processor
from transformers import modeling_flash_attention_utils


ROWS = {
    "text": ["a cat sat on the mat", "red", "the sun is very lovely over the river", "", "rain"],
    "images": [[make_image(1), make_image(2)], [make_image(1)], None, make_image(3), [make_image(4)] * 3],
}


def attend_in_a_loop(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
    """(tokens, heads, width) each -> (queries, heads, width)"""
    rows = []
    for i in range(len(cu_seqlens_q) - 1):
        of_row = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys, values = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
        assert len(of_row) <= max_seqlen_q
        assert 0 < len(keys) <= max_seqlen_k
        weights = (torch.einsum("qhd,khd->hqk", of_row, keys) * softmax_scale).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(rows)


def attend_all(q, k, v, softmax_scale):
    """(batch, tokens, heads, width) each"""
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def wanted_options(softmax_scale, is_causal, dropout, max_seqlen_q=None, max_seqlen_k=None, **rest):
    assert not is_causal
    assert dropout == 0.0
    lengths = {} if max_seqlen_q is None else {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    return {"softmax_scale": softmax_scale, **lengths}


def use(monkeypatch, of_different_lengths) -> None:
    """Puts it in the place of the kernel; releases of transformers differ in what else they look for."""
    kernels = (attend_all, of_different_lengths, None, None, None)
    has_paged_options = hasattr(modeling_flash_attention_utils, "_process_with_kvcache_kwargs_fn")
    functions = (kernels, (wanted_options, None) if has_paged_options else wanted_options)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda implementation: functions)


@pytest.fixture
def flash(monkeypatch):
    use(monkeypatch, attend_in_a_loop)


@pytest.mark.parametrize("kind", ["cross_attention", "co_attention", "bottleneck", "merged"])
@pytest.mark.parametrize(
    "reduction",
    [None, {"kind": "merge", "num_tokens": 2}, {"kind": "resampler", "num_tokens": 2}],
    ids=["all tokens", "merged", "resampled"],
)
def test_answers_and_gradients_are_those_of_plain_attention(flash, kind, reduction):
    """Several images, one, none, no text; images with more and with fewer tokens than the text has."""
    model = make_model(fusion_type=kind, vision_token_reduction=reduction)
    inputs = make_processor()(**ROWS)
    found = {}
    for implementation in ("eager", "flash_attention_2"):
        # Not by `set_attn_implementation`, which asks for the package; the encoders stay as they are.
        model.config._attn_implementation_internal = implementation
        model.zero_grad()
        logits = model(**inputs).logits
        sum(
            (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum() for values in logits.values()
        ).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[implementation] = logits, gradients
    (expected, expected_gradients), (logits, gradients) = found.values()
    for name, values in expected.items():
        torch.testing.assert_close(logits[name], values, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_only_keys_that_may_be_seen_are_read(flash, monkeypatch):
    """Of the tokens of absent images none but one is read, so that its row has a key."""
    model = make_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    inputs = make_processor()(**ROWS)
    num_tokens = model.model(**inputs).encoded["vision"].hidden_states.shape[1] // 3  # as many images has the last row
    read = []

    def counting(q, k, v, **options):
        read.append(len(k))
        return attend_in_a_loop(q, k, v, **options)

    use(monkeypatch, counting)
    model(**inputs)
    assert read == [(2 + 1 + 1 + 3) * num_tokens + 1] * model.config.num_fusion_layers
