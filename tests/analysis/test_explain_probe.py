"""Explanations of heads with a linear probe: what it adds to an answer, against sums written out by hand."""

import numpy as np
import pytest
import torch
from cases import first_quickly
from probes import make_probed, set_probes
from tiny import FUSION_KINDS, make_batch, make_image, make_processor, open_gates

from mm_transformers.analysis import explain
from mm_transformers.analysis.explaining import integrated_gradients
from mm_transformers.analysis.explaining.methods import ATTENTION_METHODS
from mm_transformers.analysis.explaining.probe_relevance import ProbeReading
from mm_transformers.analysis.explaining.recording import watched


pytestmark = pytest.mark.usefixtures("without_shares")
ROW = {"text": "a cat sat on the mat", "image": make_image(1)}
BY_GRADIENTS = ["chefer", "gradient_attention"]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def tokens(explanation) -> np.ndarray:
    return np.array([token.relevance for token in explanation.tokens])


def patches(explanation) -> np.ndarray:
    return np.concatenate([image.patches.flatten() for image in explanation.images])


def relevances(explanation) -> np.ndarray:
    return np.concatenate([tokens(explanation), *([patches(explanation)] if explanation.images else [])])


def encoder_outputs(model, row, processor) -> dict[str, torch.Tensor]:
    """Of one text and one picture, (tokens, width) each; feature maps place by place."""
    inputs = processor(text=[row["text"]], images=[row["image"]])
    with torch.no_grad():
        text = model.model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        vision = model.model.vision_model(pixel_values=inputs["pixel_values"])
    states = vision.last_hidden_state[0]
    return {"text": text.last_hidden_state[0], "vision": states.flatten(1).T if states.ndim == 3 else states}


def parts_by_hand(states: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """(tokens, width), (width,) -> (tokens,): what each token adds to the weights times the unit-length mean."""
    return (states @ weights / (len(states) * states.mean(0).norm())).detach().numpy()


@pytest.mark.parametrize("kind", FUSION_KINDS)
@pytest.mark.parametrize("task", ["topic", "score", "entities"])
def test_parts_sum_to_what_the_probe_says(kind, task):
    """Of rows with two pictures, none, a shared one; a row without a text adds nothing through it."""
    model, batch = make_probed(fusion_type=kind), make_batch(labels=False)
    batch["attention_mask"][3] = 0
    head = getattr(model.heads, task)
    with watched(model) as seen:
        outputs = model.model(**batch, output_attentions=True)
        logits = model(encoder_outputs=outputs).logits[task]
        logits = logits[:, None] if task == "score" else logits
        answers = logits[..., 0] if task != "entities" else logits[:, 2, 0]
        features = [features for _, features in seen.probes]
        gradients = torch.autograd.grad(answers.sum(), features, allow_unused=True, retain_graph=True)
        reading = ProbeReading.of(seen, gradients)
        assert reading.probe is head.probe
        parts = reading.parts(seen, outputs.encoded)
    says = head.probe(outputs)[:, 2, 0] if task == "entities" else head.probe(outputs)[..., 0]
    rows = range(4)
    is_there = {"text": torch.tensor([row != 3 for row in rows]), "vision": batch["image_index"].max(1).values >= 0}
    rest = head.probe.linear.bias[0].expand(4)
    for name, (_, column) in zip(head.probe.widths, head.probe.blocks, strict=True):
        rest = rest + head.probe.linear.weight[0, column] * is_there[name]
        assert not parts[name][~is_there[name]].any(), "nothing is added by what is not there"
    total = sum(values.flatten(1).sum(1) for values in parts.values())
    torch.testing.assert_close(total + rest, says, rtol=1e-4, atol=1e-5)
    assert not parts["text"][batch["attention_mask"] == 0].any()
    if task == "entities":
        assert (parts["text"] != 0).sum() == 3, "a word reads its own text token"


@pytest.mark.parametrize("kind", FUSION_KINDS)
@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_behind_closed_gates_the_probe_alone_is_followed(kind, method, processor):
    """Tokens of a convolutional encoder stand for their places: these have the positive parts and nothing else."""
    model = make_probed(fusion_type=kind, vision="resnet", gates_open=False)
    explanation = explain(model, processor, ROW, "topic", method)
    label = model.tasks["topic"].labels.index(explanation.answer)
    probe, states = model.heads.topic.probe, encoder_outputs(model, ROW, processor)
    expected = {
        name: parts_by_hand(states[name], probe.linear.weight[label, block]).clip(min=0)
        for name, (block, _) in zip(probe.widths, probe.blocks, strict=True)
    }
    np.testing.assert_allclose(patches(explanation), expected["vision"], rtol=1e-3, atol=1e-6)
    assert patches(explanation).any()
    if method == "gradient_attention":  # which does not look into the encoders
        np.testing.assert_allclose(tokens(explanation), expected["text"], rtol=1e-3, atol=1e-6)
    else:
        # Half of each token is itself, as the rule of Chefer et al. has it; the rest is where it looked.
        assert (tokens(explanation) >= expected["text"] - 1e-6).all()
        np.testing.assert_allclose(tokens(explanation).sum(), 2 * expected["text"].sum(), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUSION_KINDS)
@pytest.mark.parametrize("method", BY_GRADIENTS)
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_a_modality_without_weights_has_no_relevance(kind, method, vision, processor):
    model = make_probed(fusion_type=kind, vision=vision, gates_open=False)
    assert patches(explain(model, processor, ROW, "topic", method)).any()
    set_probes(model, vision=0.0)
    found = explain(model, processor, ROW, "topic", method)
    assert not patches(found).any()
    assert tokens(found).any()
    open_gates(model)
    labels = model.tasks["topic"].labels
    found = [explain(model, processor, ROW, "topic", method, answer=label) for label in labels]
    assert any(patches(one).any() for one in found), "the fusion is another way to the picture"
    set_probes(model, vision=1.0, text=0.0)
    assert patches(explain(model, processor, ROW, "topic", method)).any()
    open_gates(model, 0.0)
    found = explain(model, processor, ROW, "topic", method)
    assert not tokens(found).any()
    assert patches(found).any()


@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_relevance_is_the_sum_of_both_ways(method, processor):
    """That of the probe is the same behind closed gates, that of the fusion the same without weights of the probe."""
    model = make_probed(vision="resnet", fusion_type="cross_attention")
    both = explain(model, processor, ROW, "topic", method, answer="food")
    open_gates(model, 0.0)
    probe_alone = explain(model, processor, ROW, "topic", method, answer="food")
    set_probes(model, vision=0.0, text=0.0)
    open_gates(model)
    fusion_alone = explain(model, processor, ROW, "topic", method, answer="food")
    np.testing.assert_allclose(patches(both), patches(probe_alone) + patches(fusion_alone), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", first_quickly(FUSION_KINDS))
@pytest.mark.parametrize("method", ATTENTION_METHODS)
@pytest.mark.parametrize("task", first_quickly(["topic", "entities"]))
def test_rows_do_not_disturb_each_other(kind, method, task, processor):
    shared = make_image(2)
    rows = [
        {"text": "a cat", "image": shared},
        {"text": "the dog ran to the park and sat down", "image": [make_image(3), shared]},
        {"text": "no picture at all"},
        *([] if task == "entities" else [{"image": shared}]),
    ]
    model = make_probed(fusion_type=kind)
    together = explain(model, processor, rows, task, method)
    for row, found in zip(rows, together, strict=True):
        alone = explain(model, processor, row, task, method)
        np.testing.assert_allclose(relevances(found), relevances(alone), rtol=1e-3, atol=1e-7)
        assert (relevances(found) >= 0).all()
        assert relevances(found).any()


@pytest.mark.parametrize("kind", ["cross_attention", "merged"])
@pytest.mark.parametrize("method", ["rollout", "attention"])
def test_without_gradients_probe_and_fusion_count_alike(kind, method, processor):
    model = make_probed(fusion_type=kind, vision="resnet")
    both = explain(model, processor, ROW, "topic", method)
    set_probes(model, vision=0.0, text=0.0)
    fusion_alone = explain(model, processor, ROW, "topic", method)
    of_probe = relevances(both) - relevances(fusion_alone)
    assert (of_probe > -1e-6).all()
    assert of_probe.sum() == pytest.approx(1, rel=1e-4)
    assert 0 < relevances(fusion_alone).sum() < 1 + 1e-4


def test_a_model_of_text_alone(processor):
    model = make_probed(vision=None)
    found = explain(model, processor, {"text": ROW["text"]}, "topic")
    assert tokens(found).max() > 0


@pytest.mark.parametrize("reduction", [{"kind": "merge", "num_tokens": 5}, {"kind": "resampler", "num_tokens": 3}])
def test_the_probe_reads_all_patches_where_the_fusion_reads_fewer_tokens(reduction, processor):
    model = make_probed(vision_token_reduction=reduction, gates_open=False)
    closed = explain(model, processor, ROW, "topic")
    plain = explain(make_probed(gates_open=False), processor, ROW, "topic", answer=closed.answer)
    set_probes(model)
    assert patches(closed).shape == patches(plain).shape == (16,)
    assert patches(closed).any()
    open_gates(model)
    assert (patches(explain(model, processor, ROW, "topic")) > 0).all()


def test_half_precision_and_frozen_encoders(processor):
    expected = explain(make_probed(), processor, ROW, "topic")
    frozen = explain(make_probed(freeze=["text", "vision"]), processor, ROW, "topic")
    np.testing.assert_allclose(relevances(frozen), relevances(expected), rtol=1e-4, atol=1e-7)
    half = explain(make_probed().to(torch.bfloat16), processor, ROW, "topic", answer=expected.answer)
    assert np.corrcoef(relevances(half), relevances(expected))[0, 1] > 0.95


def test_adapters_are_looked_through(processor):
    peft = pytest.importorskip("peft")
    model = make_probed()
    expected = explain(model, processor, ROW, "topic")
    lora = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=model.new_modules)
    found = explain(peft.get_peft_model(model, lora), processor, ROW, "topic")
    np.testing.assert_allclose(relevances(found), relevances(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", first_quickly(FUSION_KINDS))
def test_integrated_gradients_sum_to_the_difference(kind, processor, monkeypatch):
    pytest.importorskip("captum")
    # Few steps leave an error of the integral; how many are enough is not what is tested here.
    monkeypatch.setattr(integrated_gradients, "NUM_STEPS", (100,))
    model = make_probed(fusion_type=kind, num_fusion_layers=1)
    found = explain(model, processor, ROW, "topic", "integrated_gradients")
    inputs = processor(text=[ROW["text"]], images=[ROW["image"]])
    tokenizer = processor.tokenizer
    special = torch.isin(inputs["input_ids"], torch.tensor(tokenizer.all_special_ids))
    blank = {
        **inputs,
        "input_ids": torch.where(special, inputs["input_ids"], tokenizer.pad_token_id),
        "pixel_values": torch.zeros_like(inputs["pixel_values"]),
    }
    with torch.no_grad():
        label = model.tasks["topic"].labels.index(found.answer)
        full, empty = (model(**x).logits["topic"][0, label].item() for x in (inputs, blank))
    assert relevances(found).sum() == pytest.approx(full - empty, rel=0.03, abs=2e-3)
    open_gates(model, 0.0)
    assert np.abs(patches(explain(model, processor, ROW, "topic", "integrated_gradients"))).max() > 0
