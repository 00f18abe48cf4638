"""Explanations: shapes and places, what must be zero, what stays as it was."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import (
    AUDIO_ENCODERS,
    FUSION_KINDS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_clip,
    make_image,
    make_model,
    make_processor,
    open_gates,
)
from writers import make_writer

from mm_transformers import Classification, Generation, Matching, Regression, Retrieval
from mm_transformers.analysis import explain
from mm_transformers.analysis.explaining.input_relevance import relevance_of_inputs
from mm_transformers.analysis.explaining.methods import ATTENTION_METHODS
from mm_transformers.analysis.explaining.recording import watched
from mm_transformers.analysis.explaining.token_places import patch_grid, seen_region, spread_over_pixels, token_spans


pytestmark = pytest.mark.usefixtures("without_shares")
ROW = {"text": "a cat sat on the mat", "image": make_image(1)}
ATTENTION = list(ATTENTION_METHODS)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def patches(explanation) -> np.ndarray:
    return np.concatenate([image.patches.flatten() for image in explanation.images])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUSION_KINDS)
@pytest.mark.parametrize("method", [*ATTENTION, "random"])
def test_every_kind_and_method_places_relevance(kind, method, processor):
    explanation = explain(make_model(fusion_type=kind), processor, ROW, "topic", method)
    assert explanation.answer in ("animals", "food", "travel")
    (image,) = explanation.images
    assert image.patches.shape == (4, 4)
    assert image.pixels.shape == (ROW["image"].height, ROW["image"].width)
    assert (image.patches >= 0).all()
    assert image.patches.max() > 0
    assert "".join(t.token for t in explanation.tokens if t.start < t.end) == ROW["text"].replace(" ", "")
    assert [word.token for word in explanation.words] == ROW["text"].split()
    assert any(token.relevance > 0 for token in explanation.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FUSION_KINDS if kind != "late"])
@pytest.mark.parametrize("method", ["chefer", "gradient_attention"])
def test_a_closed_gate_gives_pictures_no_relevance(kind, method, processor):
    model = make_model(fusion_type=kind, gates_open=False)
    explanation = explain(model, processor, ROW, "topic", method)
    assert not patches(explanation).any()
    assert any(token.relevance > 0 for token in explanation.tokens)
    open_gates(model)
    assert patches(explain(model, processor, ROW, "topic", method)).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUSION_KINDS)
@pytest.mark.parametrize("method", ATTENTION)
def test_rows_do_not_disturb_each_other(kind, method, processor):
    """Rows of other lengths, with other numbers of pictures, and with the same picture: as if each came alone."""
    shared = make_image(2)
    rows = [
        {"text": "a cat", "image": shared},
        {"text": "the dog ran to the park and sat down", "image": [make_image(3), shared]},
        {"text": "no picture at all"},
        {"image": shared},
    ]
    model = make_model(fusion_type=kind)
    together = explain(model, processor, rows, "topic", method)
    for row, found in zip(rows, together, strict=True):
        alone = explain(model, processor, row, "topic", method)
        assert len(found.images) == len(alone.images)
        assert [t.token for t in found.tokens] == [t.token for t in alone.tokens]
        np.testing.assert_allclose(
            [t.relevance for t in found.tokens], [t.relevance for t in alone.tokens], rtol=1e-3, atol=1e-7
        )
        for one, other in zip(found.images, alone.images, strict=True):
            np.testing.assert_allclose(one.patches, other.patches, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXT_ENCODERS)
def test_text_encoders_are_looked_into(text):
    check_encoder("text", make_model(text=text), has_attention=True)


@pytest.mark.parametrize("vision", VISION_ENCODERS)
def test_vision_encoders_are_looked_into_or_stand_for_their_places(vision):
    has_attention = vision not in ("swin", "convnextv2", "resnet")
    check_encoder("vision", make_model(vision=vision), has_attention)


@pytest.mark.parametrize("audio", AUDIO_ENCODERS)
def test_audio_encoders_are_looked_into(audio):
    model = make_model(vision=None, audio=audio)
    processor = make_processor_with_sound(audio)
    clip = {"array": make_clip(0.2), "sampling_rate": 16_000}
    explanation = explain(model, processor, {"text": "listen", "audio": clip}, "topic")
    (sound,) = explanation.sounds
    assert sound.steps.ndim == 1
    assert sound.steps.max() > 0
    if audio != "ast":  # whose window is longer than the clip
        assert sound.seconds == pytest.approx(0.2)


def make_processor_with_sound(audio: str):
    from tiny import make_feature_extractor, make_tokenizer

    from mm_transformers import MMTransformerProcessor

    return MMTransformerProcessor(tokenizer=make_tokenizer(), feature_extractor=make_feature_extractor(audio))


def check_encoder(modality: str, model, has_attention: bool) -> None:
    """All of its layers are seen, lie on the way to the answer, and change the relevance of what went in."""
    from tiny import make_batch

    batch = make_batch(labels=False)
    with watched(model) as seen:
        outputs = model.model(**batch, output_attentions=True)
        scores = model(encoder_outputs=outputs).logits["topic"].amax(-1)
        layers = seen.encoders[modality]
        assert len(layers) == (2 if has_attention else 0)
        if has_attention:
            gradients = torch.autograd.grad(scores.sum(), layers, retain_graph=True, allow_unused=True)
            assert all(gradient is not None and gradient.any() for gradient in gradients)
        found = relevance_of_inputs(seen, outputs, scores, ATTENTION_METHODS["chefer"])
    assert found["text"].shape == batch["input_ids"].shape
    assert found["vision"].shape[:2] == batch["image_index"].shape
    for name, values in found.items():
        assert values.isfinite().all(), name
        assert (values >= 0).all(), name
    # Nothing is read of what is not there: the second row has no picture.
    assert not found["vision"][1].any()
    assert not found["text"][batch["attention_mask"] == 0].any()


@pytest.mark.parametrize("reduction", [{"kind": "merge", "num_tokens": 5}, {"kind": "resampler", "num_tokens": 3}])
def test_fewer_tokens_are_told_of_all_patches(reduction, processor):
    explanation = explain(make_model(vision_token_reduction=reduction), processor, ROW, "topic")
    assert explanation.images[0].patches.shape == (4, 4)
    assert (patches(explanation) > 0).all()


def test_merging_knows_the_shares_of_tokens():
    from mm_transformers.model.token_reduction import TokenMerging

    torch.manual_seed(0)
    # So small that what is merged first would be another, were the shares compared as well.
    tokens = 0.05 * torch.randn(30, 17, 8)
    merging = TokenMerging(None, 5)
    shares = merging.shares(tokens)
    assert shares.shape == (30, 5, 17)
    torch.testing.assert_close(shares.sum(-1), torch.ones(30, 5))
    torch.testing.assert_close(shares @ tokens, merging(tokens))


def test_words_are_explained_one_by_one(processor):
    model = make_model()
    first = explain(model, processor, ROW, "entities", word=1)
    assert first.word == "cat"
    assert isinstance(first.answer, str)
    all_words = explain(model, processor, ROW, "entities")
    assert len(all_words.answer) == 6
    assert first.tokens != explain(model, processor, ROW, "entities", word=5).tokens
    with pytest.raises(ValueError, match=r"Row 0 has no word 6: the model reads only 6 words"):
        explain(model, processor, ROW, "entities", word=6)
    with pytest.raises(ValueError, match="has one answer for the whole row"):
        explain(model, processor, ROW, "topic", word=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUSION_KINDS)
def test_other_answers_have_other_reasons(kind, processor):
    model = make_model(fusion_type=kind)
    found = [explain(model, processor, ROW, "topic", answer=label) for label in ("animals", "food", "travel")]
    assert [explanation.answer for explanation in found] == ["animals", "food", "travel"]
    best = explain(model, processor, ROW, "topic")
    assert best.score == max(explanation.score for explanation in found)
    assert not np.allclose(patches(found[0]) / patches(found[0]).sum(), patches(found[1]) / patches(found[1]).sum())
    with pytest.raises(ValueError, match="label 'cars' is not one of"):
        explain(model, processor, ROW, "topic", answer="cars")


def test_tasks_that_read_the_encoders_or_give_numbers(processor):
    tasks = [Retrieval("pairs", embedding_size=8), Matching("fits"), Regression("rating")]
    model = make_model(tasks=tasks)
    for name in ("pairs", "fits", "rating"):
        explanation = explain(model, processor, ROW, name)
        assert patches(explanation).max() > 0, name
        assert np.isfinite(explanation.score)
    yes, no = (explain(model, processor, ROW, "fits", answer=answer) for answer in (True, False))
    assert yes.score == pytest.approx(-no.score)
    assert explain(model, processor, ROW, "rating").answer == pytest.approx(
        explain(model, processor, ROW, "rating").score
    )
    with pytest.raises(ValueError, match="answers with a number"):
        explain(model, processor, ROW, "rating", answer=3.0)


@pytest.mark.parametrize("freeze", [None, ["text", "vision"]])
def test_the_model_is_left_as_it_was(freeze, processor):
    model = make_model(freeze=freeze).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    explanation = explain(model, processor, ROW, "topic")
    assert patches(explanation).max() > 0
    assert model.training
    assert model.model.vision_model.training == (freeze is None)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == implementations
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    frozen = explain(make_model(freeze=None), processor, ROW, "topic")
    np.testing.assert_allclose(patches(explanation), patches(frozen), rtol=1e-4)


def test_half_precision(processor):
    model = make_model().to(torch.bfloat16)
    assert patches(explain(model, processor, ROW, "topic")).max() > 0


def test_values_for_json_and_a_figure(processor, tmp_path):
    rows = {"text": "5 $ for a $ mat " + "w" * 90, "image": [make_image(1), make_image(2)]}
    explanation = explain(make_model(), processor, rows, "topic")
    values = json.loads(json.dumps(explanation.to_dict()))
    assert values["answer"] == explanation.answer
    assert np.shape(values["images"]) == (2, 4, 4)
    explanation.plot().savefig(tmp_path / "why.png")
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.width > 300
    assert [word.token for word in explanation.words] == rows["text"].split()


def test_what_cannot_be_explained_is_told(processor):
    model = make_model()
    with pytest.raises(ValueError, match="Choose the task"):
        explain(model, processor, ROW)
    with pytest.raises(ValueError, match="no task 'topik'; did you mean 'topic'"):
        explain(model, processor, ROW, "topik")
    with pytest.raises(ValueError, match="method must be one of chefer"):
        explain(model, processor, ROW, "topic", "shap")
    with pytest.raises(ValueError, match="Row 0 has neither a text nor an image"):
        explain(model, processor, {}, "topic")
    with pytest.raises(ValueError, match="Row 1"):
        explain(model, processor, [ROW, {"text": "x", "image": "missing.png"}], "topic")
    one_task = make_model(tasks=[Classification("topic", labels=["a", "b"])])
    assert explain(one_task, processor, ROW).task == "topic"


# Places


@given(st.text(alphabet="abc DEF,.ü", min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_spans_of_tokens_are_their_words(text):
    tokenizer = make_processor().tokenizer
    ids = tokenizer(text, verbose=False)["input_ids"]
    spans = token_spans(tokenizer, text, ids)
    assert len(spans) == len(ids)
    shown = [text[start:end] for start, end in spans if start < end]
    assert not any(piece != piece.strip() for piece in shown)
    assert "".join(shown) == "".join(text.split())[: len("".join(shown))]


class SlowTokenizer:
    """As sentencepiece's: no offsets, a mark where a word begins."""

    is_fast = False
    all_special_tokens = ("</s>",)

    def convert_ids_to_tokens(self, ids):
        return [["▁the", "▁cat", "s", "▁sat", ".", "</s>"][i] for i in ids]


def test_spans_of_tokenizers_without_offsets():
    text = "the cats  sat."
    spans = token_spans(SlowTokenizer(), text, list(range(6)))
    assert [text[start:end] for start, end in spans] == ["the", "cat", "s", "sat", ".", ""]


class SlowLeftTokenizer(SlowTokenizer):
    truncation_side = "left"

    def __call__(self, text, **options):
        return {"input_ids": text.split()}


def test_spans_of_the_end_of_a_long_text():
    text = "the cats sat. " * 1000 + "the cats  sat."
    spans = token_spans(SlowLeftTokenizer(), text, list(range(6)))
    assert [text[start:end] for start, end in spans] == ["the", "cat", "s", "sat", ".", ""]
    assert spans[0][0] == 14_000


def test_patches_lie_where_the_encoder_says():
    config = VISION_ENCODERS["vit"]()
    assert patch_grid(config, 17, 32, 32) == (4, 4)
    assert patch_grid(config, 8 * 4 + 1, 64, 32) == (8, 4)
    assert patch_grid(VISION_ENCODERS["swin"](), 16, 32, 32) == (4, 4)
    with pytest.raises(ValueError, match="cannot be coloured"):
        patch_grid(config, 5 * 31, 32, 32)


def test_the_middle_that_is_cut_out_is_where_the_relevance_is():
    processor = type("Clip", (), {"do_center_crop": True, "do_resize": True})()
    processor.size, processor.crop_size = {"shortest_edge": 100}, {"height": 80, "width": 80}
    # 300 x 200 becomes 150 x 100, of which the middle 80 x 80 is cut out: 160 x 160 of the picture.
    assert seen_region(processor, 300, 200) == (70.0, 20.0, 230.0, 180.0)
    pixels = spread_over_pixels(np.ones((4, 4)), 300, 200, (70.0, 20.0, 230.0, 180.0))
    assert pixels.sum() == 160 * 160
    assert (pixels[20:180, 70:230] == 1).all()
    processor.do_center_crop = False
    assert seen_region(processor, 300, 200) == (0.0, 0.0, 300.0, 200.0)


def test_one_patch_lies_over_its_own_pixels():
    patches = np.zeros((4, 4))
    patches[1, 2] = 1
    pixels = spread_over_pixels(patches, 40, 80, (0.0, 0.0, 40.0, 80.0))
    y, x = np.unravel_index(pixels.argmax(), pixels.shape)
    assert 20 <= y < 40
    assert 20 <= x < 30


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["marian", "bart", "t5"])
@pytest.mark.parametrize("kind", ["cross_attention", "late"])
def test_written_words_are_explained(writer, kind, processor):
    model = make_writer(writer, tasks=[Generation("german", max_length=8)], fusion_type=kind)
    written = explain(model, processor, [ROW, {"text": "a dog"}], "german", answer="the cat on")
    assert [explanation.answer for explanation in written] == ["the cat on"] * 2
    assert patches(written[0]).max() > 0
    one, other = (explain(model, processor, ROW, "german", answer="the cat on", word=word) for word in (0, 2))
    assert (one.word, other.word) == ("the", "on")
    whole = explain(model, processor, ROW, "german", answer="the cat on")
    assert one.score != other.score
    assert whole.score != one.score
    assert isinstance(explain(model, processor, ROW, "german").answer, str)
    with pytest.raises(ValueError, match="the answer 'the cat on' has no word 3"):
        explain(model, processor, ROW, "german", answer="the cat on", word=3)


def test_frames_of_videos_are_pictures(processor):
    frames = [make_image(i) for i in range(3)]
    explanation = explain(make_model(), processor, {"text": "a cat", "image": ROW["image"], "video": frames}, "topic")
    assert len(explanation.images) == 4
    assert [image.image.size for image in explanation.images[1:]] == [frame.size for frame in frames]
