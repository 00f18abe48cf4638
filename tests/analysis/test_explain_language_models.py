"""Explanations of answers that a language model continues, and of heads on texts that have read pictures."""

import numpy as np
import pytest
import torch
from language_models import make_language_model, make_llm_processor
from tiny import make_image, open_gates
from torch import nn

from mm_transformers.analysis import explain
from mm_transformers.analysis.explaining.methods import ATTENTION_METHODS
from mm_transformers.model.language_model import longest_prompt


KINDS = {
    "behind": {"num_fusion_layers": 1},
    "inside": {"fusion_layers_every": 1, "num_fusion_layers": 1},
    "inside, every second": {"fusion_layers_every": 2, "num_fusion_layers": 1},
    "prefix": {"fusion_type": "prefix"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
ROW = {"text": "a red cat on the", "image": make_image(1)}


def make(kind, family="llama", **kwargs):
    return make_language_model(family, **{**KINDS[kind], "attn_implementation": "eager", **kwargs})


def patches(explanation) -> np.ndarray:
    return np.concatenate([image.patches.flatten() for image in explanation.images])


def tokens(explanation) -> np.ndarray:
    return np.array([token.relevance for token in explanation.tokens])


def mixed(own, weights):
    """Attention rollout: half of what was there, half of what is read."""
    return (own + weights @ own) / 2


@torch.no_grad()
def rollout(model, kind, processor, answer) -> tuple[torch.Tensor, torch.Tensor]:
    """The relevance of words and patches for the first word of an answer, by attentions of bare modules."""
    inputs = processor(text=[ROW["text"]], images=[ROW["image"]])
    ids, fused = inputs["input_ids"], model.model
    answer_ids = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    read, length = torch.cat([ids, answer_ids], 1), ids.shape[1]
    of_vision = torch.eye(17)
    for weights in fused.vision_model(inputs["pixel_values"], output_attentions=True).attentions:
        of_vision = mixed(of_vision, weights[0].mean(0))
    vision = fused.encode_rows(**inputs)[0]["vision"].hidden_states
    if kind == "prefix":
        linear = fused.fusion.linear
        before = nn.functional.linear(nn.functional.gelu(vision), linear.weight, linear.bias)
        embeddings = torch.cat([before, fused.text_model.get_input_embeddings()(read)], 1)
        relevance = torch.eye(embeddings.shape[1])
        relevance[:17, :17] = of_vision
        for weights in fused.text_encoder(inputs_embeds=embeddings, output_attentions=True).attentions:
            relevance = mixed(relevance, weights[0].mean(0))
        row = relevance[17 + length - 1]
        return row[17 : 17 + length], row[:17]

    def crossing(layer, states):
        """The attention of the states to the patches, mean over the heads."""
        attention, heads, width = layer.cross_attention, 4, states.shape[-1]
        query, key = attention.q_proj(layer.attention_norm(states[0])), attention.k_proj(vision[0])
        query, key = (x.view(-1, heads, width // heads).transpose(0, 1) for x in (query, key))
        return (query @ key.transpose(1, 2) / (width // heads) ** 0.5).softmax(-1).mean(0)

    seen, hooks = [], []
    layers = fused.text_encoder.layers
    every = fused.config.fusion_layers_every
    if every:
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            if (number + 1) % every == 0:
                fusion = fused.fusion.places[(number + 1) // every - 1].layers[0]
                hooks.append((number, fusion))
    text, other = torch.eye(read.shape[1]), torch.zeros(read.shape[1], 17)
    if not every:
        outputs = fused.text_encoder(input_ids=read, output_attentions=True)
        for weights in outputs.attentions:
            text = mixed(text, weights[0].mean(0))
        weights = crossing(fused.fusion.layers[0], outputs.last_hidden_state)
        return text[length - 1, :length] / 2, (weights @ of_vision)[length - 1] / 2
    # The states before each fusion are those after it, as if computed by its layer: taken from a pass of the model.
    before, attentions = [], []
    for _, fusion in hooks:
        fusion.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: attentions.append(output[1]))
    labels = torch.cat([answer_ids, torch.tensor([[2]])], 1)
    model(**inputs, labels={"german": labels})
    before, attentions = before[-len(hooks) :], attentions[-len(layers) :]
    for number in range(len(layers)):
        for place, (at, fusion) in enumerate(hooks):
            if at == number:
                text, other = text / 2, (other + crossing(fusion, before[place]) @ of_vision) / 2
        weights = attentions[number][0].mean(0)
        text, other = mixed(text, weights), mixed(other, weights)
    return text[length - 1, :length], other[length - 1]


@every_kind
def test_rollout_of_the_first_word_is_that_of_the_attentions(kind):
    model, processor = make(kind), make_llm_processor()
    found = explain(model, processor, ROW, "german", "rollout", answer="blue dog", word=0)
    text, vision = rollout(model, kind, processor, "blue dog")
    assert found.word == "blue"
    np.testing.assert_allclose(tokens(found), text.numpy(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(patches(found), vision[1:].numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("method", [*ATTENTION_METHODS, "random"])
@pytest.mark.parametrize("task", ["german", "topic"])
@pytest.mark.parametrize("probed", [False, True])
def test_every_method_places_relevance(kind, method, task, probed):
    model, processor = make(kind, linear_probe=probed), make_llm_processor()
    if probed:
        torch.nn.init.normal_(model.heads.topic.probe.linear.weight)
    found = explain(model, processor, ROW, task, method)
    assert patches(found).shape == (16,)
    assert np.isfinite(patches(found)).all()
    assert patches(found).max() > 0
    assert [word.token for word in found.words] == ROW["text"].split()
    assert sum(found.shares.values()) == pytest.approx(1)
    if (kind, method) != ("prefix", "gradient_attention"):
        assert tokens(found).max() > 0 or method in ("attention", "gradient_attention")


@every_kind
@pytest.mark.parametrize("method", ["chefer", "rollout"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_disturb_each_other(kind, method, side):
    """Nor does padding on either side."""
    model, processor = make(kind), make_llm_processor()
    processor.tokenizer.padding_side = side
    rows = [ROW, {"text": "blue dog"}, {"text": "a small", "image": [make_image(2), make_image(1)]}]
    for task, answer in (("german", "green crane"), ("topic", "food")):
        together = explain(model, processor, rows, task, method, answer=answer)
        for row, found in zip(rows, together, strict=True):
            alone = explain(model, processor, row, task, method, answer=answer)
            np.testing.assert_allclose(tokens(found), tokens(alone), rtol=1e-3, atol=1e-6)
            if "image" in row:
                np.testing.assert_allclose(patches(found), patches(alone), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["behind", "inside"])
def test_a_closed_gate_gives_pictures_no_relevance(kind):
    model, processor = make(kind, gates_open=False), make_llm_processor()
    found = explain(model, processor, ROW, "german")
    assert not patches(found).any()
    assert tokens(found).any()
    open_gates(model)
    assert patches(explain(model, processor, ROW, "german")).any()


@every_kind
def test_words_of_an_answer_have_relevances_of_their_own(kind):
    model, processor = make(kind), make_llm_processor()
    first, second = (explain(model, processor, ROW, "german", answer="blue dog", word=word) for word in (0, 1))
    assert (first.word, second.word) == ("blue", "dog")
    assert not np.allclose(patches(first), patches(second))


@every_kind
def test_the_answer_is_what_the_model_writes(kind):
    model, processor = make(kind), make_llm_processor()
    written = model.generate("german", **processor(text=[ROW["text"]], images=[ROW["image"]]))
    expected = processor.batch_decode(written, skip_special_tokens=True)[0].strip()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert explain(model, processor, ROW, "german").answer == expected
    again = model.generate("german", **processor(text=[ROW["text"]], images=[ROW["image"]]))
    assert torch.equal(written, again)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "gpt-neox"])
@every_kind
def test_other_families(kind, family):
    found = explain(make(kind, family), make_llm_processor(), ROW, "german")
    assert patches(found).any()
    assert tokens(found).any()


def test_what_cannot_be_followed():
    processor = make_llm_processor()
    with pytest.raises(ValueError, match="reads more than the text of a row, which integrated_gradients does"):
        explain(make("behind"), processor, ROW, "german", "integrated_gradients")
    with pytest.raises(ValueError, match=r"The language model \('mamba'\) has no attention of all tokens to all"):
        explain(make("behind", "mamba"), processor, ROW, "german")


def test_words_and_pictures_of_messages_and_of_columns_with_other_names(tmp_path, without_shares):
    model, processor = make("behind"), make_llm_processor()
    picture = tmp_path / "a.png"
    make_image(1).save(picture)
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "red dog"}]
    messages = {"messages": [{"role": "user", "content": parts}]}
    text = processor.without_chat(messages)["text"]
    expected = explain(model, processor, {"text": text, "image": str(picture)}, task="german")
    found = explain(model, processor, messages, task="german")
    assert found.text == text
    np.testing.assert_allclose(tokens(found), tokens(expected))
    np.testing.assert_allclose(patches(found), patches(expected))
    processor.input_columns = {"text": ["title"], "image": ["photo"]}
    named = explain(model, processor, {"title": text, "photo": str(picture)}, task="german")
    np.testing.assert_allclose(tokens(named), tokens(expected))
    np.testing.assert_allclose(patches(named), patches(expected))


def test_tokens_of_a_prompt_that_was_cut_on_the_left(without_shares):
    model, processor = make("behind"), make_llm_processor()
    processor.tokenizer.truncation_side = "left"
    text = "the dog ran to the park " * 200 + "a red cat sat on the mat"
    explanation = explain(model, processor, {"text": text}, "topic", "random")
    most = longest_prompt(model.config)
    ids = processor(text=[text], max_length=most)["input_ids"][0]
    assert len(ids) == len(explanation.tokens) == most
    assert " ".join(token.token for token in explanation.tokens) == processor.tokenizer.decode(ids).replace("##", "")
    assert explanation.tokens[-1].end == len(text)
