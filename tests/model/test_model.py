"""The rules of the design that a model must keep, for every fusion kind."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    FUSION_KINDS,
    IMAGE_SIZE,
    VOCAB_SIZE,
    make_batch,
    make_config,
    make_model,
    make_tasks,
    open_gates,
    rows_of,
)
from torch import nn
from transformers.utils import logging as transformers_logging

from mm_transformers import (
    Classification,
    Fusion,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerModel,
    Regression,
    register_fusion,
)
from mm_transformers.model.fusion_base import FUSION_KINDS as REGISTERED


every_fusion = pytest.mark.parametrize("fusion", FUSION_KINDS)
# The same width as the text, or another, for which the fusion projects down and up.
every_width = pytest.mark.parametrize("width", [32, 16])


@pytest.mark.slow
@every_fusion
@every_width
def test_rule_1_each_row_answers_as_it_does_alone(fusion, width):
    model = make_model(fusion_type=fusion, fusion_hidden_size=width)
    batch = make_batch(labels=False)
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(4):
            alone = model(**rows_of(batch, [row])).logits
            for name, logits in alone.items():
                expected = together[name][row]
                if name == "entities":
                    expected = expected[: logits.shape[1]]
                torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-6)


@every_fusion
def test_rule_1_absent_images_leave_no_trace(fusion):
    """What a row without an image answers does not depend on the pixels of others, not even if those are NaN."""
    model = make_model(fusion_type=fusion)
    batch = make_batch(labels=False)
    with torch.no_grad():
        first = model.model(**batch).last_hidden_state[1]
        other = model.model(**{**batch, "pixel_values": batch["pixel_values"] * 100}).last_hidden_state[1]
        text_only = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(first, other)
    assert torch.equal(first, text_only.last_hidden_state[1])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    index=st.lists(st.lists(st.integers(-1, 2), min_size=2, max_size=2), min_size=2, max_size=4),
    fusion=st.sampled_from(FUSION_KINDS),
)
def test_rule_1_for_any_image_index(index, fusion):
    """Rows answer alike in any company; -1 may stand anywhere."""
    model = MODELS.setdefault(fusion, make_model(fusion_type=fusion))
    batch = make_batch(image_index=index, labels=False)
    with torch.no_grad():
        together = model.model(**batch).pooler_output
        for row in range(len(index)):
            images = [i for i in index[row] if i >= 0]
            alone = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            if images:
                pixels = torch.stack([batch["pixel_values"][i] for i in images])
                alone.update(pixel_values=pixels, image_index=torch.arange(len(images))[None])
            torch.testing.assert_close(model.model(**alone).pooler_output[0], together[row], rtol=1e-4, atol=1e-6)


MODELS: dict[str, MMTransformerForMultiTask] = {}


@every_fusion
@pytest.mark.parametrize("side", ["left", "right"])
def test_rule_1_padding_side_does_not_matter(fusion, side):
    model = make_model("t5", fusion_type=fusion)  # relative positions: the text may stand anywhere
    ids = torch.randint(5, VOCAB_SIZE, (1, 6), generator=torch.Generator().manual_seed(1))
    pixels = make_batch()["pixel_values"][:1]
    padding = torch.zeros(1, 4, dtype=torch.int64)
    parts = [padding, ids] if side == "left" else [ids, padding]
    mask = torch.cat([torch.zeros_like(p) if p is padding else torch.ones_like(p) for p in parts], dim=1)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        actual = model(input_ids=torch.cat(parts, dim=1), attention_mask=mask, pixel_values=pixels).logits
    torch.testing.assert_close(actual["topic"], expected["topic"], rtol=1e-4, atol=1e-5)


@every_fusion
@every_width
def test_rule_2_a_new_model_is_its_text_encoder(fusion, width):
    model = make_model(fusion_type=fusion, fusion_hidden_size=width, gates_open=False)
    batch = make_batch(labels=False)
    with torch.no_grad():
        expected = model.model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        actual = model.model(**batch).last_hidden_state
    assert torch.equal(actual, expected)


@every_fusion
@every_width
def test_rule_2_training_opens_the_gates(fusion, width):
    model = make_model(fusion_type=fusion, fusion_hidden_size=width, gates_open=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = make_batch()
    for step in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if step == 0:
            optimizer.step()
    gates = [p for name, p in model.named_parameters() if name.endswith("gate_alpha")]
    assert all(gate.item() != 0 for gate in gates)
    # At the first step only the gates learn; once they are open, everything does.
    reached = [name for name, p in model.model.vision_model.named_parameters() if p.grad.abs().max() > 0]
    assert reached


@every_fusion
def test_rule_3_tokens_see_tokens(fusion):
    """Which patches lie where decides, not only their mean; in late fusion, the baseline, the mean alone does."""
    model = make_model(vision="resnet", fusion_type=fusion)
    batch = make_batch(labels=False)
    states = 20 * torch.randn(3, 24, 4, 4, generator=torch.Generator().manual_seed(3))
    # The same mean over the patches, but all patches alike.
    other = states.mean((2, 3), keepdim=True).expand_as(states)

    def answer(features):
        class Encoder(nn.Module):
            dtype = torch.float32

            def forward(self, pixel_values):
                return type("Output", (), {"last_hidden_state": features})

        vision, projection = model.model.vision_model, model.model.vision_projection
        model.model.vision_model, model.model.vision_projection = Encoder(), Linear(projection)
        try:
            with torch.no_grad():
                return model.model(**batch).last_hidden_state
        finally:
            model.model.vision_model, model.model.vision_projection = vision, projection

    class Linear(nn.Module):
        # The layer norm of the projection is not linear, so it would not keep the mean.
        def __init__(self, projection):
            super().__init__()
            self.linear = projection.linear

        def forward(self, hidden_states):
            return self.linear(hidden_states)

    same = torch.allclose(answer(states)[0], answer(other)[0], atol=1e-4)
    assert same == (fusion == "late")


@pytest.mark.parametrize("fusion", ["cross_attention", "co_attention"])
def test_rule_3_cross_attention_is_over_patches(fusion):
    model = make_model(fusion_type=fusion, attn_implementation="eager")
    batch = make_batch(labels=False)
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True)
    patches = (IMAGE_SIZE // 8) ** 2 + 1
    assert len(outputs.cross_attentions) == 2
    for weights in outputs.cross_attentions:
        assert weights.shape == (4, 4, 9, 2 * patches)
        # Row 0 has two images, row 1 none, row 2 one, in the first slot.
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 9))
        assert (weights[1] == 0).all()
        assert (weights[2, :, :, patches:] == 0).all()
        # Not a weight of 1 on one vector.
        assert weights[2, :, :, :patches].max() < 0.9


@pytest.mark.parametrize("fusion", ["co_attention", "merged", "bottleneck"])
def test_rule_3_text_padding_is_masked_in_self_attention(fusion):
    model = make_model(fusion_type=fusion, attn_implementation="eager")
    batch = make_batch(labels=False)
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    padding = batch["attention_mask"] == 0
    for weights in attentions:
        keys = weights[..., :9].sum((1, 2))
        assert (keys[padding] == 0).all()
        assert (
            keys[~padding][batch["image_index"].max(1).values.repeat_interleave(9)[~padding.flatten()] >= 0] > 0
        ).all()


def test_cross_attention_layer_equals_the_formula():
    """One layer, one head, against attention written out."""
    model = make_model(num_fusion_layers=1, num_fusion_attention_heads=1)
    layer, batch = model.model.fusion.layers[0], make_batch(labels=False)
    with torch.no_grad():
        text = model.model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        images = model.model.vision_projection(model.model.vision_model(batch["pixel_values"]).last_hidden_state)
        actual = model.model(**batch).last_hidden_state
        for row, index in enumerate(batch["image_index"].tolist()):
            tokens = [images[i] for i in index if i >= 0]
            x = text[row]
            if tokens:
                keys, attention = torch.cat(tokens), layer.cross_attention
                q, k, v = attention.q_proj(layer.attention_norm(x)), attention.k_proj(keys), attention.v_proj(keys)
                weights = torch.softmax(q @ k.T / 32**0.5, dim=-1)
                x = x + torch.tanh(torch.tensor(0.7)) * attention.out_proj(weights @ v)
                hidden = nn.functional.gelu(layer.mlp.fc1(layer.mlp_norm(x)))
                x = x + torch.tanh(torch.tensor(0.7)) * layer.mlp.fc2(hidden)
            torch.testing.assert_close(actual[row], x, rtol=1e-4, atol=1e-5)


@every_fusion
def test_rule_4_loss_is_the_weighted_sum_of_means(fusion):
    """Against plain torch, row by row, with missing labels left out."""
    config = dict(fusion_type=fusion, regularization={"kind": "l2", "weight": 0.01})
    model, batch = make_model(**config), make_batch()
    outputs = model(**batch)
    logits, labels = outputs.logits, batch["labels"]
    ce, bce = nn.functional.cross_entropy, nn.functional.binary_cross_entropy_with_logits
    expected = {
        "topic": torch.stack([ce(logits["topic"][i], labels["topic"][i]) for i in (0, 1, 3)]).mean(),
        "sentiment": torch.stack([ce(logits["sentiment"][i], labels["sentiment"][i]) for i in (0, 2, 3)]).mean(),
        "tags": torch.stack([bce(logits["tags"][i], labels["tags"][i]) for i in (0, 2, 3)]).mean(),
        "score": torch.stack([(logits["score"][i] - labels["score"][i]) ** 2 for i in (0, 2, 3)]).mean(),
    }
    tokens = [(i, t) for i in range(4) for t in range(9) if labels["entities"][i, t] != -100]
    entities = [ce(logits["entities"][i, t], labels["entities"][i, t]) for i, t in tokens]
    expected["entities"] = torch.stack(entities).mean()
    squares = sum((p**2).sum() for name, p in model.heads.named_parameters() if "bias" not in name)
    expected["regularization"] = 0.01 * squares
    assert outputs.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs.losses[name], value)
    weights = {"sentiment": 0.5, "entities": 2.0}
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    torch.testing.assert_close(outputs.loss, total)


@every_fusion
def test_rule_4_task_without_labels_adds_nothing(fusion):
    model, batch = make_model(fusion_type=fusion).train(), make_batch()
    batch["labels"] = {
        name: torch.full_like(v, float("nan") if v.is_floating_point() else -100) for name, v in batch["labels"].items()
    }
    outputs = model(**batch)
    assert outputs.loss.item() == 0
    outputs.loss.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
    # The same if the task is not mentioned at all.
    model.zero_grad()
    outputs = model(**{**batch, "labels": {"topic": torch.tensor([0, 1, 2, 0])}})
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, outputs.losses["topic"])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_fusion
def test_rule_4_accumulation_equals_one_big_batch(fusion):
    """Labels are spread unevenly over the parts, so means of means would be wrong."""
    model = make_model(fusion_type=fusion, regularization={"kind": "l2", "weight": 0.1})
    batch = make_batch()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    counts = {name: model.tasks[name].num_labelled(value) for name, value in batch["labels"].items()}
    counts["regularization"] = torch.tensor(2.0)
    for rows in ([0, 1, 2], [3]):
        part = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "image_index")}
        part["labels"] = {name: value[rows] for name, value in batch["labels"].items()}
        model(**part, pixel_values=batch["pixel_values"], num_items_in_batch=counts).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@every_fusion
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_rule_5_every_parameter_takes_part_without_images(fusion, vision):
    model = make_model(vision=vision, fusion_type=fusion).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = make_batch(image_index=[[-1]] * 4)
    del batch["pixel_values"]
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all((p.grad == 0).all() for p in model.model.vision_model.parameters())
    # Running statistics have not seen a blank image.
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(m.training for m in model.modules())


@every_fusion
def test_rule_6_evaluation_holds_the_logits_only(fusion):
    model, batch = make_model(fusion_type=fusion), make_batch(labels=False)
    with torch.no_grad():
        assert list(model(**batch).keys()) == ["logits"]
        outputs = model.model(**batch)
        # What the encoders gave is there for tasks that compare or fuse anew; it goes no further than the model.
        assert list(outputs.keys()) == ["last_hidden_state", "pooler_output", "attention_mask", "encoded"]
        states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == (2 if fusion == "late" else 3)
    assert all(s.shape == (4, 9, 32) for s in states)


@every_fusion
def test_rule_9_attention_implementations_agree(fusion):
    eager, batch = make_model(fusion_type=fusion, attn_implementation="eager"), make_batch()
    sdpa = make_model(fusion_type=fusion, attn_implementation="sdpa")
    assert eager.model.fusion.config._attn_implementation == "eager"
    assert sdpa.model.fusion.config._attn_implementation == "sdpa"
    sdpa.load_state_dict(eager.state_dict())
    first, second = eager(**batch), sdpa(**batch)
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-5, atol=1e-6)
    for name in first.logits:
        torch.testing.assert_close(first.logits[name], second.logits[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_fusion
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rule_9_gradient_checkpointing_agrees(fusion, use_reentrant):
    model, batch = make_model(fusion_type=fusion, fusion_dropout=0.0), make_batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is None and use_reentrant and "vision_model" in name:
            continue  # no input of a vision tower requires a gradient, which reentrant checkpointing needs
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@every_fusion
def test_rule_9_compiles_without_a_graph_break(fusion):
    model, batch = make_model(fusion_type=fusion), make_batch()
    torch._dynamo.reset()
    # Not `fullgraph=True`, which forbids breaks but also permits what breaks the graph without it.
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    batch["image_index"] = batch["image_index"] + 1
    with pytest.raises(RuntimeError, match="image_index must hold numbers from -1 \\(none\\) to the number"):
        compiled(**batch)


@pytest.mark.slow
@every_fusion
def test_rule_9_exports(fusion):
    model, batch = make_model(fusion_type=fusion), make_batch(labels=False)
    exported = torch.export.export(model, (), batch, strict=False).module()
    expected = model(**batch).logits
    for name, logits in exported(**batch)["logits"].items():
        torch.testing.assert_close(logits, expected[name])


def test_rule_9_attentions_that_cannot_be_given_are_told(caplog):
    transformers_logging.get_logger().addHandler(caplog.handler)
    transformers_logging.warning_once.cache_clear()  # another test may have seen it in this process
    try:
        outputs = make_model()(**make_batch(), output_attentions=True)
    finally:
        transformers_logging.get_logger().removeHandler(caplog.handler)
    assert outputs.cross_attentions is None
    assert "attn_implementation='sdpa' returns no attentions; load the model with" in caplog.text


@pytest.mark.slow
@every_fusion
def test_rule_9_half_precision_keeps_the_gates(fusion, tmp_path):
    make_model(fusion_type=fusion).save_pretrained(tmp_path)
    model = MMTransformerForMultiTask.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith("gate_alpha") else torch.bfloat16), name
    outputs = model(**make_batch())
    assert outputs.logits["topic"].dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.isfinite()


def test_modality_dropout_is_per_row_and_in_training_only():
    torch.manual_seed(0)
    model = make_model(modality_dropout=0.5, fusion_dropout=0.0)
    batch = make_batch(labels=False)
    rows = torch.arange(200) % 4
    big = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "image_index")}
    big["pixel_values"] = batch["pixel_values"]
    with torch.no_grad():
        model.eval()
        text_only = model.model(input_ids=big["input_ids"], attention_mask=big["attention_mask"]).pooler_output
        full = model.model(**big).pooler_output
        model.train()
        model.model.text_model.eval()  # its dropout is not what is looked at
        model.model.vision_model.eval()
        mixed = model.model(**big).pooler_output
    has_image = rows != 1
    dropped = torch.isclose(mixed, text_only, atol=1e-5).all(-1)[has_image]
    kept = torch.isclose(mixed, full, atol=1e-5).all(-1)[has_image]
    assert (dropped | kept).all()
    assert 0.3 < dropped.float().mean() < 0.7


@pytest.mark.parametrize(("change", "message"), [
    ({"image_index": torch.tensor([[0, 3]] * 4)}, "image_index must hold numbers from -1"),
    ({"image_index": torch.tensor([[0, -2]] * 4)}, "image_index must hold numbers from -1"),
    ({"image_index": torch.tensor([[0]])}, r"shape \(batch, max_images\)"),
    ({"image_index": torch.tensor([0, 1, 2, 0])}, r"shape \(batch, max_images\)"),
    ({"image_index": None}, "Got 3 images for 4 rows"),
    ({"pixel_values": None}, "image_index must hold numbers from -1"),
    ({"labels": {"colour": torch.tensor([0] * 4)}}, "labels has 'colour', but the tasks of this model are topic"),
])  # fmt: skip
def test_bad_input_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message) as error:
        make_model()(**{**make_batch(), **change})
    assert "\n" not in str(error.value)


def test_images_for_a_model_without_eyes():
    model = make_model(vision=None)
    with pytest.raises(ValueError, match="no vision encoder"):
        model(**make_batch(labels=False))
    batch = make_batch()
    del batch["pixel_values"], batch["image_index"]
    model.train()(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_model_without_tasks_says_so():
    with pytest.raises(ValueError, match="needs tasks"):
        MMTransformerForMultiTask(make_config(tasks=[]))


def test_image_index_may_be_left_out():
    model, batch = make_model(), make_batch(num_images=4, labels=False)
    explicit = model(**{**batch, "image_index": torch.arange(4)[:, None]}).logits["topic"]
    del batch["image_index"]
    assert torch.equal(model(**batch).logits["topic"], explicit)


def test_shared_images_are_encoded_once():
    model = make_model()
    seen = []
    model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    model(**make_batch(num_images=1, image_index=[[0]] * 4, labels=False))
    assert seen == [1]


def test_an_own_fusion_kind_in_one_class(tmp_path):
    @register_fusion
    class AddedMean(Fusion):
        """Adds the mean of the image tokens."""

        kind = "added_mean"

        def __init__(self, config, stream_names, text_hidden_size, scale=1.0):
            super().__init__(config, stream_names, text_hidden_size)
            self.scale = nn.Parameter(torch.zeros(1))
            self.factor = scale

        def init_own_parameters(self, std):
            nn.init.zeros_(self.scale)

        def fuse(self, text_states, text_mask, streams, record):
            (stream,) = streams
            weights = stream.mask[..., None].float()
            mean = (stream.hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
            return text_states + self.factor * self.scale * mean[:, None]

    try:
        model = make_model(fusion_type="added_mean", fusion_kwargs={"scale": 2.0})
        model.save_pretrained(tmp_path)
        loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
        assert type(loaded.model.fusion) is AddedMean
        assert loaded.model.fusion.factor == 2.0
        batch = make_batch()
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
        with pytest.raises(ValueError, match="no option 'skale' in fusion_kwargs; its options are scale"):
            make_config(fusion_type="added_mean", fusion_kwargs={"skale": 2.0})
    finally:
        REGISTERED.pop("added_mean")


def test_fusion_kind_that_is_taken_says_so():
    with pytest.raises(ValueError, match="already taken by LateFusion"):

        @register_fusion
        class Mine(Fusion):
            kind = "late"

    with pytest.raises(ValueError, match="needs a class attribute `kind`"):

        @register_fusion
        class Nameless(Fusion):
            pass


def test_bottleneck_latents_are_an_option():
    assert make_model(fusion_type="bottleneck", fusion_kwargs={"num_latents": 7}).model.fusion.latents.weight.shape == (
        7,
        32,
    )
    with pytest.raises(ValueError, match="num_latents in fusion_kwargs must be an integer >= 1"):
        make_model(fusion_type="bottleneck", fusion_kwargs={"num_latents": 0})


@every_fusion
def test_more_than_one_stream(fusion):
    """Fusions take any number of streams, of which each row may lack any: what a later modality needs."""
    from mm_transformers.model.fusion import Stream, fusion_class

    torch.manual_seed(0)
    config = make_config(fusion_type=fusion)
    config._attn_implementation = "eager"
    module = fusion_class(fusion, {})(config, ["vision", "audio"], 32).eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    text, mask = torch.randn(3, 5, 32), torch.ones(3, 5, dtype=torch.bool)
    vision, audio = torch.randn(3, 4, 32), torch.randn(3, 7, 32)
    has_vision, has_audio = torch.tensor([True, True, False]), torch.tensor([True, False, False])

    def fuse(rows, names):
        streams = {
            "vision": Stream("vision", vision[rows], has_vision[rows, None].expand(-1, 4)),
            "audio": Stream("audio", audio[rows], has_audio[rows, None].expand(-1, 7)),
        }
        return module(text[rows], mask[rows], [streams[name] for name in names]).hidden_states

    with torch.no_grad():
        both = fuse([0, 1, 2], ["vision", "audio"])
        torch.testing.assert_close(fuse([1], ["vision"])[0], both[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(both[2], text[2])
        assert not torch.allclose(fuse([0], ["vision"])[0], both[0], atol=1e-3)


def test_forward_takes_input_ids_first():
    for cls in (MMTransformerModel, MMTransformerForMultiTask):
        assert list(inspect.signature(cls.forward).parameters)[1] == cls.main_input_name == "input_ids"


def test_l1_regularization():
    model = make_model(regularization={"kind": "l1", "weight": 0.5})
    weights = [p for name, p in model.heads.named_parameters() if "bias" not in name]
    expected = 0.5 * sum(p.abs().sum() for p in weights)
    torch.testing.assert_close(model(**make_batch()).losses["regularization"], expected)


def test_answers_in_words():
    model, batch = make_model(), make_batch(labels=False)
    answers = model.decode(model(**batch))
    assert len(answers) == 4
    logits = model(**batch).logits
    labels = ["animals", "food", "travel"]
    for row, answer in enumerate(answers):
        assert list(answer) == ["topic", "sentiment", "tags", "score", "entities"]
        assert answer["topic"]["label"] == labels[logits["topic"][row].argmax()]
        assert answer["score"]["value"] == pytest.approx(logits["score"][row].item())


def test_several_tasks_of_each_kind():
    tasks = [
        Classification("a", labels=["x", "y"]),
        Classification("b", labels=["x", "y", "z"]),
        Regression("c"),
        Regression("d"),
    ]
    model = make_model(tasks=tasks)
    labels = {"a": torch.tensor([0, 1, 0, 1]), "b": torch.tensor([2, 1, 0, 1]), "c": torch.ones(4), "d": torch.zeros(4)}
    outputs = model(**{**make_batch(labels=False), "labels": labels})
    assert {name: tuple(v.shape) for name, v in outputs.logits.items()} == {
        "a": (4, 2),
        "b": (4, 3),
        "c": (4,),
        "d": (4,),
    }
    torch.testing.assert_close(outputs.loss, sum(outputs.losses.values()))


def test_text_only_config_and_default():
    assert MMTransformerConfig().text_config.model_type == "bert"
    assert MMTransformerConfig().modalities == []
    assert make_config().modalities == ["vision"]
    assert len(make_tasks()) == len(make_config().get_tasks())


def test_open_gates_matter():
    """The other tests look at models with open gates: behind closed ones they would see nothing."""
    model, batch = make_model(gates_open=False), make_batch(labels=False)
    closed = model(**batch).logits["topic"]
    open_gates(model)
    assert not torch.allclose(model(**batch).logits["topic"][0], closed[0], atol=1e-4)


def test_arguments_that_nobody_takes_are_told():
    model, batch = make_model(), make_batch()
    batch["pixel_value"] = batch.pop("pixel_values")
    for called in (model, model.model):
        with pytest.raises(TypeError, match="takes no argument 'pixel_value'; did you mean 'pixel_values'"):
            called(**{name: value for name, value in batch.items() if name != "labels" or called is model})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("score", lambda labels: labels[:, None]),
        ("topic", lambda labels: labels[:, None]),
        ("tags", lambda labels: labels[:, :1]),
        ("entities", lambda labels: labels[:, :-1]),
        ("topic", lambda labels: labels[:-1]),
    ],
)
def test_labels_of_another_shape_are_told(name, change):
    model, batch = make_model(), make_batch()
    batch["labels"][name] = change(batch["labels"][name])
    with pytest.raises(ValueError, match=rf"labels\['{name}'\] must have the shape"):
        model(**batch)
