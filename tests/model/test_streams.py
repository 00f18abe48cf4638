"""What the fusion gets of images and sounds: shared ones, fewer tokens, and what each costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_config, make_model
from torch.utils.flop_counter import FlopCounterMode

from mm_transformers import Classification, MMTransformerConfig, Stream
from mm_transformers.model.fusion_cross_attention import CrossAttentionFusion
from mm_transformers.model.fusion_layers import StreamProjection
from mm_transformers.model.token_reduction import TokenMerging


TASKS = [Classification("topic", labels=["a", "b", "c"])]


@st.composite
def streams(draw):
    """Items, which of their tokens are padding, and rows that share or lack them; with the rows built by a loop."""
    num_items, length, width = draw(st.integers(1, 4)), draw(st.integers(1, 5)), 6
    rows, max_items = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tokens = torch.randn(num_items, length, width, generator=generator, dtype=torch.float64)
    token_mask = torch.rand(num_items, length, generator=generator) < 0.7 if draw(st.booleans()) else None
    index = torch.randint(-1, num_items, (rows, max_items), generator=generator)
    offsets = None
    if draw(st.booleans()):
        offsets = torch.randn(rows, max_items, width, generator=generator, dtype=torch.float64)
    states = torch.zeros(rows, max_items * length, width, dtype=torch.float64)
    mask = torch.zeros(rows, max_items * length, dtype=torch.bool)
    for row in range(rows):
        for slot in range(max_items):
            for place in range(length):
                item = index[row, slot]
                if item >= 0 and (token_mask is None or token_mask[item, place]):
                    at = slot * length + place
                    states[row, at] = tokens[item, place] + (0 if offsets is None else offsets[row, slot])
                    mask[row, at] = True
    return Stream("vision", tokens, token_mask, index, offsets), states, mask


@settings(deadline=None, max_examples=60)
@given(streams())
def test_rows_of_a_stream(case):
    stream, states, mask = case
    assert torch.equal(stream.mask, mask)
    assert torch.equal(stream.present, mask.any(-1))
    assert torch.equal(stream.hidden_states[mask], states[mask])
    # Once per item, or row by row: the same.
    layer = torch.nn.Linear(6, 3, dtype=torch.float64)
    assert torch.allclose(stream.each(layer)[mask], layer(states)[mask], atol=1e-12)
    rows = torch.arange(len(mask)).flip(0)
    assert torch.equal(stream.of_rows(rows).mask, mask[rows])
    assert torch.equal(stream.of_rows(rows).hidden_states[mask[rows]], states[rows][mask[rows]])


def flops(model, **inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_a_shared_image_is_encoded_and_projected_once():
    model = make_model(num_fusion_layers=2, tasks=TASKS).eval()
    size = model.config.vision_config.image_size
    ids = torch.randint(5, 30, (6, 7))
    images = torch.randn(2, 3, size, size)
    owners = torch.tensor([0, 0, 0, 1, 1, 1])
    shared = {"input_ids": ids, "pixel_values": images, "image_index": owners[:, None]}
    copied = {"input_ids": ids, "pixel_values": images[owners]}
    assert torch.allclose(model(**shared).logits["topic"], model(**copied).logits["topic"], atol=1e-5)
    # What is saved of each of the four other images: encoder, projection, and keys and values of both fusion layers.
    width, from_width = model.config.fusion_hidden_size, model.config.vision_config.hidden_size
    tokens = model.model.vision_model(images[:1]).last_hidden_state.shape[1]
    saved = flops(model.model.vision_model, pixel_values=images[:1])
    saved += 2 * tokens * from_width * width + 2 * (2 * 2 * tokens * width * width)
    assert flops(model, **copied) - flops(model, **shared) == 4 * saved


def make_fusion() -> CrossAttentionFusion:
    fusion = CrossAttentionFusion(make_config(fusion_dropout=0.0, num_fusion_layers=2), ["vision"], 32)
    with torch.no_grad():
        for name, parameter in fusion.named_parameters():
            parameter.copy_(torch.full((1,), 0.7) if "gate" in name else torch.randn(parameter.shape) / 4)
    return fusion


@pytest.mark.parametrize(
    "index",
    [
        [[0], [1], [2], [3]],
        [[0], [-1], [1], [2]],
        [[3], [0], [0], [-1]],
        [[0, 1], [-1, -1], [2, -1], [3, 3]],
        [[-1], [-1], [-1], [-1]],
    ],
    ids=["one each", "one lacks it", "shared", "several", "none"],
)
@pytest.mark.parametrize("extras", [False, True], ids=["", "with padded items and offsets"])
def test_training_gives_what_evaluation_gives(index, extras):
    """In training the cross-attention leaves out padding and rows without images, in evaluation it does not."""
    fusion, index = make_fusion(), torch.tensor(index)
    text_mask = torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    inputs = [torch.randn(4, 7, 32), torch.randn(4, 6, 32), torch.randn(4, index.shape[1], 32)]
    token_mask = torch.arange(6) < torch.tensor([6, 2, 4, 6])[:, None] if extras else None
    weights = torch.randn(4, 7, 32) * text_mask[..., None]
    found = []
    for training in (True, False):
        fusion.train(training).zero_grad()
        text, items, offsets = (x.clone().requires_grad_() for x in inputs)
        stream = Stream("vision", items, token_mask, index, offsets if extras else None)
        states = fusion(text, text_mask, [stream]).hidden_states
        (states * weights).sum().backward()
        used = [text, items, *fusion.parameters(), *([offsets] if extras else [])]
        found.append([states[text_mask], *(x.grad for x in used)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_padding_and_rows_without_images_cost_nothing_in_training():
    """Of them only the attention itself is computed, and for padding only."""
    fusion, width, images = make_fusion().train(), 32, torch.randn(2, 6, 32)

    def cost(lengths: list[int], padded_to: int, index: list[int]) -> int:
        mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
        stream = Stream("vision", images, None, torch.tensor(index)[:, None])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fusion(torch.randn(len(lengths), padded_to, width), mask, [stream])
        return counter.get_total_flops()

    no_padding = cost([3, 3], 3, [0, 1])
    attention = 2 * 2 * 2 * 2 * 6 * width  # layers, products, operations, rows, keys: of one query of each row
    assert cost([3, 3, 9], 9, [0, 1, -1]) == no_padding + 6 * attention


@pytest.mark.parametrize("frozen", [True, False])
def test_a_projection_is_a_norm_and_a_linear_layer(frozen):
    """Of features that need no gradient a third of the operations of the backward pass is saved."""
    projection = StreamProjection(make_config(), 24)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    features, weights = torch.randn(5, 6, 24, requires_grad=not frozen), torch.randn(5, 6, 32)
    with FlopCounterMode(display=False) as counter:
        tokens = projection(features)
        (tokens * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in projection.parameters()]
    projection.zero_grad()
    expected = projection.linear(projection.layer_norm(features))
    (expected * weights).sum().backward()
    torch.testing.assert_close(tokens, expected)
    for gradient, parameter in zip(gradients, projection.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-5)
    assert counter.get_total_flops() // (2 * 5 * 6 * 24 * 32) == (2 if frozen else 3)


def merged_by_hand(tokens: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
    """One image, token by token: (vector, size) pairs; every second one may join that of the others most like it."""
    left = [(token, 1) for token in tokens]
    while len(left) > num_tokens:
        movers, stayers = left[::2], left[1::2]
        pairs = []
        for i, (mover, _) in enumerate(movers):
            likeness = [torch.cosine_similarity(mover.float(), stayer.float(), dim=0).item() for stayer, _ in stayers]
            best = max(range(len(stayers)), key=lambda j: likeness[j])
            pairs.append((likeness[best], i, best))
        pairs.sort(reverse=True)
        chosen = pairs[: len(left) - num_tokens]
        sums = [(vector * size, size) for vector, size in stayers]
        for _, i, j in chosen:
            vector, size = movers[i]
            sums[j] = (sums[j][0] + vector * size, sums[j][1] + size)
        rest = [movers[i] for _, i, _ in pairs[len(chosen) :]]
        left = rest + [(total / size, size) for total, size in sums]
    return [vector for vector, _ in left]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_merging_is_what_a_loop_makes(length, num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, length, 8, generator=generator, dtype=torch.float64)
    merged = TokenMerging(None, num_tokens)(tokens)
    assert merged.shape == (3, min(length, num_tokens), 8)
    for image, given_back in zip(tokens, merged, strict=True):
        assert torch.allclose(given_back, torch.stack(merged_by_hand(image, num_tokens)), atol=1e-9)


@pytest.mark.parametrize(
    "reduction",
    [{"kind": "merge", "num_tokens": 2}, {"kind": "resampler", "num_tokens": 3}],
    ids=["merge", "resampler"],
)
class TestFewerTokens:
    def test_the_fusion_sees_as_many(self, reduction):
        model = make_model(tasks=TASKS, vision_token_reduction=reduction, attn_implementation="eager").eval()
        size = model.config.vision_config.image_size
        outputs = model(
            input_ids=torch.randint(5, 30, (2, 4)), pixel_values=torch.randn(2, 3, size, size), output_attentions=True
        )
        assert outputs.cross_attentions[0].shape[-1] == reduction["num_tokens"]

    def test_saved_and_loaded(self, reduction, tmp_path):
        model = make_model(tasks=TASKS, vision_token_reduction=reduction).eval()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert again.config.vision_token_reduction == reduction
        size = model.config.vision_config.image_size
        batch = {"input_ids": torch.randint(5, 30, (2, 4)), "pixel_values": torch.randn(2, 3, size, size)}
        for name, logits in model(**batch).logits.items():
            assert torch.equal(again(**batch).logits[name], logits)

    def test_every_parameter_learns(self, reduction):
        model = make_model(tasks=TASKS, vision_token_reduction=reduction).train()
        size = model.config.vision_config.image_size
        ids = torch.randint(5, 30, (3, 4))
        labels = {name: torch.zeros(3, dtype=torch.int64) for name in model.tasks}
        model(input_ids=ids, pixel_values=torch.randn(3, 3, size, size), labels=labels).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        # Without an image too, as DDP wants it.
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ({"kind": "prune", "num_tokens": 4}, "must be {'kind': 'merge' or 'resampler', 'num_tokens': ...}"),
        ({"kind": "merge"}, "has no num_tokens"),
        ({"kind": "merge", "num_tokens": 0}, "integers >= 1, but has num_tokens = 0"),
        (
            {"kind": "merge", "num_tokens": 4, "num_layers": 2},
            "takes num_tokens, integers >= 1, but",
        ),
    ],
)
def test_wrong_reductions_are_told(reduction, message):
    with pytest.raises(ValueError, match="vision_token_reduction") as error:
        MMTransformerConfig(vision_config=make_config().vision_config, vision_token_reduction=reduction)
    assert message in str(error.value)
