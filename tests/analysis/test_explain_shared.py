"""Explanations that others notice nothing of: threads, modes, exceptions; and how much rests on each modality."""

import itertools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import first_quickly
from tiny import (
    SEQ2SEQ,
    VISION_ENCODERS,
    make_clip,
    make_feature_extractor,
    make_image,
    make_model,
    make_tokenizer,
)
from transformers import ViTImageProcessor
from writers import make_writer

from mm_transformers import Generation, MMTransformerProcessor, TokenClassification
from mm_transformers.analysis import explain
from mm_transformers.analysis.explaining import integrated_gradients
from mm_transformers.analysis.explaining.colors import heat_map
from mm_transformers.analysis.explaining.explanation import Explanation, ImageRelevance, TokenRelevance, strengths
from mm_transformers.analysis.explaining.html import colored_words, heat_map_url
from mm_transformers.analysis.explaining.own_copy import own_copy
from mm_transformers.analysis.explaining.shares import blank_text
from mm_transformers.analysis.explaining.token_places import patch_grid, sums_over_parts, sums_over_patches
from mm_transformers.model.predictions import Predictions


ROWS = [
    {"text": "a cat sat on the mat", "image": make_image(1)},
    {"text": "dog", "image": [make_image(2), make_image(3)]},
    {"text": "the sun is very lovely in the rain on the river"},
]


def make_processor(size=(32, 32), **kwargs) -> MMTransformerProcessor:
    image_processor = ViTImageProcessor(size={"height": size[0], "width": size[1]})
    return MMTransformerProcessor(image_processor, make_tokenizer(), **kwargs)


def make_sensitive(**kwargs) -> torch.nn.Module:
    """A model whose answers depend on everything that it reads, by much."""
    model, generator = make_model(**kwargs), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def state_of(model) -> list:
    """All that an explanation might change: modes, hooks, configs, gradients."""
    state: list = []
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state.append((module.training, *map(len, hooks)))
        if hasattr(module, "config"):
            state.append((module.config._attn_implementation, id(module.config), module.config.to_json_string()))
    state.append([(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()])
    return [*state, list(model.model._frozen_encoders)]


def relevances(explanation) -> np.ndarray:
    patches = [image.patches.flatten() for image in explanation.images]
    return np.concatenate([[token.relevance for token in explanation.tokens], *patches])


# Threads


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_threads_get_the_answers_of_one_and_leave_no_trace(training):
    """Explanations of several rows and methods at once, beside plain answers of the same model."""
    model, processor = make_sensitive(freeze=["vision"]), make_processor()
    model.train(training)
    before = state_of(model)
    questions = [(row, method) for row in ROWS for method in ("chefer", "rollout")] * 4
    inputs = processor(text=[ROWS[0]["text"]], images=[ROWS[0]["image"]])
    expected = [explain(model, processor, row, "topic", method) for row, method in questions[:6]]
    answer = None if training else Predictions.of(model, inputs).answers(processor, ["topic"])

    def ask(question):
        row, method = question
        found = explain(model, processor, row, "topic", method)
        # In training mode the mode itself would be changed for others.
        return found, None if training else Predictions.of(model, inputs).answers(processor, ["topic"])

    with ThreadPoolExecutor(6) as threads:
        for number, (found, beside) in enumerate(threads.map(ask, questions)):
            assert found.answer == expected[number % 6].answer
            assert [t.token for t in found.tokens] == [t.token for t in expected[number % 6].tokens]
            np.testing.assert_allclose(relevances(found), relevances(expected[number % 6]), rtol=1e-3, atol=1e-6)
            assert beside == answer
    assert state_of(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chefer", "integrated_gradients"])
def test_nothing_is_left_behind_by_an_exception(method):
    if method == "integrated_gradients":
        pytest.importorskip("captum")
    model, processor = make_model(freeze=["text"]).train(), make_processor()
    before = state_of(model)
    explain(model, processor, ROWS[0], "topic", method)
    assert state_of(model) == before

    def fail(module, args, output):
        raise RuntimeError("broken")

    hook = model.model.fusion.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        explain(model, processor, ROWS[0], "topic", method)
    hook.remove()
    with pytest.raises(ValueError, match="not one of"):
        explain(model, processor, ROWS[0], "topic", method, answer="cars")
    assert state_of(model) == before


def test_a_copy_shares_all_weights_and_nothing_else():
    model = make_writer("bart", tasks=[Generation("german", max_length=8)])
    model.starting_point = {"weights": torch.ones(3)}
    copied = own_copy(model)
    pairs = list(zip(model.modules(), copied.modules(), strict=True))
    assert all(one is not other and type(one) is type(other) for one, other in pairs)
    for name, parameter in model.named_parameters():
        assert copied.get_parameter(name) is parameter
    assert all(one is other for one, other in zip(model.buffers(), copied.buffers(), strict=True))
    assert copied.starting_point["weights"] is model.starting_point["weights"]
    assert copied.config.text_config is copied.model.text_model.config is not model.config.text_config
    copied.train().model.register_forward_hook(lambda *args: None)
    copied.config.text_config._attn_implementation = "eager"
    assert not model.training
    assert not model.model._forward_hooks
    assert model.config.text_config._attn_implementation != "eager"
    with torch.no_grad():
        next(model.parameters()).fill_(7.0)
    assert (next(copied.parameters()) == 7.0).all()


# Encoder-decoders whose encoder has a layer of word embeddings of its own


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chefer", "integrated_gradients"])
@pytest.mark.parametrize("freeze", [None, ["text"]])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_all_that_write_are_explained(kind, freeze, method, monkeypatch):
    """With frozen encoders as with others; the score is what the decoder says of the tokens of the answer."""
    if method == "integrated_gradients":
        pytest.importorskip("captum")
        # How near their sum comes to the difference of scores is tested below.
        monkeypatch.setattr(integrated_gradients, "NUM_STEPS", (8,))
    model = make_writer(kind, tasks=[Generation("german", max_length=8)], freeze=freeze)
    processor = make_processor()
    found = explain(model, processor, ROWS[0], "german", method, answer="the cat")
    inputs = processor(text=[ROWS[0]["text"]], images=[ROWS[0]["image"]])
    ids = [*processor.tokenizer("the cat", add_special_tokens=False)["input_ids"], processor.tokenizer.sep_token_id]
    logits = written_logits(model, inputs, ids)
    assert found.score == pytest.approx(float(logits[range(len(ids)), ids].sum()), rel=1e-3, abs=1e-3)
    assert any(token.relevance != 0 for token in found.tokens)
    assert np.abs(relevances(found)).sum() > 0
    if method == "chefer":
        other = explain(make_writer(kind, tasks=[Generation("german", max_length=8)]), processor, ROWS[0], "german",
                        answer="the cat")  # fmt: skip
        np.testing.assert_allclose(relevances(found), relevances(other), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def written_logits(model, inputs, ids) -> torch.Tensor:
    """(tokens, vocabulary), by the model's own forward pass."""
    return model(**inputs, labels={"german": torch.tensor([ids])}).logits["german"][0]


# Integrated gradients sum to the difference of scores


@pytest.mark.parametrize(
    ("vision", "size"),
    first_quickly([*itertools.product(["resnet", "convnextv2", "swin"], [(64, 28), (32, 32), (36, 36), (45, 50)])]),
)
def test_relevances_sum_to_the_difference_of_scores_whatever_the_size(vision, size):
    pytest.importorskip("captum")
    check_completeness(make_sensitive(vision=vision), make_processor(size), ROWS[0])


@pytest.mark.parametrize("text", first_quickly(["bert", "roberta", "t5", "deberta-v2"]))
def test_relevances_sum_to_the_difference_of_scores_for_every_text_encoder(text):
    pytest.importorskip("captum")
    processor = make_processor()
    processor.tokenizer = make_tokenizer(1 if text == "roberta" else 0)
    check_completeness(make_sensitive(text=text), processor, ROWS[1])


@pytest.mark.parametrize("seconds", first_quickly([0.0713, 0.05, 0.1001]))
def test_relevances_of_sounds_sum_to_the_difference_of_scores(seconds):
    """Clips of no whole number of tokens, beside a longer one in the batch."""
    pytest.importorskip("captum")
    model = make_sensitive(audio="wav2vec2")
    processor = make_processor(feature_extractor=make_feature_extractor("wav2vec2"))
    clips = [{"array": make_clip(s), "sampling_rate": 16_000} for s in (seconds, 0.2)]
    rows = [{"text": "listen", "image": make_image(4), "audio": clip} for clip in clips]
    found = explain(model, processor, rows, "topic", "integrated_gradients")[0]
    total = relevances(found).sum() + sum(sound.steps.sum() for sound in found.sounds)
    expected = difference(model, processor, rows[0], found.answer)
    assert total == pytest.approx(expected, rel=0.03, abs=1e-4)
    assert abs(sum(float(sound.steps.sum()) for sound in found.sounds)) > 1e-5


def check_completeness(model, processor, row) -> None:
    found = explain(model, processor, row, "topic", "integrated_gradients")
    expected = difference(model, processor, row, found.answer)
    assert abs(expected) > 1e-3
    assert relevances(found).sum() == pytest.approx(expected, rel=0.012, abs=1e-5)
    for image in found.images:
        assert np.abs(image.patches).sum() > 0


@torch.no_grad()
def difference(model, processor, row, answer) -> float:
    """By hand: the logit of the answer, less that with padding for words, grey pictures and silence."""
    audio = {} if "audio" not in row else {"audio": [row["audio"]]}
    inputs = processor(text=[row["text"]], images=[row["image"]], **audio)
    label = model.tasks["topic"].labels.index(answer)
    table, tokenizer, ids = model.get_input_embeddings(), processor.tokenizer, inputs["input_ids"]
    words = torch.tensor([[int(i) not in tokenizer.all_special_ids for i in ids[0]]])
    score = model(**inputs).logits["topic"][0, label]
    calls = []

    def blank(module, args, output):
        calls.append(output)
        return module.weight[torch.where(words, tokenizer.pad_token_id, ids)] if len(calls) == 1 else output

    hook = table.register_forward_hook(blank)
    floats = ("pixel_values", "input_values")
    grey = {name: torch.zeros_like(x) if name in floats else x for name, x in inputs.items()}
    blanked = model(**grey).logits["topic"][0, label]
    hook.remove()
    return float(score - blanked)


def test_every_pixel_counts_once():
    """Whole patches, pixels that are left over, and more parts than divide the length."""
    pixels = torch.randn(45, 50, dtype=torch.float64)
    vit = VISION_ENCODERS["vit"]()
    by_hand = torch.zeros(5, 6, dtype=torch.float64)
    for y, x in itertools.product(range(45), range(50)):
        by_hand[min(y // 8, 4), min(x // 8, 5)] += pixels[y, x]
    torch.testing.assert_close(sums_over_patches(vit, pixels, (5, 6)), by_hand)
    for parts in (1, 3, 7, 44, 45):
        sums = sums_over_parts(pixels.T, parts)
        assert sums.shape == (50, parts)
        torch.testing.assert_close(sums.sum(-1), pixels.sum(0))
        one_by_one = torch.zeros(50, parts, dtype=torch.float64)
        for i in range(45):
            one_by_one[:, i * parts // 45] += pixels[i]
        torch.testing.assert_close(sums, one_by_one)


@pytest.mark.parametrize("size", [(32, 32), (36, 36), (40, 28), (44, 60), (28, 52)])
def test_padded_stages_lie_in_their_grid(size):
    """Swin pads rows and columns that are no whole patch: the number of tokens by the model itself."""
    model = make_model(vision="swin")
    with torch.no_grad():
        states = model.model.vision_model(torch.zeros(1, 3, *size), output_hidden_states=True)
    expected = tuple(states.reshaped_hidden_states[-1].shape[2:])
    assert patch_grid(model.config.vision_config, states.last_hidden_state.shape[1], *size) == expected


# How much rests on each modality


def shares_by_hand(model, processor, row, label: int) -> dict[str, float]:
    """
    Two orders, two gains each; blank inputs are made by hand, one forward pass for each set of modalities. Sizes are
    means over grey, dark and bright pictures.
    """
    inputs = processor(text=[row["text"]], images=[row["image"]])
    ids = inputs["input_ids"]
    words = torch.tensor([[int(i) not in processor.tokenizer.all_special_ids for i in ids[0]]])
    of_text, of_vision = [], []
    for level in (0.0, -1.0, 1.0):
        worth = {}
        for text, vision in itertools.product([False, True], repeat=2):
            given = dict(inputs)
            if not text:
                given["input_ids"] = torch.where(words, processor.tokenizer.pad_token_id, ids)
            if not vision:
                given["pixel_values"] = torch.zeros_like(inputs["pixel_values"]) + level
            with torch.no_grad():
                worth[text, vision] = float(model(**given).logits["topic"][0, label])
        of_text.append(abs(worth[True, True] - worth[False, True] + worth[True, False] - worth[False, False]))
        of_vision.append(abs(worth[True, True] - worth[True, False] + worth[False, True] - worth[False, False]))
    total = sum(of_text) + sum(of_vision)
    return {"text": sum(of_text) / total, "vision": sum(of_vision) / total}


@pytest.mark.parametrize("method", first_quickly(["chefer", "rollout", "random"]))
@pytest.mark.parametrize("linear_probe", [False, True])
def test_shares_are_shapley_values_of_the_score(linear_probe, method):
    model, processor = make_sensitive(linear_probe=linear_probe), make_processor()
    for row in ROWS[:2]:
        found = explain(model, processor, row, "topic", method)
        expected = shares_by_hand(model, processor, row, model.tasks["topic"].labels.index(found.answer))
        assert found.shares == pytest.approx(expected, abs=1e-3)
        assert min(expected.values()) > 0.001
    together = explain(model, processor, ROWS, "topic", method)
    for row, found in zip(ROWS, together, strict=True):
        assert found.shares == pytest.approx(explain(model, processor, row, "topic", method).shares, abs=1e-3)
    assert together[2].shares == {"text": pytest.approx(1.0)}
    assert json.loads(json.dumps(together[0].to_dict()))["shares"] == together[0].shares


@pytest.mark.parametrize("method", ["chefer", "rollout", "attention", "random"])
def test_a_picture_that_changes_nothing_is_not_coloured(method):
    """Its tokens become 0, so shuffling pictures changes nothing; there is still one, which may change something."""
    model, processor = make_sensitive(), make_processor()
    with torch.no_grad():
        for parameter in model.model.vision_projection.parameters():
            parameter.zero_()
    first, second = (explain(model, processor, {"text": ROWS[0]["text"], "image": make_image(i)}, "topic", method)
                     for i in (1, 5))  # fmt: skip
    assert first.score == pytest.approx(second.score, rel=1e-4)
    assert first.shares == {"text": pytest.approx(1.0), "vision": pytest.approx(0.0, abs=1e-4)}
    assert first.rests_on == "text 100%, image 0%"
    picture = first.images[0]
    untouched = heat_map(picture.image, np.zeros_like(picture.pixels))
    shown = heat_map(picture.image, picture.pixels * first.scales["vision"])
    np.testing.assert_allclose(shown, untouched, atol=1e-2)
    assert max(strength for _, strength in strengths(first)) == pytest.approx(1.0)


def explanation_of(text_share: float, image_share: float) -> Explanation:
    patches = np.array([[0.0, 3.0], [1.0, 2.0]], dtype=np.float32)
    image = ImageRelevance(make_image(1, size=(8, 8)), patches, patches.repeat(4, 0).repeat(4, 1))
    tokens = [TokenRelevance("cat", 2, 5, 0.002), TokenRelevance("a", 0, 1, 0.001)]
    shares = {"text": text_share, "vision": image_share}
    return Explanation("topic", "animals", 1.0, "chefer", "a cat", tokens, [image], [], None, shares)


def test_colours_are_on_one_scale_for_all_modalities():
    """By shares, not by relevances, of which patches have others than words."""
    found = explanation_of(0.75, 0.25)
    assert dict(strengths(found)) == {"cat": pytest.approx(1.0), "a": pytest.approx(0.5)}
    assert found.images[0].pixels.max() * found.scales["vision"] == pytest.approx(1 / 3)
    assert found.rests_on == "text 75%, image 25%"
    assert "depends on: text 75%, image 25%" in found.plot().get_suptitle()
    hot, pale, none = (explanation_of(*shares) for shares in ((0.0, 1.0), (0.9, 0.1), (1.0, 0.0)))
    reds = [redness(one) for one in (hot, pale, none)]
    assert reds[0] > 4 * reds[1] > 0
    assert reds[2] == pytest.approx(0, abs=1e-6)
    nothing = explanation_of(0.0, 0.0)
    assert not any(nothing.scales.values())
    white = colored_words(nothing)[0][1]
    assert all(background == white for _, background, _ in colored_words(nothing))
    assert heat_map_url(nothing, nothing.images[0]) == heat_map_url(none, none.images[0])


def redness(explanation: Explanation) -> float:
    image = explanation.images[0]
    shown = heat_map(image.image, image.pixels * explanation.scales["vision"])
    return float((shown[..., 0] - shown[..., 2]).max())


def test_shares_come_first_on_pages(tmp_path):
    from mm_transformers.analysis.report import write_report
    from mm_transformers.cli.page import answers_as_html

    model, processor = make_sensitive(), make_processor()
    told = explain(model, processor, ROWS[0], "topic").rests_on
    page = answers_as_html(model, processor, ROWS[0], ["topic"], ("text", "image"))
    assert page.index(f"Depends on: {told}") < page.index('<p class="text">') < page.index('class="heat"')
    write_report(tmp_path / "report.html", model, processor, [{**ROWS[0], "topic": "food"}], tasks=["topic"])
    report = (tmp_path / "report.html").read_text()
    card = re.search(r'<article class="card">(.*?)</article>', report, re.S)[1]
    assert card.index(f"Depends on: {told}") < card.index("<img")
    assert math.isclose(sum(int(x) for x in re.findall(r"(\d+)%", told)), 100, abs_tol=1)


def test_blank_texts_hold_no_words_known_or_not():
    tokenizer = make_processor().tokenizer
    ids = tokenizer(["a cat 漢 dog", "漢 漢"], padding=True, return_tensors="pt")["input_ids"]
    blank = blank_text(tokenizer, ids)
    kept = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}
    assert set(blank.flatten().tolist()) == kept
    assert (blank == ids)[torch.isin(ids, torch.tensor(sorted(kept)))].all()


def test_integrated_gradients_of_a_word_are_those_of_the_row_alone():
    pytest.importorskip("captum")
    task = TokenClassification("entities", labels=["none", "animal"])
    model, processor = make_sensitive(tasks=[task]), make_processor()
    rows = [{"text": "a red cat in the rain"}, {"text": "the dog"}]
    alone = [explain(model, processor, row, "entities", "integrated_gradients", word=1) for row in rows]
    together = explain(model, processor, rows, "entities", "integrated_gradients", word=1)
    for one, other in zip(together, alone, strict=True):
        assert one.answer == other.answer
        np.testing.assert_allclose(relevances(one), relevances(other), rtol=1e-3, atol=1e-5)
