"""The vectors of rows: of the fused states, of each modality, and of a retrieval task."""

import numpy as np
import pytest
import torch
from tiny import (
    make_audio_processor,
    make_batch,
    make_clip,
    make_image,
    make_model,
    make_processor,
    make_tasks,
    rows_of,
)
from transformers import pipeline

from mm_transformers import Classification, MMTransformerForMultiTask, Predictor, Retrieval


ROWS = [
    {"text": "a red dog", "image": make_image(1)},
    {"text": "the big cat is in the river", "image": None},
    {"text": "", "image": [make_image(2), make_image(3)]},
]


def inputs_of(rows, processor=None):
    processor = processor or make_processor()
    images = [row["image"] if isinstance(row["image"], list) else [row["image"]] for row in rows]
    images = [[image for image in row if image is not None] for row in images]
    return dict(processor(text=[row["text"] for row in rows], images=images))


def assert_equal(found, expected, **options):
    torch.testing.assert_close(found, expected, equal_nan=True, **{"rtol": 1e-5, "atol": 1e-5, **options})


@pytest.mark.parametrize("linear_probe", [False, True])
def test_vectors_by_hand(linear_probe):
    model = make_model(tasks=make_tasks(), linear_probe=linear_probe)
    inputs = inputs_of(ROWS)
    vectors = model.embed(**inputs)
    assert list(vectors) == ["fused", "text", "vision"]
    with torch.no_grad():
        assert_equal(vectors["fused"], model.model(**inputs).pooler_output)
        states = model.model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        pictures = model.model.vision_model(inputs["pixel_values"]).last_hidden_state.mean(1)
    for row in (0, 1):
        kept = inputs["attention_mask"][row].bool()
        assert_equal(vectors["text"][row], states[row, kept].mean(0))
    assert vectors["text"][2].isnan().all()
    first, second = inputs["image_index"][2].tolist()
    assert_equal(vectors["vision"][0], pictures[inputs["image_index"][0, 0]])
    assert_equal(vectors["vision"][2], (pictures[first] + pictures[second]) / 2)
    assert vectors["vision"][1].isnan().all()


@pytest.mark.parametrize("fusion", ["cross_attention", "bottleneck", "late"])
def test_a_batch_is_each_row_alone(fusion):
    model, batch = make_model(tasks=make_tasks(), fusion_type=fusion), make_batch(labels=False)
    together = model.embed(**batch)
    for row in range(4):
        alone = model.embed(**rows_of(batch, [row]))
        for name, vector in together.items():
            assert_equal(alone[name][0], vector[row])


def test_each_encoder_runs_once_and_the_mode_stays():
    model = make_model(tasks=make_tasks()).train()
    calls = []
    for module in (model.model.text_model, model.model.vision_model):
        module.register_forward_hook(lambda *_: calls.append(1))
    first, second = (model.embed(**make_batch(labels=False)) for _ in range(2))
    assert len(calls) == 4
    assert model.training
    assert_equal(first, second)


def test_unit_length_and_half_precision():
    model, inputs = make_model(tasks=make_tasks()), inputs_of(ROWS)
    plain, unit = model.embed(**inputs), model.embed(normalize=True, **inputs)
    for name, vector in unit.items():
        present = ~vector.isnan().any(-1)
        assert torch.equal(present, ~plain[name].isnan().any(-1))
        assert_equal(vector[present].norm(dim=-1), torch.ones(int(present.sum())))
        assert_equal(vector[present], plain[name][present] / plain[name][present].norm(dim=-1, keepdim=True))
    assert model.to(torch.bfloat16).embed(**inputs)["vision"].dtype == torch.float32


def test_sounds_without_their_padding():
    model = make_model(tasks=make_tasks(), vision=None, audio="wav2vec2")
    processor = make_audio_processor(images=False)
    clips = [{"array": make_clip(seconds, seed=1), "sampling_rate": 16_000} for seconds in (0.1, 0.3)]
    both = model.embed(**processor(text=["a", "the dog"], audio=clips))
    assert list(both) == ["fused", "text", "audio"]
    for i, text in enumerate(("a", "the dog")):
        inputs = processor(text=[text], audio=[clips[i]])
        alone = model.embed(**inputs)
        assert_equal(alone["audio"][0], both["audio"][i], atol=1e-4)
        assert_equal(alone["fused"][0], both["fused"][i], atol=1e-4)
        with torch.no_grad():
            states = model.model.audio_model(inputs["input_values"]).last_hidden_state
        assert_equal(alone["audio"][0], states[0].mean(0), atol=1e-4)


def test_the_vectors_of_a_retrieval_task():
    tasks = [Retrieval("captions", embedding_size=8), Classification("topic", labels=["a", "b"])]
    model, inputs = make_model(tasks=tasks), inputs_of(ROWS)
    vectors = model.embed("captions", **inputs)
    assert {name: tuple(value.shape) for name, value in vectors.items()} == {"text": (3, 8), "vision": (3, 8)}
    assert_equal(vectors["text"][:2], model.encode_text(**inputs)[:2])
    assert vectors["text"][2].isnan().all()
    pictures = model.encode_image(inputs["pixel_values"])
    assert_equal(vectors["vision"][0], pictures[0])
    assert vectors["vision"][1].isnan().all()
    alone = model.embed("captions", **make_processor()(text=["a red dog"]))
    assert_equal(alone["text"][0], vectors["text"][0])
    assert alone["vision"].isnan().all()
    with pytest.raises(ValueError, match="task must name a Retrieval task"):
        model.embed("topic", **inputs)


# Predictor and pipeline


def test_the_predictor_embeds_rows():
    model = make_model(tasks=make_tasks())
    predictor = Predictor(model, make_processor(), batch_size=2)
    found = predictor.embed(ROWS)
    expected = model.embed(**inputs_of(ROWS))
    assert predictor.embedding_widths() == {name: value.shape[1] for name, value in expected.items()}
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5)
    texts_only = predictor.embed(ROWS[1:2])
    assert np.isnan(texts_only["vision"]).all()
    assert texts_only["vision"].shape == (1, 24)
    with pytest.raises(ValueError, match="no rows"):
        predictor.embed([])


def test_the_pipeline_gives_vectors(tmp_path):
    model = make_model(tasks=[Retrieval("captions", embedding_size=8)])
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    pipe = pipeline("multimodal-feature-extraction", model=str(tmp_path))
    found = pipe(ROWS, batch_size=2)
    expected = model.embed(**inputs_of(ROWS))
    for row, vectors in enumerate(found):
        for name, vector in vectors.items():
            if vector is None:
                assert expected[name][row].isnan().all()
            else:
                np.testing.assert_allclose(vector, expected[name][row].numpy(), rtol=1e-4, atol=1e-5)
    one = pipe({"text": "a red dog"}, task_name="captions", normalize=True)
    assert one["vision"] is None
    assert np.linalg.norm(one["text"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="has no option 'normalise'; did you mean 'normalize'"):
        pipe("a red dog", normalise=True)


def test_loaded_models_embed_alike(tmp_path):
    model, inputs = make_model(tasks=make_tasks()), inputs_of(ROWS)
    model.save_pretrained(tmp_path)
    assert_equal(MMTransformerForMultiTask.from_pretrained(tmp_path).embed(**inputs), model.embed(**inputs))
