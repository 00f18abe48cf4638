"""Explanations of rows as they come in tables, and of models as people have them: frozen, with adapters, with sound."""

import datasets
import numpy as np
import pytest
from tiny import FUSION_KINDS, make_clip, make_feature_extractor, make_image, make_model, make_processor, make_tokenizer

from mm_transformers import MMTransformerProcessor, Regression, Retrieval
from mm_transformers.analysis import explain


pytestmark = pytest.mark.usefixtures("without_shares")
ROW = {"text": "a cat sat on the mat", "image": make_image(1)}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def relevances(explanation) -> np.ndarray:
    patches = [image.patches.flatten() for image in explanation.images]
    return np.concatenate([[token.relevance for token in explanation.tokens], *patches])


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [["text"], ["vision"], ["text", "vision"]])
def test_integrated_gradients_go_through_frozen_encoders(freeze, processor):
    pytest.importorskip("captum")
    model = make_model(freeze=freeze)
    found = explain(model, processor, ROW, "topic", "integrated_gradients")
    expected = explain(make_model(), processor, ROW, "topic", "integrated_gradients")
    np.testing.assert_allclose(relevances(found), relevances(expected), rtol=1e-3, atol=1e-6)
    assert all(model.model.is_frozen(name) for name in freeze)


@pytest.mark.parametrize("task", ["score", "entities", "pairs", "tags"])
def test_integrated_gradients_of_other_tasks(task, processor):
    pytest.importorskip("captum")
    model = make_model()
    if task == "pairs":
        model = make_model(tasks=[Retrieval("pairs", embedding_size=8)])
    found = explain(model, processor, ROW, task, "integrated_gradients")
    assert np.isfinite(relevances(found)).all()
    assert np.abs(relevances(found)).max() > 0
    again = explain(model, processor, ROW, task, "chefer")
    assert found.answer == again.answer
    assert found.score == pytest.approx(again.score, rel=1e-4)


def test_labels_of_words_may_be_given_one_by_one(processor):
    model = make_model()
    says = explain(model, processor, ROW, "entities")
    same = explain(model, processor, ROW, "entities", answer=says.answer)
    assert same.score == pytest.approx(says.score)
    assert relevances(same) == pytest.approx(relevances(says))
    with pytest.raises(ValueError, match="the answer has 2 labels for 6 words"):
        explain(model, processor, ROW, "entities", answer=["O", "NAME"])


@pytest.mark.parametrize("kind", [kind for kind in FUSION_KINDS if kind != "late"])
@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_raw_attention_knows_no_answer(kind, method, processor):
    model = make_model(fusion_type=kind)
    first, second = (explain(model, processor, ROW, "topic", method, answer=label) for label in ("animals", "food"))
    assert relevances(first) == pytest.approx(relevances(second), abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [None, {"kind": "resampler", "num_tokens": 3}])
def test_models_with_adapters(reduction, processor):
    """Adapters start as nothing, so all is as without; and they are looked through, not removed."""
    peft = pytest.importorskip("peft")
    model = make_model(vision_token_reduction=reduction)
    expected = explain(model, processor, ROW, "topic")
    lora = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=model.new_modules)
    wrapped = peft.get_peft_model(make_model(vision_token_reduction=reduction), lora)
    found = explain(wrapped, processor, ROW, "topic")
    np.testing.assert_allclose(relevances(found), relevances(expected), rtol=1e-4, atol=1e-7)
    assert isinstance(wrapped, peft.PeftModel)


def test_rows_of_tables_may_have_other_columns(processor):
    model = make_model()
    cells = [{"text": "a cat", "lang": "en", "topic": "food"}, {"text": "x", "lang": "de", "topic": None}]
    rows = datasets.Dataset.from_list(cells)
    found = explain(model, processor, rows, "topic")
    assert [one.text for one in found] == ["a cat", "x"]
    assert explain(model, processor, rows[0], "topic").text == "a cat"
    with pytest.raises(ValueError, match="has the key 'images'; did you mean 'image'"):
        explain(model, processor, {"text": "a", "images": make_image()}, "topic")


def test_rows_are_numbered_from_the_first_of_all(processor):
    rows = [{"text": "a cat sat"}, {"text": "a cat sat"}, {"text": "cat"}]
    with pytest.raises(ValueError, match="Row 2 has no word 2"):
        explain(make_model(), processor, rows, "entities", word=2, batch_size=1)
    with pytest.raises(ValueError, match="word must be at least 0, but is -1"):
        explain(make_model(), processor, rows, "entities", word=-1)


def test_sound_that_the_encoder_does_not_hear_has_no_time():
    """Whisper's window is one second here; of a longer clip the rest is cut off."""
    model = make_model(vision=None, audio="whisper")
    processor = MMTransformerProcessor(tokenizer=make_tokenizer(), feature_extractor=make_feature_extractor("whisper"))
    seconds = {}
    for length in (0.5, 1.0, 2.5):
        clip = {"array": make_clip(length), "sampling_rate": 16_000}
        (sound,) = explain(model, processor, {"text": "listen", "audio": clip}, "topic").sounds
        seconds[length] = sound.seconds
    assert seconds[2.5] == pytest.approx(1.0)
    assert seconds[1.0] == pytest.approx(1.0)


def test_numbers_have_no_other_answer(processor):
    model = make_model(tasks=[Regression("rating")])
    with pytest.raises(ValueError, match="answers with a number"):
        explain(model, processor, ROW, "rating", "integrated_gradients", answer=2.0)
