"""Fusion layers between the layers of a language model, for any family; independent references in plain torch."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from cases import first_quickly
from language_models import (
    LANGUAGE_MODELS,
    assert_caches_make_no_difference,
    assert_greedy_is_the_argmax_of_the_logits,
    assert_threads_do_not_disturb_each_other,
    gemma3n_config,
    make_language_model,
    save_language_model,
    texts_of,
    to_the_left,
    written_alone,
)
from tiny import TEXT_ENCODERS, VISION_ENCODERS, VOCAB_SIZE, make_batch, open_gates
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig
from writers import LABELS, TOPIC

from mm_transformers import Generation, MMTransformerConfig, MMTransformerForMultiTask


GERMAN = Generation("german", max_length=8)
# Where each family keeps its layers.
LAYERS = {
    kind: {"gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers", "mamba": "backbone.layers"}.get(kind, "model.layers")
    for kind in LANGUAGE_MODELS
}
every_language_model = pytest.mark.parametrize("kind", first_quickly(LANGUAGE_MODELS))


def make_inside(kind="llama", every=1, **kwargs) -> MMTransformerForMultiTask:
    return make_language_model(kind, fusion_layers_every=every, **{"num_fusion_layers": 1, **kwargs})


def gated_layer(layer, states, keys):
    """Flamingo's layer, in the formulas of the paper: states (length, width), keys (number of keys, width)."""
    heads, width = layer.cross_attention.config.num_fusion_attention_heads, states.shape[-1]
    a = layer.cross_attention
    q, k, v = a.q_proj(layer.attention_norm(states)), a.k_proj(keys), a.v_proj(keys)
    parts = []
    for head in range(heads):
        cut = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[:, cut] @ k[:, cut].T / math.sqrt(width // heads)
        parts.append(torch.softmax(scores, -1) @ v[:, cut])
    states = states + torch.tanh(layer.attention_gate.gate_alpha) * a.out_proj(torch.cat(parts, -1))
    hidden = nn.functional.gelu(layer.mlp.fc1(layer.mlp_norm(states)))
    return states + torch.tanh(layer.mlp_gate.gate_alpha) * layer.mlp.fc2(hidden)


def keys_of(model, batch, row):
    stream = model.model.encode_rows(**batch)[0]["vision"]
    return stream.hidden_states[row][stream.mask[row]]


@torch.no_grad()
def reference_logits(model, kind, batch, row, ids, every):
    """The logits for one row without padding: a bare language model, whose layers get other inputs by hooks."""
    bare = copy.deepcopy(model.model.text_model)
    layers, keys = bare.get_submodule(LAYERS[kind]), keys_of(model, batch, row)
    for place, number in enumerate(range(every - 1, len(layers), every)):
        fusion = model.model.fusion.places[place]

        def change(module, args, fusion=fusion):
            return (gated_layer(fusion.layers[0], args[0][0], keys)[None], *args[1:])

        if len(keys):
            layers[number].register_forward_pre_hook(change)
    return bare(ids[None]).logits[0]


@every_language_model
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "no pictures"])
def test_rule_2_a_new_model_writes_what_the_language_model_writes(kind, options, pictures, tmp_path):
    encoders = save_language_model(tmp_path, kind)
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC, GERMAN], fusion_layers_every=1)
    bare = AutoModelForCausalLM.from_pretrained(encoders["text"]).eval()
    batch = make_batch(labels=False)
    if not pictures:
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {**options, "no_repeat_ngram_size": 2, "max_new_tokens": 8}
    written = model.generate("german", **batch, **options)
    text = texts_of(batch)
    expected = bare.generate(**text, **options)[:, text["input_ids"].shape[1] :]
    assert torch.equal(written, expected)
    assert len(set(written.flatten().tolist())) > 6


@every_language_model
@pytest.mark.parametrize("every", [1, 2])
def test_losses_are_those_of_the_layers_one_after_the_other(kind, every):
    model, batch = make_inside(kind, every), make_batch(labels=False)
    assert len(model.model.fusion.places) == 2 // every
    losses = []
    for row, answer in enumerate(LABELS["german"]):
        text = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        answer = answer[answer != -100]
        logits = reference_logits(model, kind, batch, row, torch.cat([text, answer]), every)
        losses += nn.functional.cross_entropy(logits[len(text) - 1 : -1], answer, reduction="none").tolist()
    with torch.no_grad():
        found = model(**batch, labels=LABELS).losses["german"].item()
        left = model(**to_the_left(batch), labels=LABELS).losses["german"].item()
        plain = make_language_model(kind, gates_open=False, num_fusion_layers=1)
        plain.load_state_dict(model.state_dict(), strict=False)
        closed = plain(**batch, labels=LABELS).losses["german"].item()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert left == pytest.approx(found, rel=1e-3)
    assert abs(found - closed) > 1e-3


def test_llama_written_out():
    """The last states of a row, by a loop over the layers of Llama."""
    model, batch = make_inside("llama", 2), make_batch(labels=False)
    llama, row = model.model.text_encoder, 0
    with torch.no_grad():
        ids, keys = batch["input_ids"][row][None], keys_of(model, batch, row)
        states = llama.embed_tokens(ids)
        places = torch.arange(ids.shape[1])[None]
        rotation = llama.rotary_emb(states, places)
        later = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
        for number, layer in enumerate(llama.layers):
            if number == 1:
                states = gated_layer(model.model.fusion.places[0].layers[0], states[0], keys)[None]
            states = layer(states, attention_mask=later, position_embeddings=rotation, position_ids=places)
        expected = llama.norm(states)[0]
        found = model.model(**batch).last_hidden_state[row]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_language_model
def test_one_pass_gives_what_two_give(kind):
    model, batch = make_inside(kind), make_batch(labels=False)
    with torch.no_grad():
        at_once = model(**batch, labels=LABELS)
        apart = model(encoder_outputs=model.model(**batch), labels=LABELS)
        without = model(**batch)
    for name in ("topic", "german"):
        known = LABELS[name] != -100
        torch.testing.assert_close(at_once.logits[name][known], apart.logits[name][known], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(at_once.logits["topic"], without.logits["topic"], rtol=1e-3, atol=1e-4)


@every_language_model
def test_greedy_is_the_argmax_of_the_logits(kind):
    assert_greedy_is_the_argmax_of_the_logits(make_inside(kind), make_batch(labels=False))


@every_language_model
def test_caches_make_no_difference(kind):
    assert_caches_make_no_difference(make_inside(kind), make_batch(labels=False))


@every_language_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_write_in_a_batch_as_they_do_alone(kind, side):
    model, batch = make_inside(kind), make_batch(labels=False)
    together = model.generate(**(to_the_left(batch) if side == "left" else batch), num_beams=2)
    for row in range(len(together)):
        alone = written_alone(model, batch, row, num_beams=2)
        assert torch.equal(together[row][: len(alone)], alone)
        assert set(together[row][len(alone) :].tolist()) <= {0, 2}  # padding, or in beams the end token


@every_language_model
def test_rows_without_pictures_are_those_of_the_language_model(kind):
    """Bit for bit, though gates are open and other rows of the batch have pictures."""
    model, batch = make_inside(kind), make_batch(labels=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        found = model.model(**batch).last_hidden_state
        expected = model.model.text_encoder(input_ids=ids, attention_mask=mask)[0]
    absent = (batch["image_index"] < 0).all(1)
    shown = mask.bool()
    assert torch.equal(found[absent][shown[absent]], expected[absent][shown[absent]])
    assert not torch.equal(found[~absent][shown[~absent]], expected[~absent][shown[~absent]])


@every_language_model
def test_every_parameter_gets_a_gradient(kind):
    for tasks in (None, [GERMAN]):
        model = make_inside(kind, tasks=tasks).train()
        no_pictures = {**make_batch(labels=False), "image_index": torch.full((4, 1), -1)}
        for batch in (make_batch(labels=False), no_pictures):
            for labels in (LABELS, {"topic": LABELS["topic"]}, {}):
                model.zero_grad()
                labels = {name: value for name, value in labels.items() if name in model.tasks}
                model(**batch, labels=labels).loss.backward()
                assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_language_model
def test_saved_model_writes_the_same(kind, tmp_path):
    model, batch = make_inside(kind), make_batch(labels=False)
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    bare = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[kind]())
    names = {name.removeprefix("model.text_model.") for name in model.state_dict() if ".text_model." in name}
    assert names == set(bare.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert torch.equal(model.generate(**batch), loaded.generate(**batch))


def test_copies_are_independent():
    model, batch = make_inside(), make_batch(labels=False)
    written = model.generate(**batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(**batch), written)
        with torch.no_grad():
            for parameter in other.model.fusion.parameters():
                parameter.mul_(-1)
        assert not torch.equal(other.generate(**batch), written)
        assert torch.equal(model.generate(**batch), written)


def test_two_threads_write_at_once():
    assert_threads_do_not_disturb_each_other(make_inside())


def test_pictures_are_encoded_and_projected_once():
    model, batch, calls = make_inside(), make_batch(labels=False), []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    for fusion in model.model.fusion.places:
        fusion.layers[0].cross_attention.k_proj.register_forward_hook(lambda *_: calls.append("keys"))
        fusion.layers[0].cross_attention.q_proj.register_forward_hook(lambda *_: calls.append("queries"))
    model.generate(**batch, num_beams=3, min_new_tokens=4, max_new_tokens=4)
    assert calls.count("vision") == 1
    assert calls.count("keys") == 2  # in each of the two layers once
    assert calls.count("queries") == 8


def test_a_model_that_only_writes_reads_no_text_alone():
    calls = []
    for tasks, expected in (([GERMAN], 1), ([TOPIC, GERMAN], 2)):
        model, batch = make_inside(tasks=tasks), make_batch(labels=False)
        model.model.text_encoder.register_forward_hook(lambda *_, of=calls: of.append(1))
        labels = {name: value for name, value in LABELS.items() if name in model.tasks}
        model(**batch, labels=labels)
        assert len(calls) == expected
        calls.clear()


def test_a_row_without_text_begins_with_the_first_token_of_texts():
    model, batch = make_inside(linear_probe=True), make_batch(labels=False)
    batch["attention_mask"][0] = 0
    begun = {**batch, "input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"].clone()}
    begun["input_ids"][0, 0], begun["attention_mask"][0, 0] = 1, 1
    assert torch.equal(model.generate(**batch), model.generate(**begun))
    with torch.no_grad():
        found, expected = model.model(**batch), model.model(**begun)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
        assert not found.encoded["text"].item_means[0].any()  # for linear probes it has none


def test_several_written_tasks():
    tasks = [Generation("german", max_length=4, decoder_start_ids=[40, 41]), Generation("french", max_length=4), TOPIC]
    model, batch = make_inside(tasks=tasks), make_batch(labels=False)
    german, french = model.generate("german", **batch), model.generate("french", **batch)
    assert german[:, :2].tolist() == [[40, 41]] * 4
    labels = {"german": LABELS["german"], "french": LABELS["german"], "topic": LABELS["topic"]}
    logits = model(**batch, labels=labels).logits
    assert torch.equal(logits["german"][:, 0].argmax(-1), german[:, 2])
    assert torch.equal(logits["french"][:, 0].argmax(-1), french[:, 0])


def test_a_narrow_fusion_and_several_layers_at_a_place():
    model, batch = make_inside(fusion_hidden_size=16, num_fusion_layers=2, gates_open=False), make_batch(labels=False)
    assert all(len(fusion.layers) == 2 for fusion in model.model.fusion.places)
    with torch.no_grad():
        before = model.model(**batch).last_hidden_state
        expected = model.model.text_encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        torch.testing.assert_close(before, expected, rtol=0, atol=0)
        open_gates(model)
        assert not torch.allclose(model.model(**batch).last_hidden_state, before, atol=1e-3)


def test_attentions_and_states_of_all_places():
    model, batch = make_inside(attn_implementation="eager"), make_batch(labels=False)
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True, output_hidden_states=True, labels=LABELS)
    assert [tuple(weights.shape[:3]) for weights in outputs.cross_attentions] == [(4, 4, 9)] * 2
    assert not outputs.cross_attentions[0][1].any()  # a row without pictures
    assert len(outputs.hidden_states) == 4  # before and after each place
    torch.testing.assert_close(
        outputs.hidden_states[0], model.get_input_embeddings()(batch["input_ids"]).detach(), rtol=0, atol=0
    )


def test_a_frozen_language_model_lets_gradients_through():
    model = make_inside(freeze=["text", "vision"]).train()
    model(**make_batch(labels=False), labels=LABELS).loss.backward()
    named = dict(model.named_parameters())
    assert not any(p.requires_grad for name, p in named.items() if ".text_model." in name)
    assert all(
        p.grad.abs().sum() > 0 for name, p in named.items() if "fusion.places" in name and "k_proj.bias" not in name
    )


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = without_dropout(make_inside(kind, tasks=[GERMAN]).train())
        model.model.text_encoder.get_submodule(LAYERS[kind].partition(".")[2])[0].register_forward_hook(
            lambda *_: calls.append(1)
        )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**make_batch(labels=False), labels={"german": LABELS["german"]}).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_models_see_the_pictures_of_each_call():
    model, batch = make_inside(), make_batch(labels=False)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    none = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = [model.model(**one).last_hidden_state for one in (batch, other, none, batch)]
        compiled = torch.compile(model.model, backend="eager")
        found = [compiled(**one).last_hidden_state for one in (batch, other, none, batch)]
    for states, right in zip(found, expected, strict=True):
        shown = batch["attention_mask"].bool()
        torch.testing.assert_close(states[shown], right[shown], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_opt(tmp_path):
    """The head of OPT calls the decoder inside of the model without head."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 37}
    config = OPTConfig(**ids, **width, num_hidden_layers=2, num_attention_heads=4, init_std=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    vision = save_language_model(tmp_path / "other")["vision"]
    model = MMTransformerForMultiTask.from_encoders(
        text=str(tmp_path / "text"), vision=vision, tasks=[TOPIC, GERMAN], initializer_range=0.3, fusion_layers_every=2
    )
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    batch = make_batch(labels=False)
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    expected = bare.generate(**texts_of(batch), **options)[:, 9:]
    assert torch.equal(model.generate(**batch, **options), expected)
    open_gates(model)
    assert not torch.equal(model.generate(**batch, **options), expected)
    with torch.no_grad():
        at_once = model(**batch, labels=LABELS)
        apart = model(encoder_outputs=model.model(**batch), labels=LABELS)
    torch.testing.assert_close(at_once.losses, apart.losses, rtol=1e-4, atol=1e-4)


def test_a_language_model_that_does_not_write():
    model, batch = make_inside(tasks=[TOPIC]), make_batch(labels=False)
    assert not model.model.has_language_model
    with torch.no_grad():
        logits = model(**batch).logits["topic"]
        other = model(**{**batch, "pixel_values": -batch["pixel_values"]}).logits["topic"]
    absent = (batch["image_index"] < 0).all(1)
    torch.testing.assert_close(logits[absent], other[absent])
    assert not torch.allclose(logits[~absent], other[~absent], atol=1e-3)


def test_layers_that_read_states_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\('gemma3n_text'\) read states of another shape than.*leave it out"):
        make_language_model(gemma3n_config(), fusion_layers_every=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fusion_layers_every": 3}, "fusion_layers_every must be from 1 to 2, the number of layers .*, but is 3"),
        ({"fusion_layers_every": -1}, "fusion_layers_every must be from 1 to 2, the number of layers .*, but is -1"),
        (
            {"fusion_layers_every": 1, "fusion_type": "late"},
            "fusion_layers_every=1 needs a fusion whose layers read",
        ),
        ({"fusion_layers_every": 1, "fusion_type": "prefix"}, "fusion_layers_every=1 needs a fusion whose layers read"),
        (
            {"fusion_layers_every": 1, "text_config": TEXT_ENCODERS["bert"]()},
            "fusion_layers_every=1 needs a decoder-only language model as text encoder, but text_config is 'bert'",
        ),
    ],
)
def test_what_does_not_fit(values, message):
    given = {"text_config": LANGUAGE_MODELS["llama"](), "vision_config": VISION_ENCODERS["vit"](), **values}
    with pytest.raises(ValueError, match=message):
        MMTransformerConfig(**given, tasks=[TOPIC])


def test_a_language_model_that_had_other_places():
    """The language model of one model becomes that of another."""
    model, batch = make_inside("llama", 1), make_batch(labels=False)
    config = make_inside("llama", 2).config
    torch.manual_seed(0)
    expected = MMTransformerForMultiTask(config).eval()
    torch.manual_seed(0)
    other = MMTransformerForMultiTask(config, text_model=model.model.text_model).eval()
    other.load_state_dict(expected.state_dict())
    open_gates(other)
    open_gates(expected)
    with torch.no_grad():
        torch.testing.assert_close(other(**batch, labels=LABELS).losses, expected(**batch, labels=LABELS).losses)


def test_zero_is_behind():
    assert type(make_language_model(fusion_layers_every=0).model.fusion).__name__ == "CrossAttentionFusion"
    config = MMTransformerConfig(text_config=LlamaConfig(num_hidden_layers=8), fusion_layers_every=4, tasks=[TOPIC])
    assert not config.reads_jointly  # nothing to read beside the text


def test_texts_that_are_known_by_their_features_only():
    model, batch = make_inside(), make_batch(labels=False)
    features = torch.zeros(4, 9, 32)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="reads the texts beside the other modalities, so give them"),
    ):
        model(text_features=features, attention_mask=batch["attention_mask"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"fusion_layers_every": 1}, {"fusion_type": "prefix"}], ids=["inside", "prefix"])
def test_the_code_beside_the_weights_is_complete(options, tmp_path):
    """Loaded without this package, it writes the same."""
    model, batch = make_language_model(**options), make_batch(labels=False)
    model.save_pretrained(tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    script = """
import sys
sys.modules["mm_transformers"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
print(model.generate(**torch.load("batch.pt")).tolist())
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == model.generate(**batch).tolist()
