"""Every subset of text, pictures and sound in one model; what a row lacks, it lacks in training and inference alike."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    AUDIO_ENCODERS,
    FUSION_KINDS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_batch,
    make_clip,
    make_config,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_tokenizer,
    open_gates,
)
from transformers import BertConfig

from mm_transformers import (
    Classification,
    Generation,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.model.streams import drop_modalities


PROCESSOR = MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor())
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(("text", "images", "audio"), n)]
every_fusion = pytest.mark.parametrize("fusion", FUSION_KINDS)


def make_inputs(subsets) -> dict:
    """Row i has what subset i names, of its own."""
    media = {
        "text": [f"a cat {'very ' * i}lovely" if "text" in s else None for i, s in enumerate(subsets)],
        "images": [make_image(i) if "images" in s else None for i, s in enumerate(subsets)],
        "audio": [make_clip(0.03 + 0.01 * i, seed=i) if "audio" in s else None for i, s in enumerate(subsets)],
    }
    return dict(PROCESSOR(**media, sampling_rate=16_000))


@every_fusion
def test_every_subset_answers_as_it_does_alone(fusion):
    model = make_model(audio="wav2vec2", fusion_type=fusion)
    with torch.no_grad():
        together = model(**make_inputs(SUBSETS)).logits["topic"]
        for i, subset in enumerate(SUBSETS):
            # The same row, found by its place, with all the others empty of everything but a word.
            rows = [subset if j == i else ("text",) for j in range(len(SUBSETS))]
            alone = model(**make_inputs(rows)).logits["topic"][i]
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
    differences = (together[:, None] - together[None]).abs().amax(-1) + torch.eye(len(SUBSETS))
    assert differences.min() > 1e-7, "two subsets cannot be told apart"


@every_fusion
def test_every_subset_trains(fusion):
    model = make_model(audio="wav2vec2", fusion_type=fusion, modality_dropout={"text": 0.3, "vision": 0.3}).train()
    labels = {"topic": torch.arange(len(SUBSETS)) % 3}
    model(**make_inputs(SUBSETS), labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_fusion
def test_an_absent_text_is_one_learned_vector(fusion):
    """Whatever ids stand where there is no text, and however many, nothing of them is seen; the vector is."""
    model = make_model(fusion_type=fusion)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    pixels = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
    none = torch.zeros_like(ids)
    with torch.no_grad():
        outputs = model.model(input_ids=ids, attention_mask=none, pixel_values=pixels)
        torch.testing.assert_close(outputs.pooler_output[0], outputs.pooler_output[1])
        assert outputs.attention_mask.tolist() == [[True, False, False, False]] * 2
        shorter = model.model(input_ids=ids[:, :2], attention_mask=none[:, :2], pixel_values=pixels)
        torch.testing.assert_close(shorter.pooler_output, outputs.pooler_output)
        without = model.model(input_ids=ids, attention_mask=none)
        torch.testing.assert_close(without.pooler_output[0], model.model.null_text.weight)
        model.model.null_text.weight += 1
        assert (model.model(input_ids=ids, attention_mask=none).pooler_output - without.pooler_output).min() > 0.9


def test_a_decoder_reads_the_vector_too():
    bert = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37)
    decoder = BertConfig(**bert, bos_token_id=1, eos_token_id=2, pad_token_id=0, is_decoder=True)
    config = MMTransformerConfig(
        text_config=BertConfig(**bert), vision_config=VISION_ENCODERS["vit"](), decoder_config=decoder,
        tasks=[Generation("caption", max_length=6)],
    )  # fmt: skip
    torch.manual_seed(0)
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer())
    both = processor(text=["a lovely red cat", None], images=[make_image(0), make_image(1)])
    alone = processor(text=[None], images=[make_image(1)])
    together, single = model.generate(**both, num_beams=3), model.generate(**alone, num_beams=3)
    length = min(together.shape[1], single.shape[1])
    assert together[1, :length].tolist() == single[0, :length].tolist()
    assert model(**both, labels={"caption": torch.tensor([[5, 2], [6, 2]])}).loss.isfinite()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_dropout_never_takes_everything(data):
    names = ["text", "vision", "audio"]
    rows = data.draw(st.integers(1, 9))
    present = {n: torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))) for n in names}
    probabilities = {n: data.draw(st.floats(0, 0.99)) for n in data.draw(st.sets(st.sampled_from(names)))}
    kept = drop_modalities(present, probabilities)
    had_any, has_any = (torch.stack([x[n] for n in names]).any(0) for x in (present, kept))
    assert torch.equal(had_any, has_any)
    for name in names:
        assert not (kept[name] & ~present[name]).any(), "dropout gave a row what it did not have"
        if name not in probabilities:
            assert torch.equal(kept[name], present[name])


def test_dropout_is_per_row_and_as_frequent_as_asked():
    torch.manual_seed(0)
    everything = {name: torch.ones(20_000, dtype=torch.bool) for name in ("text", "vision", "audio")}
    kept = drop_modalities(everything, {"vision": 0.2, "audio": 0.7})
    assert kept["text"].all()
    assert kept["vision"].float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept["audio"].float().mean() == pytest.approx(0.3, abs=0.02)
    both = (kept["vision"] & kept["audio"]).float().mean()
    assert both == pytest.approx(0.8 * 0.3, abs=0.02), "they are not dropped independently"
    # Where all would go, all stay: of two, at 1/2 each, both are there in 1/4 + 1/4 of the rows.
    pair = drop_modalities({n: everything[n] for n in ("text", "vision")}, {"text": 0.5, "vision": 0.5})
    assert (pair["text"] & pair["vision"]).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dropped", ["text", "vision", "audio"])
def test_what_is_dropped_is_as_if_absent(dropped):
    """With (nearly) certain dropout a training step equals one of a batch that lacks the modality."""
    options = dict(fusion_dropout=0.0, classifier_dropout=0.0, audio="wav2vec2", frame_embedding="learned")
    model = make_model(**options, modality_dropout={dropped: 1 - 1e-9})
    plain = make_model(**options)
    for m in (model, plain):
        m.train()
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for tower in (m.model.text_model, m.model.audio_model):
            tower.eval()
    inputs = make_inputs([("text", "images", "audio")] * 3)
    argument = {"text": "text", "vision": "images", "audio": "audio"}[dropped]
    lacking = make_inputs([tuple({"text", "images", "audio"} - {argument})] * 3)
    for name, value in lacking.items():  # the same length of text, so that what is left is equal
        if name in inputs and name.startswith(("input_ids", "attention")) and dropped != "text":
            assert torch.equal(value, inputs[name])
    torch.testing.assert_close(
        model(**inputs).logits["topic"], plain(**lacking).logits["topic"], rtol=1e-4, atol=1e-5
    )  # fmt: skip
    model.eval()
    assert (model(**inputs).logits["topic"] - plain.eval()(**lacking).logits["topic"]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"modality_dropout\['vision'\] must be at least 0 and less than 1, but is 1.0"),
        (-0.1, "must be at least 0 and less than 1, but is -0.1"),
        ({"text": 2}, r"modality_dropout\['text'\] must be at least 0 and less than 1, but is 2"),
        ({"audio": 0.1}, "modality_dropout names 'audio', but the modalities of this model are text, vision"),
    ],
)
def test_wrong_dropout(value, message):
    with pytest.raises(ValueError, match=message):
        make_config(modality_dropout=value)


def test_config_round_trip(tmp_path):
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), vision_config=VISION_ENCODERS["vit"](),
        audio_config=AUDIO_ENCODERS["whisper"](), modality_dropout={"text": 0.1, "audio": 0.3}, num_frames=5,
        frame_embedding="learned", tasks=[Classification("x", labels=["a", "b"])],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = MMTransformerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.modalities == ["vision", "audio"]
    assert loaded.modality_dropout_probabilities == {"text": 0.1, "audio": 0.3}


def test_tokenizers_without_special_tokens_leave_a_place():
    inputs = PROCESSOR(text=[None, ""], images=[make_image(0), make_image(1)], add_special_tokens=False)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 1)
    assert make_model(audio="wav2vec2")(**inputs).logits["topic"].isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": None}, "Give the texts as input_ids, inputs_embeds or text_features"),
        ({"image_index": torch.zeros(1, 1)}, "image_index must hold integers in the shape .* but is of torch.float32"),
        ({"audio_attention_mask": torch.ones(3, 9)}, r"has the shape \(3, 9\), which does not fit input_values"),
    ],
)
def test_inputs_that_cannot_be(inputs, message):
    model = make_model(audio="wav2vec2")
    with pytest.raises(ValueError, match=message):
        model(**make_inputs([("text", "images", "audio")]) | inputs)


def test_no_images_in_a_tensor():
    model, inputs = make_model(), make_inputs([("text",)])
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_index")}
    torch.testing.assert_close(
        model(**inputs, pixel_values=torch.zeros(0, 3, 32, 32)).logits["topic"], model(**inputs).logits["topic"]
    )


def test_words_that_dropout_takes_away_have_no_label():
    model = make_model(modality_dropout={"text": 0.5}).train()
    batch = make_batch()
    seen = {}
    model.model.register_forward_hook(lambda module, args, output: seen.update(kept=output.kept["text"]))
    torch.manual_seed(1)
    outputs = model(**batch)
    task = model.tasks["entities"]
    labels = batch["labels"]["entities"].masked_fill(~seen["kept"][:, None], -100)
    assert not seen["kept"].all()
    total, count = task.loss(outputs.logits["entities"], labels)
    torch.testing.assert_close(outputs.losses["entities"], total / count)
