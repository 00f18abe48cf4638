"""Sound: files and arrays become waveforms, waveforms become tokens of the right number."""

import io
import logging
import math

import datasets
import numpy as np
import pytest
import soundfile
import torch
from cases import first_quickly
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    AUDIO_ENCODERS,
    FUSION_KINDS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_audio_processor,
    make_clip,
    make_config,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
)
from transformers import AutoConfig, AutoModel, TrainingArguments, Wav2Vec2Config, set_seed

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerModel,
    MMTransformerProcessor,
)
from mm_transformers.model.audio import AudioError, load_audio
from mm_transformers.model.encoder_classes import audio_token_mask, min_audio_samples
from mm_transformers.model.encoders import build_encoder
from mm_transformers.model.limits import limits


every_encoder = pytest.mark.parametrize("audio", AUDIO_ENCODERS)
RATE = 16_000


def wav(samples: np.ndarray, rate: int = RATE, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", **kwargs)
    return file.getvalue()


CLIPS = [make_clip(0.1), make_clip(0.16, 880, seed=1), make_clip(0.05, 220, seed=2)]
# Rows with two clips, none, one that another row has too, and one beside an image.
ROW_CLIPS = [[CLIPS[0], CLIPS[1]], None, CLIPS[1], CLIPS[2]]
ROW_IMAGES = [None, None, None, make_image(1)]
TEXTS = ["a red cat", "the dog", "rain is lovely", "a bat in the sun"]


def make_inputs(audio: str, rows=slice(None)) -> dict:
    processor = make_audio_processor(audio)
    return dict(processor(text=TEXTS[rows], images=ROW_IMAGES[rows], audio=ROW_CLIPS[rows], sampling_rate=RATE))


class TestLoading:
    @pytest.mark.parametrize("limit", ["lowest_sampling_rate", "highest_sampling_rate"])
    def test_a_rate_at_the_limit_is_read(self, limit):
        rate = int(getattr(limits(), limit))
        clip = {"array": np.zeros(rate // 10), "sampling_rate": rate}
        assert len(load_audio(clip, rate)) == rate // 10
        over = rate + (1 if limit.startswith("highest") else -1)
        with pytest.raises(AudioError, match=limit):
            load_audio({**clip, "sampling_rate": over}, over)

    def test_all_ways_of_giving_a_clip(self, tmp_path):
        clip = make_clip(0.1)
        path = tmp_path / "clip.wav"
        path.write_bytes(wav(clip, subtype="FLOAT"))
        cell = datasets.Dataset.from_dict({"audio": [str(path)]}).cast_column("audio", datasets.Audio(decode=False))
        for given_clip in (
            path, str(path), path.read_bytes(), {"path": str(path), "bytes": None}, {"bytes": path.read_bytes()},
            {"array": clip, "sampling_rate": RATE}, cell[0]["audio"],
        ):  # fmt: skip
            loaded = load_audio(given_clip, RATE)
            assert loaded.dtype == np.float32
            np.testing.assert_array_equal(loaded, clip)
        for given_clip in (clip, torch.tensor(clip), clip.tolist(), clip[:, None], np.stack([clip, clip])):
            np.testing.assert_allclose(load_audio(given_clip, RATE, source_rate=RATE), clip, atol=1e-7)

    def test_channels_are_averaged_and_integers_scaled(self):
        left, right = np.array([0.5, -0.5, 0.25] * 9), np.array([0.0, -1.0, 0.75] * 9)
        stereo = load_audio(np.stack([left, right], 1), RATE, RATE)
        np.testing.assert_allclose(stereo, (left + right) / 2)
        np.testing.assert_allclose(load_audio(np.array([-32768, 0, 16384], np.int16), RATE, RATE), [-1, 0, 0.5])
        np.testing.assert_allclose(load_audio(np.array([0, 128, 192], np.uint8), RATE, RATE), [-1, 0, 0.5])

    @settings(max_examples=20, deadline=None)
    @given(st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000]), st.integers(200, 3_000))
    def test_resampling_keeps_pitch_and_length(self, rate, frequency):
        time = np.arange(rate) / rate
        resampled = load_audio({"array": np.sin(2 * np.pi * frequency * time), "sampling_rate": rate}, RATE)
        assert abs(len(resampled) - RATE) <= 1
        expected = np.sin(2 * np.pi * frequency * np.arange(len(resampled)) / RATE)
        inner = slice(RATE // 10, -RATE // 10)
        np.testing.assert_allclose(resampled[inner], expected[inner], atol=0.01)

    @pytest.mark.parametrize(
        ("clip", "message"),
        [
            (make_clip(0.1), "has no sampling rate: give {'array': ..., 'sampling_rate': ...}, a file, or"),
            ({"array": make_clip(0.1), "sampling_rate": None}, "has no sampling rate"),
            ({"array": make_clip(0.1), "sampling_rate": 0}, "has the sampling rate 0, but it must be a whole number"),
            ({"array": make_clip(0.1), "sampling_rate": -8000}, "has the sampling rate -8000"),
            ({"array": make_clip(0.1), "sampling_rate": 0.5}, "has the sampling rate 0.5"),
            ({"array": make_clip(0.1), "sampling_rate": "16k"}, "has the sampling rate '16k'"),
            ({"array": np.zeros(0), "sampling_rate": RATE}, "is empty"),
            ({"array": np.array([0.1, math.nan]), "sampling_rate": RATE}, "holds NaN or infinity"),
            ({"array": np.array([0.1, math.inf]), "sampling_rate": RATE}, "holds NaN or infinity"),
            ({"array": np.array(["a"]), "sampling_rate": RATE}, "must hold numbers"),
            ({"array": np.zeros((2, 2, 9)), "sampling_rate": RATE}, r"has the shape (2, 2, 9), not (samples,) or"),
            ("not/there.wav", "sound 'not/there.wav' does not exist"),
            (b"RIFFnonsense", "the sound (12 bytes) cannot be read"),
            (wav(np.zeros(0)), "is empty"),
            (
                3,
                "a sound must be a path, bytes, an array or a dict with 'array' and 'sampling_rate', 'bytes' or 'path'",
            ),
            ({}, "but is of type NoneType"),
        ],
    )
    def test_what_cannot_be_used(self, clip, message):
        with pytest.raises(AudioError) as error:
            load_audio(clip, RATE)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


class TestProcessor:
    def test_distinct_clips_and_their_index(self):
        inputs = make_inputs("wav2vec2")
        assert inputs["audio_index"].tolist() == [[0, 1], [-1, -1], [1, -1], [2, -1]]
        assert inputs["image_index"].tolist() == [[-1], [-1], [-1], [0]]
        assert inputs["input_values"].shape == (3, 2560)
        assert inputs["audio_attention_mask"].sum(1).tolist() == [1600, 2560, 800]
        # As the feature extractor alone gives them.
        for i, clip in enumerate(CLIPS):
            expected = make_feature_extractor()(clip, sampling_rate=RATE, return_tensors="pt")["input_values"][0]
            torch.testing.assert_close(inputs["input_values"][i, : len(clip)], expected)

    @every_encoder
    def test_saved_and_loaded(self, audio, tmp_path):
        processor = make_audio_processor(audio)
        processor.num_frames = 5
        processor.save_pretrained(tmp_path)
        loaded = MMTransformerProcessor.from_pretrained(tmp_path)
        assert loaded.num_frames == 5
        assert loaded.model_input_names == processor.model_input_names
        first, second = (
            p(text="a", audio=CLIPS[0], images=make_image(), sampling_rate=RATE) for p in (processor, loaded)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_list_of_numbers_is_one_clip(self):
        processor = make_audio_processor()
        inputs = processor(text=["a"], audio=[CLIPS[0].tolist()], sampling_rate=RATE)
        assert inputs["audio_index"].tolist() == [[0]]

    def test_none_at_all(self):
        inputs = make_audio_processor()(text=["a", "b"])
        assert inputs["audio_index"].tolist() == [[-1], [-1]]
        assert "input_values" not in inputs

    def test_too_short_and_too_long(self, caplog):
        with pytest.raises(AudioError, match=r"lasts 10\.0 ms, less than the 25 ms of the shortest input"):
            make_audio_processor()(text="a", audio=make_clip(0.01), sampling_rate=RATE)
        processor = make_audio_processor("whisper")
        with caplog.at_level(logging.WARNING):
            logging.getLogger("transformers").propagate = True
            logger = logging.getLogger("mm_transformers.model.processing_mm_transformer")
            messages = []
            logger.addFilter(lambda record: messages.append(record.getMessage()) or True)
            processor(text=["a", "b"], audio=[make_clip(1.5), make_clip(2.5)], sampling_rate=RATE)
        assert len(messages) == 1
        assert "of 1.5 s was cut to the 1.0 s that the audio encoder accepts" in messages[0]

    def test_a_processor_without_feature_extractor(self):
        with pytest.raises(ValueError, match="has no feature extractor, but got sound"):
            make_processor()(text="a", audio=CLIPS[0], sampling_rate=RATE)
        with pytest.raises(ValueError, match="audio must have one entry per text .* 2 entries for 1 texts"):
            make_audio_processor()(text=["a"], audio=[None, None])


class TestModel:
    @every_encoder
    def test_every_parameter_gets_a_gradient(self, audio):
        model = make_model(audio=audio).train()
        batch = make_inputs(audio) | {"labels": {"topic": torch.tensor([0, 1, 2, 0])}}
        batch["attention_mask"][2] = 0  # only heard
        model(**batch).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []
        silent = {n for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().max() == 0}
        reached = {name for name in silent if name.startswith(("model.audio_model", "model.audio_projection"))}
        assert {name for name in reached if not name.endswith(("k_proj.bias", "key.bias"))} == set()

    @every_encoder
    @pytest.mark.parametrize("fusion", first_quickly(FUSION_KINDS))
    def test_each_row_answers_as_it_does_alone(self, audio, fusion):
        model = make_model(audio=audio, fusion_type=fusion)
        with torch.no_grad():
            together = model(**make_inputs(audio)).logits
            for i in range(4):
                alone = model(**make_inputs(audio, slice(i, i + 1))).logits
                for name in ("topic", "tags", "score"):
                    torch.testing.assert_close(together[name][i], alone[name][0], rtol=1e-4, atol=1e-4)

    @every_encoder
    def test_sound_is_heard_and_silence_is_not(self, audio):
        model, inputs = make_model(audio=audio), make_inputs(audio)
        without = {
            n: v for n, v in inputs.items() if not n.startswith("audio") and n not in ("input_values", "input_features")
        }
        with torch.no_grad():
            heard, unheard = model(**inputs).logits["topic"], model(**without).logits["topic"]
        changed = (heard - unheard).abs().amax(1) > 1e-6
        assert changed.tolist() == [True, False, True, True]

    @every_encoder
    def test_saved_model_loads_equal(self, audio, tmp_path):
        model, inputs = make_model(audio=audio), make_inputs(audio)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is MMTransformerForMultiTask
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits["topic"], model(**inputs).logits["topic"])

    @every_encoder
    def test_a_batch_without_sound_trains_every_parameter(self, audio):
        model = make_model(audio=audio).train()
        inputs = make_inputs(audio, slice(1, 2)) | {"labels": {"topic": torch.tensor([1])}}
        assert "input_values" not in inputs
        model(**inputs).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("audio", ["wav2vec2", "hubert", "wavlm", "whisper"])
    @settings(max_examples=15, deadline=None)
    @given(lengths=st.lists(st.integers(400, 5000), min_size=1, max_size=4))
    def test_tokens_are_masked_at_the_rate_of_the_encoder(self, audio, lengths):
        """A clip has the tokens that the encoder's convolutions give it alone, whatever it is padded to."""
        encoder = build_encoder(AUDIO_ENCODERS[audio](), "audio").eval()
        inputs = make_audio_processor(audio)(
            text=["a"] * len(lengths), audio=[make_clip(n / RATE, seed=n) for n in lengths], sampling_rate=RATE
        )
        if audio == "whisper":
            frames = [math.ceil(n / 160) for n in lengths]  # the last, half-filled one counts
            expected, num_tokens = [math.ceil(f / 2) for f in frames], 50
        else:
            with torch.no_grad():
                alone = [encoder(torch.zeros(1, n)).last_hidden_state.shape[1] for n in lengths]
            expected, num_tokens = alone, max(alone)
        mask = audio_token_mask(encoder, num_tokens, inputs["audio_attention_mask"])
        assert mask.sum(1).tolist() == expected
        assert all(row[:n].all() for row, n in zip(mask, expected, strict=True))

    @every_encoder
    def test_from_encoders(self, audio, tmp_path):
        torch.manual_seed(0)
        folders = {name: tmp_path / name for name in ("text", "vision", "audio")}
        configs = {
            "text": TEXT_ENCODERS["bert"](),
            "vision": VISION_ENCODERS["vit"](),
            "audio": AUDIO_ENCODERS[audio](),
        }
        for name, folder in folders.items():
            AutoModel.from_config(configs[name]).save_pretrained(folder)
        make_tokenizer().save_pretrained(folders["text"])
        make_image_processor().save_pretrained(folders["vision"])
        make_feature_extractor(audio).save_pretrained(folders["audio"])
        encoders = {name: str(folder) for name, folder in folders.items()}
        tasks = [Classification("topic", labels=["a", "b"])]
        model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks, num_fusion_layers=1)
        processor = MMTransformerProcessor.from_encoders(**encoders)
        pretrained = AutoModel.from_pretrained(folders["audio"])
        if audio == "whisper":
            pretrained = pretrained.get_encoder()
        for name, value in pretrained.state_dict().items():
            if name in model.model.audio_model.state_dict():
                assert torch.equal(model.model.audio_model.state_dict()[name], value), name
        inputs = processor(text=["a cat"], images=[make_image()], audio=[CLIPS[0]], sampling_rate=RATE)
        assert model(**inputs).logits["topic"].shape == (1, 2)

    def test_clear_errors(self):
        model, inputs = make_model(audio="wav2vec2"), make_inputs("wav2vec2")
        with pytest.raises(ValueError, match="Got 3 clips for 4 rows: give `audio_index`, which says to which row"):
            model(**{name: value for name, value in inputs.items() if name != "audio_index"})
        with pytest.raises(
            ValueError, match=r"audio_index must hold numbers from -1 \(none\) to 2 \(there are 3 clips\)"
        ):
            model(**inputs | {"audio_index": inputs["audio_index"] + 1})
        with pytest.raises(ValueError, match="has no audio encoder .*, but got sound"):
            make_model()(**inputs)
        short = torch.zeros(4, min_audio_samples(model.config.audio_config) - 1)
        with pytest.raises(ValueError, match="needs clips of at least 40 samples"):
            model(input_ids=inputs["input_ids"], input_values=short)
        config = MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), audio_config=TEXT_ENCODERS["bert"]())
        with pytest.raises(ValueError, match="'bert' cannot be the audio encoder: it takes 'input_ids', not 'input_va"):
            MMTransformerModel(config)

    def test_the_real_receptive_field(self):
        assert min_audio_samples(Wav2Vec2Config()) == 400


class TestTraining:
    def rows(self, number: int, seed: int) -> datasets.Dataset:
        """Only the pitch of the sound says which animal it is; some rows have none."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, number)
        files = [
            {"bytes": wav(make_clip(0.1, 300 if y else 1500, seed=int(rng.integers(1e6)))), "path": None}
            for y in labels
        ]
        rows = {"text": ["the sound"] * number, "audio": files, "animal": [["bird", "cow"][y] for y in labels]}
        return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())

    @pytest.mark.slow
    def test_it_learns_to_hear(self, tmp_path):
        set_seed(0)
        config = make_config(vision=None, audio="wav2vec2", tasks=[Classification("animal", labels=["bird", "cow"])])
        model, processor = MMTransformerForMultiTask(config), make_audio_processor(images=False)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[],
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        test = self.rows(64, 1)
        trainer = MMTrainer(model, arguments, processing_class=processor, train_dataset=self.rows(160, 0))
        trainer.train()
        assert trainer.evaluate(test)["eval_animal_accuracy"] > 0.95
        deaf = trainer.evaluate(test.remove_columns("audio"))["eval_animal_accuracy"]
        # All texts are the same, so what hears nothing says one and the same.
        assert deaf in [pytest.approx(list(test["animal"]).count(animal) / 64) for animal in ("bird", "cow")]

    def test_messages_name_the_row(self, tmp_path):
        rows = [{"text": "a", "audio": str(tmp_path / "no.wav"), "topic": 0}, {"text": "b", "audio": None, "topic": 1}]
        config = make_config(audio="wav2vec2", tasks=[Classification("topic", labels=["a", "b"])])
        with pytest.raises(
            AudioError, match=r"row 0 of the batch, column 'audio': sound '.*no.wav' does not exist; repair"
        ):
            MMDataCollator(make_audio_processor(), config)(rows)
        collator = MMDataCollator(make_audio_processor(), config, on_bad_file="drop")
        assert collator(rows)["audio_index"].tolist() == [[-1], [-1]]
        assert collator.num_bad_files == 1
        rows[1]["audio"] = make_clip(0.1)
        with pytest.raises(AudioError, match=r"row 0 of the batch, column 'audio': .* has no sampling rate"):
            MMDataCollator(make_audio_processor(), config)(rows[1:] * 2)
        collator = MMDataCollator(make_audio_processor(), config, sampling_rate=RATE)
        assert collator(rows[1:] * 2)["audio_index"].tolist() == [[0], [0]]
        with pytest.raises(
            ValueError, match="row 0 of the batch has no content in 'text', 'image', 'video', 'audio': remove"
        ):
            MMDataCollator(make_audio_processor(), config)([{"text": "", "audio": None, "topic": 1}])


class Decoder:
    """What `datasets.Audio` gives where it decodes: a new array whenever it is asked."""

    def __init__(self, clip: np.ndarray, rate: int):
        self.clip, self.rate = clip, rate

    def get_all_samples(self):
        raise AssertionError("not needed")

    def __getitem__(self, name: str):
        return {"array": self.clip.copy(), "sampling_rate": self.rate}[name]


def test_decoders_of_different_sounds_are_different_sounds():
    decoders = [Decoder(make_clip(0.1, 200 + 50 * i, rate=8000), 8000) for i in range(20)]
    processor = make_audio_processor(images=False)
    inputs = processor(text=["a"] * 21, audio=[*decoders, decoders[3]])
    assert inputs["audio_index"][:, 0].tolist() == [*range(20), 3]
    config = make_config(vision=None, audio="wav2vec2", tasks=[Classification("topic", labels=["a", "b"])])
    batch = MMDataCollator(processor, config)([{"text": "a", "audio": d, "topic": 0} for d in decoders])
    assert batch["audio_index"][:, 0].tolist() == list(range(20))
    assert torch.equal(batch["input_values"], inputs["input_values"])


OTHER_ENCODERS = {
    "wav2vec2-conformer": dict(
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=3
    ),
    "data2vec-audio": dict(num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2),
    "sew": dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, squeeze_factor=2),
    "unispeech-sat": dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2),
}


@pytest.mark.parametrize("kind", OTHER_ENCODERS)
def test_their_kin(kind):
    """With sound, without, and with the shortest that the processor lets through."""
    options = dict(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, conv_dim=(12, 12),
        conv_kernel=(10, 3), conv_stride=(5, 2), feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    audio = AutoConfig.for_model(kind, **options | OTHER_ENCODERS[kind])
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), audio_config=audio, num_fusion_layers=1,
        tasks=[Classification("topic", labels=["a", "b"])],
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).train()
    processor = make_audio_processor(images=False)
    labels = {"labels": {"topic": torch.tensor([0, 1])}}
    for clips in ([make_clip(0.025), make_clip(0.1)], [None, None]):
        model.zero_grad()
        model(**processor(text=["a", "b"], audio=clips, sampling_rate=RATE), **labels).loss.backward()
        idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert idle == []


def test_an_encoder_that_nobody_knows_is_refused():
    audio = AutoConfig.for_model("moonshine", hidden_size=24, num_attention_heads=4)
    config = MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), audio_config=audio)
    with pytest.raises(ValueError, match="'moonshine' cannot be the audio encoder: its inputs are not known"):
        MMTransformerModel(config)
