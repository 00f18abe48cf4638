"""A prefix of picture tokens before the text; the references run bare text encoders on one row at a time."""

import copy

import pytest
import torch
from cases import first_quickly
from language_models import (
    LANGUAGE_MODELS,
    assert_threads_do_not_disturb_each_other,
    falcon_h1_config,
    gemma3n_config,
    make_language_model,
    save_language_model,
    texts_of,
    to_the_left,
    written_alone,
)
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, VOCAB_SIZE, make_batch, make_model, to_pad_id
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, OPTConfig, RecurrentGemmaConfig
from writers import LABELS, TOPIC, make_writer

from mm_transformers import Generation, MMTransformerConfig, MMTransformerForMultiTask


GERMAN = Generation("german", max_length=8)


def opt_config() -> OPTConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB_SIZE}
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 37, "max_position_embeddings": 64}
    return OPTConfig(**ids, **width, num_hidden_layers=2, num_attention_heads=4, init_std=0.3)


every_language_model = pytest.mark.parametrize("kind", first_quickly(LANGUAGE_MODELS))
# Those that take embeddings as wide as their states.
ENCODERS = [kind for kind in TEXT_ENCODERS if kind not in ("electra", "clip-text", "siglip-text")]


def make_prefixed(kind="llama", **kwargs) -> MMTransformerForMultiTask:
    # A narrow prefix, so that one fusion has another width than the text.
    return make_language_model(kind, fusion_type="prefix", **{"fusion_hidden_size": 24, **kwargs})


# A picture is 17 tokens, and these encoders have 40 positions.
ONE_PICTURE = [[0], [-1], [1], [2]]


@torch.no_grad()
def embeddings_of(model, batch, row):
    """(1, prefix and text, width) of a row, without padding: what the text encoder should read."""
    fusion, encoded = model.model.fusion, model.model.encode_rows(**batch)[0]
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    parts = [model.model.text_encoder.get_input_embeddings()(ids)]
    if "vision" in encoded:
        tokens = encoded["vision"].hidden_states[row][encoded["vision"].mask[row]]
        parts.insert(0, nn.functional.linear(nn.functional.gelu(tokens), fusion.linear.weight, fusion.linear.bias))
    return torch.cat(parts)[None]


@every_language_model
def test_losses_are_those_of_the_answer_after_prefix_and_text(kind):
    model, batch = make_prefixed(kind), make_batch(labels=False)
    bare, losses = model.model.text_model, []
    for row, answer in enumerate(LABELS["german"]):
        answer = answer[answer != -100]
        before = embeddings_of(model, batch, row)
        with torch.no_grad():
            read = torch.cat([before, bare.get_input_embeddings()(answer)[None]], 1)
            logits = bare(inputs_embeds=read).logits[0]
        start = before.shape[1] - 1
        losses += nn.functional.cross_entropy(logits[start:-1], answer, reduction="none").tolist()
    with torch.no_grad():
        for given in (batch, to_the_left(batch)):
            found = model(**given, labels=LABELS).losses["german"].item()
            assert found == pytest.approx(sum(losses) / len(losses), rel=1e-3)
        apart = model(encoder_outputs=model.model(**batch), labels=LABELS)
        at_once = model(**batch, labels=LABELS)
    for name in ("topic", "german"):
        known = LABELS[name] != -100
        torch.testing.assert_close(at_once.logits[name][known], apart.logits[name][known], rtol=1e-3, atol=1e-4)


@every_language_model
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_those_of_the_language_model_that_reads_the_prefix(kind, beams, side):
    model, batch = make_prefixed(kind), make_batch(labels=False)
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6}
    written = model.generate(**(to_the_left(batch) if side == "left" else batch), **options)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(written, uncached)
    for row in range(4):
        embeddings = embeddings_of(model, batch, row)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
        expected = model.model.text_model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
        assert torch.equal(written[row], expected[0])


@every_language_model
@pytest.mark.parametrize("others", [True, False], ids=["beside pictures", "no pictures"])
def test_rows_without_pictures_answer_as_the_language_model_does(kind, others, tmp_path):
    encoders = save_language_model(tmp_path, kind)
    model = MMTransformerForMultiTask.from_encoders(
        **encoders, tasks=[TOPIC, GERMAN], fusion_type="prefix", initializer_range=0.5
    )
    bare = AutoModelForCausalLM.from_pretrained(encoders["text"]).eval()
    batch = make_batch(labels=False)
    if not others:
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"num_beams": 2, "min_new_tokens": 8, "max_new_tokens": 8}
    text = texts_of(batch)
    expected = bare.generate(**text, **options)[:, text["input_ids"].shape[1] :]
    same = (model.generate("german", **batch, **options) == expected).all(1)
    assert same[1]
    assert same.all() == (not others)
    with torch.no_grad():
        states = model.model(**batch).last_hidden_state[1][batch["attention_mask"][1].bool()]
        plain = bare.base_model(batch["input_ids"][1][batch["attention_mask"][1].bool()][None])[0][0]
    torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", first_quickly(ENCODERS, 2))
def test_encoders_that_read_both_directions(text):
    model = make_model(text, fusion_type="prefix", fusion_hidden_size=24)
    pad = model.config.text_config.pad_token_id or 0
    batch = to_pad_id(make_batch(image_index=ONE_PICTURE, labels=False), pad)
    with torch.no_grad():
        outputs = model.model(**batch)
        left = model.model(**to_pad_id(to_the_left(batch), pad)).last_hidden_state
        for row, shown in enumerate(batch["attention_mask"].bool()):
            embeddings = embeddings_of(model, batch, row)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
            expected = model.model.text_encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state[0]
            expected = expected[-int(shown.sum()) :]
            torch.testing.assert_close(outputs.last_hidden_state[row][shown], expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(left[row][-int(shown.sum()) :], expected, rtol=1e-3, atol=1e-4)
        # A row without pictures is that of the text encoder alone.
        shown = batch["attention_mask"][1].bool()
        plain = model.model.text_encoder(input_ids=batch["input_ids"][1][shown][None]).last_hidden_state[0]
        torch.testing.assert_close(outputs.last_hidden_state[1][shown], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", first_quickly(SEQ2SEQ))
def test_encoder_decoders_write_from_texts_that_have_read_the_prefix(kind):
    model, batch = make_writer(kind, fusion_type="prefix"), make_batch(image_index=ONE_PICTURE, labels=False)
    with torch.no_grad():
        states, shown = model.model(**batch).last_hidden_state, batch["attention_mask"].bool()
        for row in (0, 1):
            embeddings = embeddings_of(model, batch, row)
            expected = model.model.text_encoder(inputs_embeds=embeddings).last_hidden_state[0][-int(shown[row].sum()) :]
            torch.testing.assert_close(states[row][shown[row]], expected, rtol=1e-3, atol=1e-4)
        plain = model.model.text_encoder(input_ids=batch["input_ids"][1][shown[1]][None]).last_hidden_state[0]
        torch.testing.assert_close(states[1][shown[1]], plain, rtol=1e-3, atol=1e-4)
    other = {**batch, "pixel_values": -3 * batch["pixel_values"]}
    logits = [model(**one, labels=LABELS).logits["german"] for one in (batch, other)]
    assert torch.equal(logits[0][1], logits[1][1])
    assert not torch.allclose(logits[0][0], logits[1][0], atol=1e-3)


@pytest.mark.parametrize("text", ["bert", "roberta", "t5"])
def test_a_row_without_text_has_a_learned_vector_behind_its_prefix(text):
    model = make_model(text, fusion_type="prefix", linear_probe=True)
    pad = model.config.text_config.pad_token_id or 0
    batch = to_pad_id(make_batch(image_index=ONE_PICTURE, labels=False), pad)
    batch["attention_mask"][0] = 0
    with torch.no_grad():
        found = model.model(**batch)
        prefix = embeddings_of(model, batch, 0)
        read = torch.cat([prefix, model.model.null_text.weight[None, None]], 1)
        expected = model.model.text_encoder(inputs_embeds=read).last_hidden_state[0, -1]
    torch.testing.assert_close(found.last_hidden_state[0, 0], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.pooler_output[0], expected, rtol=1e-3, atol=1e-4)


@every_language_model
def test_every_parameter_gets_a_gradient(kind):
    for tasks in (None, [GERMAN]):
        model = make_prefixed(kind, tasks=tasks).train()
        no_pictures = {**make_batch(labels=False), "image_index": torch.full((4, 1), -1)}
        for batch in (make_batch(labels=False), no_pictures):
            for labels in (LABELS, {}):
                model.zero_grad()
                labels = {name: value for name, value in labels.items() if name in model.tasks}
                model(**batch, labels=labels).loss.backward()
                assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("text", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_every_parameter_of_encoders_gets_a_gradient(text):
    model = make_model(text, fusion_type="prefix", linear_probe=True).train()
    for index in (ONE_PICTURE, [[-1]] * 4):
        batch = make_batch(image_index=index)
        batch["attention_mask"][0] = 0
        model.zero_grad()
        model(**batch).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_saved_model_writes_the_same(tmp_path):
    model, batch = make_prefixed(), make_batch(labels=False)
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    assert torch.equal(model.generate(**batch), loaded.generate(**batch))
    assert torch.equal(copy.deepcopy(model).generate(**batch), loaded.generate(**batch))
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    same = (loaded.generate(**batch) == loaded.generate(**other)).all(1)
    assert same.tolist() == [False, True, same[2].item(), same[3].item()]


def test_pictures_are_encoded_and_projected_once():
    model, batch, calls = make_prefixed(), make_batch(labels=False), []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    model.model.fusion.register_forward_hook(lambda *_: calls.append("prefix"))
    model.generate(**batch, num_beams=3, min_new_tokens=4, max_new_tokens=4)
    assert calls == ["vision", "prefix"]


def test_start_ids_and_lengths():
    tasks = [Generation("german", max_length=4, decoder_start_ids=[40, 41]), Generation("french", max_length=4), TOPIC]
    model, batch = make_prefixed(tasks=tasks), make_batch(labels=False)
    german, french = model.generate("german", **batch), model.generate("french", **batch)
    assert german[:, :2].tolist() == [[40, 41]] * 4
    assert german.shape[1] == 6
    assert french.shape[1] == 4
    labels = {"german": LABELS["german"], "french": LABELS["german"], "topic": LABELS["topic"]}
    logits = model(**batch, labels=labels).logits
    assert torch.equal(logits["german"][:, 0].argmax(-1), german[:, 2])
    assert torch.equal(logits["french"][:, 0].argmax(-1), french[:, 0])
    assert model.generate("french", **batch, max_length=3, min_new_tokens=3).shape[1] == 3
    full = model.generate("german", **batch, num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    assert torch.equal(full.sequences[::2], model.generate("german", **batch, num_beams=3))


def test_two_threads_write_at_once():
    assert_threads_do_not_disturb_each_other(make_prefixed())


@pytest.mark.slow
def test_code_that_was_compiled_without_pictures_reads_pictures():
    model, batch = make_model("bert", fusion_type="prefix"), make_batch(image_index=ONE_PICTURE, labels=False)
    compiled = torch.compile(model, backend="eager")
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for given in (texts, batch, texts, batch):
            torch.testing.assert_close(compiled(**given).logits["topic"], model(**given).logits["topic"])


def test_opt():
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=opt_config(), vision_config=VISION_ENCODERS["vit"](), tasks=[TOPIC, GERMAN], fusion_type="prefix",
        initializer_range=0.3,
    )  # fmt: skip
    model, batch = MMTransformerForMultiTask(config).eval(), make_batch(labels=False)
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    written = model.generate(**batch, **options)
    for row in range(4):
        embeddings = embeddings_of(model, batch, row)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
        expected = model.model.text_model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
        assert torch.equal(written[row], expected[0])


@pytest.mark.parametrize("config", [falcon_h1_config, gemma3n_config])
def test_language_models_that_do_more_with_ids_than_embed_them(config):
    model, batch = make_prefixed(config()), make_batch(image_index=ONE_PICTURE, labels=False)
    with torch.no_grad():
        for name, parameter in model.model.text_model.named_parameters():
            if "per_layer" in name or "altup" in name:
                parameter.normal_(0, 0.3)  # 0 in a new model
        text = batch["input_ids"][1][batch["attention_mask"][1].bool()][None]
        states = model.model(**batch).last_hidden_state[1][batch["attention_mask"][1].bool()]
        plain = model.model.text_encoder(text)[0][0]
    torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-4)
    written = model.generate(**batch, max_new_tokens=5)
    assert torch.equal(written[1], model.model.text_model.generate(text, max_new_tokens=5)[0, text.shape[1] :])
    for row in range(4):
        assert torch.equal(written[row], written_alone(model, batch, row, max_new_tokens=5))


def test_an_encoder_that_scales_the_embeddings_of_ids(monkeypatch):
    """As the checkpoints of Marian do."""
    config = SEQ2SEQ["marian"]()
    config.scale_embedding = True
    monkeypatch.setitem(SEQ2SEQ, "scaled", lambda: config)
    model, batch = make_writer("scaled", fusion_type="prefix"), make_batch(image_index=ONE_PICTURE, labels=False)
    encoder, scale = model.model.text_encoder, config.d_model**0.5
    with torch.no_grad():
        states = model.model(**batch).last_hidden_state
        for row, shown in enumerate(batch["attention_mask"].bool()):
            read = embeddings_of(model, batch, row)
            text = int(shown.sum())
            read = torch.cat([read[:, :-text], read[:, -text:] * scale], 1)  # the prefix as it is
            expected = encoder(inputs_embeds=read).last_hidden_state[0, -text:]
            torch.testing.assert_close(states[row][shown], expected, rtol=1e-3, atol=1e-4)


def test_an_encoder_that_scales_all_its_embeddings():
    """By a buffer, as RecurrentGemma does."""
    ids = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = RecurrentGemmaConfig(
        **ids, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, lru_width=32, intermediate_size=64,
        attention_window_size=64,
    )  # fmt: skip
    model, batch, seen = make_prefixed(config), make_batch(image_index=ONE_PICTURE, labels=False), []
    model.model.text_encoder.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    prefixes = []
    model.model.fusion.register_forward_hook(lambda module, args, output: prefixes.append(output[0]))
    with torch.no_grad():
        model.model(**batch)
    torch.testing.assert_close(seen[-1][0, :17], prefixes[-1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}, {"min_length": 6}])
def test_options_of_generate_see_the_text_and_nothing_else(options):
    for seed in range(3):
        model, batch = make_prefixed(seed=seed), make_batch(image_index=ONE_PICTURE, labels=False)
        model.generation_config.pad_token_id = 2  # the end token
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 2)
        written = model.generate(**batch, **options)
        for row in range(4):
            alone = written_alone(model, batch, row, **options)
            assert torch.equal(written[row][: len(alone)], alone)
        text = batch["input_ids"][1][batch["attention_mask"][1].bool()][None]
        plain = model.model.text_model.generate(
            text, **options, max_new_tokens=8, **({"min_new_tokens": 6} if "min_length" in options else {})
        )
        assert torch.equal(written[1], nn.functional.pad(plain[0, text.shape[1] :], (0, 8), value=2)[: len(written[1])])


@pytest.mark.parametrize("name", ["prefill_chunk_size", "prompt_lookup_num_tokens"])
def test_prompts_in_pieces_are_refused(name):
    model, batch = make_prefixed(), make_batch(labels=False)
    with pytest.raises(ValueError, match=f"generate does not support {name} with fusion_type='prefix'"):
        model.generate(**batch, **{name: 3})
    with pytest.raises(ValueError, match=name):
        model.generate(**batch, generation_config=GenerationConfig(**{name: 3}))


def test_gradients_reach_pictures_through_a_frozen_language_model():
    model = make_prefixed(freeze=["text"]).train()
    model(**make_batch(labels=False), labels=LABELS).loss.backward()
    assert model.model.fusion.linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.model.text_model.parameters())
    assert model.model.vision_projection.linear.weight.grad.abs().sum() > 0


def test_an_encoder_with_narrow_embeddings_takes_no_prefix():
    message = r"fusion_type='prefix': the input embeddings of the text encoder \('electra'\) are narrower than"
    with pytest.raises(ValueError, match=message):
        make_model("electra", fusion_type="prefix")


@pytest.mark.parametrize("text", ["clip-text", "siglip-text"])
def test_encoders_that_take_ids_only(text):
    model, batch = make_model(text, fusion_type="prefix"), make_batch(image_index=ONE_PICTURE, labels=False)
    with torch.no_grad():
        states = model.model(**batch).last_hidden_state
        for row, shown in enumerate(batch["attention_mask"].bool()):
            # Its ids are the numbers of the embeddings that it should read.
            vectors, bare = embeddings_of(model, batch, row)[0], copy.deepcopy(model.model.text_encoder)
            bare.get_input_embeddings()._forward_hooks.clear()
            bare.get_input_embeddings().weight = nn.Parameter(vectors)
            expected = bare(torch.arange(len(vectors))[None]).last_hidden_state[0, -int(shown.sum()) :]
            torch.testing.assert_close(states[row][shown], expected, rtol=1e-3, atol=1e-4)


def test_too_few_positions():
    model, batch = make_model("bert", fusion_type="prefix"), make_batch(labels=False)
    with pytest.raises(ValueError, match="Prefix and text have up to 43 tokens, but the text encoder has 40 positions"):
        model(**batch)
    # Each row fits, though pictures and texts side by side have 43 places.
    fitting = make_batch(image_index=[[0, -1], [-1, -1], [-1, 1], [2, -1]], labels=False)
    narrow = {**fitting, "image_index": fitting["image_index"].amax(1, keepdim=True)}
    with torch.no_grad():
        torch.testing.assert_close(model(**fitting).logits["topic"], model(**narrow).logits["topic"])
