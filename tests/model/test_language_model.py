"""A decoder-only language model as text encoder: its own head writes, behind the fusion."""

import pytest
import torch
from cases import first_quickly
from language_models import (
    LANGUAGE_MODELS,
    assert_caches_make_no_difference,
    assert_greedy_is_the_argmax_of_the_logits,
    assert_threads_do_not_disturb_each_other,
    make_language_model,
    save_language_model,
    texts_of,
    to_the_left,
    written_alone,
)
from tiny import TEXT_ENCODERS, VOCAB_SIZE, make_batch, make_image, open_gates
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, GenerationConfig, OPTConfig, RwkvConfig
from writers import LABELS, TOPIC

from mm_transformers import (
    Generation,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Retrieval,
)


every_language_model = pytest.mark.parametrize("kind", first_quickly(LANGUAGE_MODELS))
GERMAN = Generation("german", max_length=8)


@every_language_model
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "no pictures"])
def test_rule_2_a_new_model_writes_what_the_language_model_writes(kind, options, pictures, tmp_path):
    encoders = save_language_model(tmp_path, kind)
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC, GERMAN])
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
def test_the_loss_is_that_of_the_answer_after_the_text(kind, tmp_path):
    encoders = save_language_model(tmp_path, kind)
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC, GERMAN])
    bare = AutoModelForCausalLM.from_pretrained(encoders["text"]).eval()
    batch = make_batch(labels=False)
    losses = []
    for row, answer in enumerate(LABELS["german"]):
        text = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        answer = answer[answer != -100]
        with torch.no_grad():
            logits = bare(torch.cat([text, answer])[None]).logits[0]
        losses += nn.functional.cross_entropy(logits[len(text) - 1 : -1], answer, reduction="none").tolist()
    with torch.no_grad():
        outputs = model(**batch, labels=LABELS)
        assert outputs.losses["german"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        open_gates(model)
        changed = model(**batch, labels=LABELS).losses["german"].item()
    assert abs(changed - outputs.losses["german"].item()) > 1e-4


@every_language_model
def test_one_pass_gives_what_two_give(kind):
    """Heads and the loss of the answer, from one pass over text and answer, or from the output of the encoders."""
    model, batch = make_language_model(kind), make_batch(labels=False)
    calls = []
    model.model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        at_once = model(**batch, labels=LABELS)
        assert len(calls) == 1
        apart = model(encoder_outputs=model.model(**batch), labels=LABELS)
        assert len(calls) == 3
        without = model(**batch)
    for name in ("topic", "german"):
        known = LABELS[name] != -100
        torch.testing.assert_close(at_once.logits[name][known], apart.logits[name][known], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(at_once.logits["topic"], without.logits["topic"], rtol=1e-3, atol=1e-4)


@every_language_model
def test_greedy_is_the_argmax_of_the_logits(kind):
    assert_greedy_is_the_argmax_of_the_logits(make_language_model(kind), make_batch(labels=False))


@every_language_model
def test_caches_make_no_difference(kind):
    assert_caches_make_no_difference(make_language_model(kind), make_batch(labels=False))


@every_language_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_write_in_a_batch_as_they_do_alone(kind, side):
    model, batch = make_language_model(kind), make_batch(labels=False)
    together = model.generate(**(to_the_left(batch) if side == "left" else batch), num_beams=2)
    for row in range(len(together)):
        alone = written_alone(model, batch, row, num_beams=2)
        padded = torch.zeros_like(together[row])
        padded[: len(alone)] = alone
        assert torch.equal(together[row], padded)


@every_language_model
def test_every_parameter_gets_a_gradient(kind):
    for tasks in (None, [GERMAN]):
        model = make_language_model(kind, tasks=tasks).train()
        for labels in (LABELS, {"topic": LABELS["topic"]}, {}):
            model.zero_grad()
            labels = {name: value for name, value in labels.items() if name in model.tasks}
            model(**make_batch(labels=False), labels=labels).loss.backward()
            assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_language_model
def test_saved_model_writes_the_same(kind, tmp_path):
    model, batch = make_language_model(kind), make_batch(labels=False)
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.generation_config.num_beams == 2
    assert torch.equal(model.generate(**batch), loaded.generate(**batch))
    # One matrix for what is read and what is written, where the language model has it so.
    tied = model.model.text_model.config.tie_word_embeddings
    output = loaded.model.text_model.get_output_embeddings().weight
    assert (output is loaded.get_input_embeddings().weight) == bool(tied)


def test_no_state_depends_on_a_later_token():
    model, batch = make_language_model(), make_batch(labels=False)
    changed = LABELS["german"].clone()
    changed[0, 2] = 11
    with torch.no_grad():
        logits = model(**batch, labels=LABELS).logits["german"]
        again = model(**batch, labels={"german": changed}).logits["german"]
    torch.testing.assert_close(again[0, :3], logits[0, :3])
    assert not torch.allclose(again[0, 3], logits[0, 3])


def test_pictures_change_what_is_written():
    model, batch = make_language_model(), make_batch(labels=False)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    with_pictures = (batch["image_index"] >= 0).any(1)
    same = (model.generate(**batch) == model.generate(**other)).all(1)
    assert same[~with_pictures].all()
    assert not same[with_pictures].all()


def test_pictures_are_encoded_and_projected_once():
    model, batch, calls = make_language_model(num_fusion_layers=1), make_batch(labels=False), []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    [attention] = [layer.cross_attention for layer in model.model.fusion.layers]
    attention.k_proj.register_forward_hook(lambda *_: calls.append("keys"))
    attention.q_proj.register_forward_hook(lambda *_: calls.append("queries"))
    model.generate(**batch, num_beams=3, min_new_tokens=4, max_new_tokens=4)
    # The fusion of the texts, for heads, is not for what is written.
    assert calls.count("vision") == 1
    assert calls.count("keys") == 2
    assert calls.count("queries") == 5


def test_a_row_without_text_begins_with_the_first_token_of_texts():
    model, batch = make_language_model(), make_batch(labels=False)
    batch["attention_mask"][0] = 0
    written = model.generate(**batch)
    begun = {**batch, "input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"].clone()}
    begun["input_ids"][0, 0], begun["attention_mask"][0, 0] = 1, 1
    assert torch.equal(written, model.generate(**begun))


def test_start_ids_stand_between_text_and_answer():
    tasks = [Generation("german", max_length=4, decoder_start_ids=[40, 41]), Generation("french", max_length=4)]
    model, batch = make_language_model(tasks=tasks), make_batch(labels=False)
    german, french = model.generate("german", **batch), model.generate("french", **batch)
    assert german[:, :2].tolist() == [[40, 41]] * 4
    assert german.shape[1] == 6
    assert french.shape[1] == 4
    row = torch.cat([batch["input_ids"][0], torch.tensor([40, 41])])[None]
    pictures = {"pixel_values": batch["pixel_values"][:2], "image_index": torch.tensor([[0, 1]])}
    assert torch.equal(model.generate("french", input_ids=row, **pictures)[0], german[0, 2:])
    labels = {"german": LABELS["german"], "french": LABELS["german"]}
    logits = model(**batch, labels=labels).logits
    assert torch.equal(logits["german"][:, 0].argmax(-1), german[:, 2])
    assert torch.equal(logits["french"][:, 0].argmax(-1), french[:, 0])


def test_lengths_that_are_asked_for():
    model, batch = make_language_model(), make_batch(labels=False)
    model.generation_config.eos_token_id = None  # writes on and on
    assert model.generate(**batch).shape[1] == 8
    assert model.generate(**batch, generation_config=GenerationConfig(num_beams=2)).shape[1] == 8
    assert model.generate(**batch, generation_config=GenerationConfig(max_new_tokens=5)).shape[1] == 5
    assert model.generate(**batch, generation_config=GenerationConfig(max_length=6)).shape[1] == 6
    assert model.generate(**batch, max_new_tokens=3).shape[1] == 3
    assert model.generate(**batch, max_length=3).shape[1] == 3
    at_once = model.generate(**batch)[0, 0].item()
    ends = {"eos_token_id": at_once}
    assert model.generate(**batch, **ends)[0, 0] == at_once
    fewest = [{"min_length": 4}, {"generation_config": GenerationConfig(min_length=4, **ends)}]
    for options in (*fewest, {"min_new_tokens": 4}):
        written = model.generate(**batch, **{**ends, **options})[0]
        assert at_once not in written[:4].tolist()
        assert torch.equal(written, model.generate(**batch, **ends, min_new_tokens=4)[0])
    assert torch.equal(model.generate(**batch, max_length=None, max_new_tokens=None), model.generate(**batch))


def test_sampling_and_several_answers_to_a_row():
    model, batch = make_language_model(), make_batch(labels=False)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0, "min_new_tokens": 8}
    torch.manual_seed(0)
    answers = model.generate(**batch, **options)
    assert answers.shape == (12, 8)
    assert len({tuple(row) for row in answers.tolist()}) > 4
    torch.manual_seed(0)
    assert torch.equal(answers, model.generate(**batch, **options, use_cache=False))
    beams = model.generate(**batch, num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    assert torch.equal(beams.sequences[::2][:, :8], model.generate(**batch, num_beams=3))


def test_a_static_cache_writes_the_same():
    model, batch = make_language_model(), make_batch(labels=False)
    static = model.generate(**batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**batch))


def test_a_model_without_other_modalities(tmp_path):
    encoders = save_language_model(tmp_path)
    model = MMTransformerForMultiTask.from_encoders(text=encoders["text"], tasks=[TOPIC, GERMAN])
    bare = AutoModelForCausalLM.from_pretrained(encoders["text"]).eval()
    batch = {name: make_batch(labels=False)[name] for name in ("input_ids", "attention_mask")}
    expected = bare.generate(**texts_of(batch), max_new_tokens=8)[:, 9:]
    assert torch.equal(model.generate(**batch), expected)


def test_two_threads_write_at_once():
    """Each has its own pictures, though both run the same modules."""
    assert_threads_do_not_disturb_each_other(make_language_model())


def test_a_frozen_language_model_keeps_its_head():
    model = make_language_model("llama", freeze=["text"]).train()
    model(**make_batch(labels=False), labels=LABELS).loss.backward()
    named = dict(model.named_parameters())
    assert not any(p.requires_grad for name, p in named.items() if ".text_model." in name)
    assert all(p.grad is not None for p in named.values() if p.requires_grad)
    assert not model.model.text_model.training or not model.model.text_encoder.training


@pytest.mark.parametrize("fusion", ["co_attention", "bottleneck", "merged", "late"])
def test_kinds_of_fusion_that_mix_text_tokens(fusion):
    message = f"'german' is written token by token, but in fusion_type '{fusion}' text tokens depend on later ones: use"
    with pytest.raises(ValueError, match=message):
        make_language_model(fusion_type=fusion)
    make_language_model(fusion_type=fusion, tasks=[TOPIC])  # heads read any fusion


def test_an_encoder_that_is_no_decoder():
    with pytest.raises(ValueError, match=r"\('bert'\) has no decoder: use an encoder-decoder .* or a language model"):
        MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), tasks=[GERMAN])
    config = MMTransformerConfig(text_config=BertConfig(is_decoder=True), tasks=[GERMAN])
    assert config.has_language_model


def test_a_language_model_whose_tokens_see_later_ones(tmp_path, monkeypatch):
    from mm_transformers.model import decoders

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path)
    monkeypatch.setattr(decoders, "is_language_model", lambda config: True)
    with pytest.raises(ValueError, match=r"\('bert'\) cannot write: its tokens attend to later ones"):
        decoders.load_writer(str(tmp_path), None)


def test_a_head_that_calls_an_inner_part(tmp_path):
    """The head of OPT calls the decoder inside of the model without head."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 37}
    config = OPTConfig(**ids, **width, num_hidden_layers=2, num_attention_heads=4, init_std=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    vision = save_language_model(tmp_path / "other")["vision"]
    model = MMTransformerForMultiTask.from_encoders(
        text=str(tmp_path / "text"), vision=vision, tasks=[TOPIC, GERMAN], initializer_range=0.3
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


def test_a_language_model_that_reads_padding(tmp_path):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    config = RwkvConfig(**ids, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\('rwkv'\) cannot write: padding before a text changes its states"):
        MMTransformerForMultiTask.from_encoders(text=str(tmp_path), tasks=[GERMAN])


def test_more_than_the_language_model_has_positions_for():
    model, batch = make_language_model("gpt2", tasks=[Generation("german", max_length=60)]), make_batch(labels=False)
    with pytest.raises(ValueError, match="text and answer have up to 68 tokens, but the language model has 64 pos"):
        model.generate(**batch)
    assert model.generate(**batch, max_new_tokens=56, min_new_tokens=56).shape == (4, 56)


def test_texts_that_are_known_by_their_features_only():
    model, batch = make_language_model(), make_batch(labels=False)
    with torch.no_grad():
        features, _ = model.model.encode("text", input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        beside = model(**batch, text_features=features, labels=LABELS)
        torch.testing.assert_close(beside.losses, model(**batch, labels=LABELS).losses, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="Task 'german': the language model continues the texts, so give them as"):
            model(text_features=features, attention_mask=batch["attention_mask"], labels=LABELS)


def test_an_assistant_is_refused():
    model = make_language_model()
    with pytest.raises(ValueError, match="generate does not support assistant_model"):
        model.generate(**make_batch(labels=False), assistant_model=model.model.text_model)


def test_vocabulary_grows(tmp_path):
    model, batch = make_language_model("llama, tied"), make_batch(labels=False)
    with torch.no_grad():
        before = model(**batch, labels=LABELS).logits["german"]
        model.resize_token_embeddings(VOCAB_SIZE + 13, mean_resizing=False)
        assert model.config.vocab_size == model.config.decoder_vocab_size == VOCAB_SIZE + 13
        after = model(**batch, labels=LABELS).logits["german"]
    torch.testing.assert_close(after[..., :VOCAB_SIZE], before, rtol=1e-4, atol=1e-4)
    assert after.shape[-1] == VOCAB_SIZE + 13
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    assert loaded.generate(**batch).tolist() == model.generate(**batch).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_heads_read_the_last_token(side):
    """Of each row, wherever the padding is; of a model that has only seen the text before it."""
    model = make_language_model(text_pooling="last", linear_probe=True, tasks=[TOPIC, Retrieval("search")])
    nn.init.normal_(model.heads.topic.probe.linear.weight)
    batch = make_batch(labels=False)
    with torch.no_grad():
        outputs = model.model(**(to_the_left(batch) if side == "left" else batch))
        logits = model.heads.topic(outputs)
        lengths, text = batch["attention_mask"].sum(1), {k: batch[k] for k in ("input_ids", "attention_mask")}
        last = model.model.text_encoder(**text).last_hidden_state[torch.arange(4), lengths - 1]
        torch.testing.assert_close(outputs.encoded["text"].item_means, last, rtol=1e-4, atol=1e-5)
        vectors = model.embed(**batch)
        torch.testing.assert_close(vectors["text"], last, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vectors["fused"], outputs.pooler_output, rtol=1e-4, atol=1e-5)
        found = model.encode_text(**text)
        expected = nn.functional.normalize(model.heads.search.text_projection(last), dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, model(**batch).logits["topic"], rtol=1e-4, atol=1e-5)
        mean = make_language_model(linear_probe=True, tasks=[TOPIC, Retrieval("search")])
        mean.load_state_dict(model.state_dict())
        assert not torch.allclose(mean(**batch).logits["topic"], logits, atol=1e-3)


def test_a_pooling_that_is_not_known():
    with pytest.raises(ValueError, match="text_pooling must be one of mean, last, but is 'first'"):
        make_language_model(text_pooling="first")


@pytest.mark.parametrize("options", [{}, {"fusion_layers_every": 1}], ids=["behind", "inside"])
def test_the_language_model_alone_may_be_in_bfloat16(options, tmp_path):
    encoders = save_language_model(tmp_path)
    model = MMTransformerForMultiTask.from_encoders(
        **encoders, tasks=[TOPIC, Generation("german")], dtype={"text": "bfloat16"}, **options
    )
    alone = AutoModelForCausalLM.from_pretrained(encoders["text"], dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.model.text_model.parameters()} == {torch.bfloat16}
    others = [p for name, p in model.named_parameters() if "text_model" not in name]
    assert {p.dtype for p in others} == {torch.float32}
    # What transformers keeps in float32, such as the frequencies of positions, stays so.
    kept = {name: x.dtype for name, x in alone.named_buffers()}
    assert {name: x.dtype for name, x in model.model.text_model.named_buffers()} == kept
    inputs = MMTransformerProcessor.from_encoders(**encoders)(text=["the red dog"], images=[make_image(0)])
    expected = alone.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False
    )
    found = model.generate("german", **inputs, max_new_tokens=8, do_sample=False)
    assert found.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
    model.save_pretrained(tmp_path / "saved")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "saved").eval()
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    assert {name: x.dtype for name, x in loaded.model.text_model.named_buffers()} == kept
    assert torch.equal(loaded(**inputs).logits["topic"], model(**inputs).logits["topic"])
    with pytest.raises(ValueError, match="dtype names 'audio', but the encoders are text, vision"):
        MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC], dtype={"audio": "bfloat16"})
