"""What frozen encoders give is stored once, and what is read is what they would give."""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from rows import make_args, make_dataset, make_rows
from tiny import (
    make_audio_processor,
    make_clip,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
)
from torch.utils.data import DataLoader
from transformers import AutoModel, FNetConfig, Seq2SeqTrainingArguments
from writers import make_writer

from mm_transformers import (
    Classification,
    FeatureCache,
    Matching,
    MMDataCollator,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Retrieval,
)
from mm_transformers.data import feature_store
from mm_transformers.data.feature_keys import hash_of_encoder
from mm_transformers.data.feature_reading import CachedItem, _images


TOPIC = Classification("topic", labels=["animals", "food", "travel"])


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def folders(path: Path, kind: str = "") -> list[Path]:
    return sorted(folder for folder in path.glob(f"{kind}*-*") if folder.is_dir())


def shards(path: Path, kind: str = "") -> list[Path]:
    return sorted(path.glob(f"{kind}*-*/*.safetensors"))


def count_calls(model, modality: str) -> list[int]:
    """A list to which the encoder adds how many items it is given, each time that it runs."""
    calls: list[int] = []
    encoder = model.model.encoder(modality)
    name = {"text": "input_ids", "vision": "pixel_values"}.get(modality)
    encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs[name] if name else next(iter(kwargs.values())))),
        with_kwargs=True,
    )
    return calls


def same_answers(model, collator, cached, rows, rtol=1e-5, atol=1e-5):
    """Of tasks that label words, where there are words: elsewhere nothing is ever read."""
    model.eval()
    plain, stored = collator(rows), cached(rows)
    with torch.no_grad():
        expected, actual = model(**plain), model(**stored)
    mask = plain["attention_mask"].bool()
    for name, logits in expected.logits.items():
        keep = mask if name == "entities" else slice(None)
        torch.testing.assert_close(
            actual.logits[name][keep], logits[keep], rtol=rtol, atol=atol, equal_nan=True, msg=name
        )
    torch.testing.assert_close(actual.loss, expected.loss, rtol=rtol, atol=atol)
    return stored


@pytest.mark.slow
@pytest.mark.parametrize("text", ["bert", "roberta", "t5", "deberta-v2", "clip-text"])
def test_cached_rows_get_the_same_answers(text, tmp_path):
    """Rows with an image, none, several and shared ones, in different files; texts of all lengths, and none."""
    path = tmp_path / "image.png"
    path.write_bytes(png(make_image(3)))
    rows = make_rows(12)
    rows[0]["image"] = [make_image(0), str(path), make_image(1)]
    rows[1]["image"] = path.read_bytes()
    rows[2]["text"], rows[2]["entities"] = "", None
    rows[3]["image"] = np.asarray(make_image(4))
    rows[5].update(text=None, image=None if rows[5]["image"] is None else rows[5]["image"], entities=None)
    rows[5]["image"] = {"path": str(path), "bytes": None}
    model = make_model(text, freeze=["text", "vision"])
    pad = model.config.text_config.pad_token_id
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(pad))
    collator = MMDataCollator(processor, model.config)
    cached = FeatureCache(tmp_path / "cache").prepare(model, collator, rows, batch_size=5)
    batch = same_answers(model, collator, cached, rows)
    assert "pixel_values" not in batch
    assert batch["image_features"].shape[1:] == (17, 24)
    # The same picture in a file and as bytes is there once.
    assert batch["image_index"].equal(collator(rows)["image_index"]) is False
    assert len(batch["image_features"]) < len(collator(rows)["pixel_values"])
    # In other company, that is, with other padding.
    for some in (rows[:1], rows[2:4], rows[7:12]):
        same_answers(model, collator, cached, some)
    calls = [*count_calls(model, "text"), *count_calls(model, "vision")]
    with torch.no_grad():
        model(**cached(rows))
    assert calls == []


@pytest.mark.parametrize(("text", "pad"), [("bert", 0), ("roberta", 1), ("t5", 0)])
def test_padding_on_the_left(text, pad, tmp_path):
    rows = make_rows(8)
    model = make_model(text, freeze=["text"], tasks=[TOPIC])
    tokenizer = make_tokenizer(pad)
    tokenizer.padding_side = "left"
    collator = MMDataCollator(MMTransformerProcessor(make_image_processor(), tokenizer), model.config)
    cached = FeatureCache(tmp_path).prepare(model, collator, rows)
    batch = same_answers(model, collator, cached, rows)
    assert (batch["attention_mask"][:, 0] == 0).any()
    assert "pixel_values" in batch


def test_a_text_encoder_that_depends_on_padding_is_refused(tmp_path):
    """Built from a config, FNet mixes the padding into a text; loaded by `from_encoders`, it runs without."""
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, intermediate_size=37, max_position_embeddings=40)
    config = MMTransformerConfig(text_config=FNetConfig(**sizes, pad_token_id=0), freeze=["text"], tasks=[TOPIC])
    torch.manual_seed(0)
    model, rows = MMTransformerForMultiTask(config), [{"text": "a big dog" + " sat" * i, "topic": 0} for i in range(4)]
    collator = MMDataCollator(MMTransformerProcessor(tokenizer=make_tokenizer()), config)
    with pytest.raises(ValueError, match="'fnet'.*depends on the padding.*Load the encoder by `from_encoders`"):
        FeatureCache(tmp_path / "cache").prepare(model, collator, rows)
    AutoModel.from_config(config.text_config).save_pretrained(tmp_path / "text")
    loaded = MMTransformerForMultiTask.from_encoders(tmp_path / "text", freeze=["text"], tasks=[TOPIC])
    FeatureCache(tmp_path / "cache").prepare(loaded, MMDataCollator(collator.processor, loaded.config), rows)


@pytest.mark.parametrize("audio", ["wav2vec2", "whisper", "ast"])
def test_sounds_of_different_length(audio, tmp_path):
    clips = [make_clip(0.1), make_clip(0.16, 880, seed=1), make_clip(0.05, 220, seed=2)]
    cells = [[clips[0], clips[1]], None, clips[1], [clips[2], clips[0]]]
    rows = [{"text": f"a {i}", "audio": clip, "topic": i % 3} for i, clip in enumerate(cells)]
    model = make_model(vision=None, audio=audio, freeze=["audio"], tasks=[TOPIC])
    collator = MMDataCollator(make_audio_processor(audio, images=False), model.config, sampling_rate=16_000)
    cached = FeatureCache(tmp_path).prepare(model, collator, rows, batch_size=2)
    batch = same_answers(model, collator, cached, rows)
    assert batch["audio_index"].tolist() == [[0, 1], [-1, -1], [1, -1], [2, 0]]
    assert batch["audio_feature_mask"].shape == batch["audio_features"].shape[:2]
    if audio != "ast":
        assert len(set(batch["audio_feature_mask"].sum(1).tolist())) > 1
    for row in rows:
        same_answers(model, collator, cached, [row])


def test_videos_are_stored_with_their_frames(tmp_path):
    pytest.importorskip("av")
    from videos import encode, make_frames

    path = tmp_path / "video.mp4"
    path.write_bytes(encode(make_frames(9)))
    frames = [make_image(i) for i in range(3)]
    rows = [
        {"text": "a cat", "image": make_image(1), "video": str(path), "topic": 0},
        {"text": "a dog", "image": None, "video": frames, "topic": 1},
        {"text": "rain", "image": None, "video": None, "topic": 2},
    ]
    model = make_model(freeze=["vision"], tasks=[TOPIC], num_frames=4)
    processor = make_processor()
    processor.num_frames = 4
    collator = MMDataCollator(processor, model.config)
    cache = FeatureCache(tmp_path / "cache")
    cached = cache.prepare(model, collator, rows)
    batch = same_answers(model, collator, cached, rows)
    assert batch["frame_index"].tolist() == collator(rows)["frame_index"].tolist()
    # Other frames are other features.
    processor.num_frames = 2
    collator = MMDataCollator(processor, model.config)
    batch = same_answers(model, collator, cache.prepare(model, collator, rows), rows)
    assert batch["frame_index"].tolist() == [[-1, 0, 1], [0, 1, -1], [-1, -1, -1]]


def test_videos_and_sounds_and_images_of_nobody(tmp_path):
    """A data set, and a batch, in which nothing is to be encoded."""
    rows = [{"text": "a cat", "image": None, "topic": 0}, {"text": "a dog", "image": None, "topic": 1}]
    model = make_model(freeze=["vision"], tasks=[TOPIC])
    collator = MMDataCollator(make_processor(), model.config)
    cached = FeatureCache(tmp_path).prepare(model, collator, rows)
    same_answers(model, collator, cached, rows)
    model.train()(**cached(rows)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [["vision"], ["text", "vision"]])
def test_training_with_and_without_is_the_same(freeze, tmp_path):
    """To the last bit, dropout and modality dropout included; then a third time, from another run's cache."""
    data, results = make_dataset(16), []
    for cache in (None, str(tmp_path / "cache"), FeatureCache(tmp_path / "cache", max_size_gb=1)):
        model = make_model(freeze=freeze, modality_dropout={"vision": 0.3, "text": 0.2})
        model.model.text_model.config.hidden_dropout_prob = 0.1
        args = make_args(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2)
        trainer = MMTrainer(
            model, args, processing_class=make_processor(), train_dataset=data, eval_dataset=data, feature_cache=cache
        )
        calls = {modality: count_calls(model, modality) for modality in freeze}
        torch.manual_seed(1)
        trainer.train()
        prediction = trainer.predict(data.select(range(5)))
        results.append((model.state_dict(), trainer.evaluate(), prediction.metrics, calls))
    expected = results[0]
    for state, metrics, predicted, _ in results[1:]:
        for name, tensor in expected[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6, msg=name)
        for found, wanted in ((metrics, expected[1]), (predicted, expected[2])):
            wanted = {name: value for name, value in wanted.items() if "_per_second" not in name and "time" not in name}
            assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    distinct = {"vision": 3, "text": 6}
    for modality in freeze:
        calls = results[1][3][modality]
        # A padded text besides, to see that padding changes nothing.
        assert sum(calls) == distinct[modality] + (2 if modality == "text" else 0)
        assert results[2][3][modality] == []


@pytest.mark.parametrize("workers", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_workers_read_it(workers, tmp_path):
    rows = make_rows(8)
    model = make_model(freeze=["text", "vision"])
    collator = MMDataCollator(make_processor(), model.config)
    cached = FeatureCache(tmp_path).prepare(model, collator, rows)
    loader = DataLoader(rows, 4, collate_fn=cached, num_workers=1, multiprocessing_context=workers)
    expected = [cached(rows[:4]), cached(rows[4:])]
    for batch, wanted in zip(loader, expected, strict=True):
        for name in ("image_features", "text_features", "image_index"):
            assert torch.equal(batch[name], wanted[name])
    assert len(list(tmp_path.glob("*/*.use"))) == 2  # a worker that ends does not release the folder


def test_building_in_workers(tmp_path):
    rows = make_rows(8)
    model = make_model(freeze=["text", "vision"])
    collator = MMDataCollator(make_processor(), model.config)
    same_answers(model, collator, FeatureCache(tmp_path).prepare(model, collator, rows, 2, num_workers=2), rows)


def test_reading_copies_nothing(tmp_path):
    model = make_model(freeze=["vision"])
    rows = [{"text": "a", "image": make_image(i)} for i in range(20)]
    cached = FeatureCache(tmp_path).prepare(model, MMDataCollator(make_processor(), model.config), rows)
    store = cached.cached.stores["vision"]
    tensors = [store[key].tokens for key in store._index]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert "safetensors" in Path("/proc/self/maps").read_text() if sys.platform == "linux" else True
    again = pickle.loads(pickle.dumps(store))
    assert len(again) == 20


class TestKeys:
    """Any change of what features depend on leads to another folder, and nothing else does."""

    def folder(self, path, model, processor=None, **kwargs) -> set[str]:
        before = set(folders(path))
        collator = MMDataCollator(processor or make_processor(), model.config)
        FeatureCache(path, **kwargs).prepare(model, collator, make_rows(4))
        return {folder.name for folder in set(folders(path)) - before}

    def test_what_changes_the_folder(self, tmp_path):
        model = make_model(freeze=["vision"])
        assert len(self.folder(tmp_path, model)) == 1
        assert self.folder(tmp_path, model) == set()
        model.save_pretrained(tmp_path / "model")
        make_processor().save_pretrained(tmp_path / "model")
        loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
        processor = MMTransformerProcessor.from_pretrained(tmp_path / "model")
        assert self.folder(tmp_path, loaded, processor) == set()
        with torch.no_grad():
            next(iter(model.model.fusion.parameters())).add_(1.0)
        assert self.folder(tmp_path, model) == set()  # it is not a part of the encoder
        with torch.no_grad():
            list(model.model.vision_model.parameters())[-1].view(-1)[0].add_(1e-3)
        assert len(self.folder(tmp_path, model)) == 1
        other = MMTransformerProcessor(make_image_processor(image_mean=[0.4, 0.5, 0.5]), make_tokenizer())
        assert len(self.folder(tmp_path, model, other)) == 1
        assert len(self.folder(tmp_path, model, dtype="bfloat16")) == 1
        assert self.folder(tmp_path, model, dtype="float32") == set()
        model.model.vision_model.config.layer_norm_eps *= 2
        assert len(self.folder(tmp_path, model)) == 1

    def test_weights_that_change_under_one_cache_are_noticed(self, tmp_path):
        model, rows = make_model(freeze=["vision"]), make_rows(4)
        collator, cache = MMDataCollator(make_processor(), model.config), FeatureCache(tmp_path)
        first = cache.prepare(model, collator, rows)(rows)["image_features"]
        model.model.vision_model.load_state_dict(make_model(seed=9).model.vision_model.state_dict())
        cached = cache.prepare(model, collator, rows)
        assert not torch.allclose(cached(rows)["image_features"], first)
        same_answers(model, collator, cached, rows)

    @pytest.mark.parametrize("change", ["data", "numpy"])
    def test_weights_that_change_behind_the_back_of_autograd(self, change, tmp_path):
        """Neither counts as a version of the tensor."""
        model, rows = make_model(freeze=["vision"]), make_rows(4)
        collator, cache = MMDataCollator(make_processor(), model.config), FeatureCache(tmp_path)
        cache.prepare(model, collator, rows)
        weight = next(p for p in model.model.vision_model.parameters() if p.ndim > 1)
        if change == "data":
            weight.data.mul_(2.0)
        else:
            weight.detach().numpy()[:] *= 2.0
        same_answers(model, collator, cache.prepare(model, collator, rows), rows)

    def test_models_that_follow_each_other(self, tmp_path):
        """As in a search for hyperparameters: a new model may lie where the last one has lain."""
        rows, cache = make_rows(4), FeatureCache(tmp_path)
        for seed in (0, 1, 2, 0):
            model = make_model(freeze=["vision"], seed=seed)
            collator = MMDataCollator(make_processor(), model.config)
            cached = cache.prepare(model, collator, rows)
            same_answers(model, collator, cached, rows)
            del model, collator, cached
        assert len(folders(tmp_path)) == 3

    def test_a_file_whose_content_changes(self, tmp_path):
        path = tmp_path / "image.png"
        path.write_bytes(png(make_image(0)))
        rows = [{"text": "a", "image": str(path), "topic": 0}]
        model = make_model(freeze=["vision"], tasks=[TOPIC])
        collator, cache = MMDataCollator(make_processor(), model.config), FeatureCache(tmp_path / "cache")
        cached = cache.prepare(model, collator, rows)
        cached(rows)
        path.write_bytes(png(make_image(1)))
        with pytest.raises(ValueError, match="row 0 of the batch: its image or video is not in the feature cache"):
            cached(rows)
        same_answers(model, collator, cache.prepare(model, collator, rows), rows)

    @pytest.mark.nightly
    def test_hashes_are_the_same_in_every_process(self):
        code = (
            "import sys; sys.path.insert(0, 'tests'); from tiny import *; import torch;"
            "from mm_transformers.data.feature_keys import *; from mm_transformers.model.modalities import IMAGE;"
            "e = make_model(freeze=['vision']).model.vision_model;"
            "print(hash_of_encoder(e, make_image_processor(), torch.float32), ItemHash(IMAGE, None)(b'abc').hex())"
        )
        run = lambda: subprocess.run(  # noqa: E731
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "random"},
        ).stdout  # fmt: skip
        assert run() == run() != ""

    def test_half_precision_halves_it(self, tmp_path):
        model, rows = make_model(freeze=["vision"]), make_rows(8)
        collator = MMDataCollator(make_processor(), model.config)
        sizes = {}
        for dtype in ("float32", "bfloat16"):
            cached = FeatureCache(tmp_path / dtype, dtype=dtype).prepare(model, collator, rows)
            sizes[dtype] = sum(path.stat().st_size for path in shards(tmp_path / dtype))
            assert cached(rows)["image_features"].dtype == getattr(torch, dtype)
        assert 0.4 < sizes["bfloat16"] / sizes["float32"] < 0.65
        same_answers(model, collator, cached, rows, rtol=0.1, atol=0.05)

    def test_what_float16_cannot_hold(self, tmp_path):
        model, rows = make_model(freeze=["vision"]), make_rows(4)
        with torch.no_grad():
            model.model.vision_model.layernorm.weight.fill_(1e6)
        collator = MMDataCollator(make_processor(), model.config)
        with pytest.raises(
            ValueError, match="The outputs of the vision encoder are too large for float16: .* dtype='bfloat16'"
        ):
            FeatureCache(tmp_path, dtype="float16").prepare(model, collator, rows)


class TestTasks:
    def test_tasks_that_compare_rows(self, tmp_path):
        """Equal pictures in different files match each other, as they do without a cache."""
        pictures = [make_image(0), make_image(1)]
        bmp = io.BytesIO()
        pictures[0].save(bmp, "bmp")
        rows = [
            {"text": "a cat", "image": png(pictures[0])}, {"text": "a dog", "image": bmp.getvalue()},
            {"text": "a bat", "image": pictures[1]}, {"text": "a cat", "image": png(pictures[1])},
            {"text": "rain", "image": None},
        ]  # fmt: skip
        tasks = [Retrieval("pairs", embedding_size=8), Matching("matching")]
        model = make_model(freeze=["text", "vision"], tasks=tasks)
        collator = MMDataCollator(make_processor(), model.config)
        cached = FeatureCache(tmp_path).prepare(model, collator, rows)
        same_answers(model, collator, cached, rows)
        plain, stored = collator(rows)["labels"]["pairs"], cached(rows)["labels"]["pairs"]
        for column in range(3):
            groups = [labels[:, column][:, None] == labels[:, column] for labels in (plain, stored)]
            assert torch.equal(*groups)

    @pytest.mark.slow
    def test_writing(self, tmp_path):
        rows = [
            {"text": text, "image": make_image(i), "topic": i % 3, "german": "the red cat"}
            for i, text in enumerate(["a red cat", "green dog in the rain", "sun", "river bat"])
        ]
        data, results = Dataset.from_list([{**row, "image": {"bytes": png(row["image"])}} for row in rows]), []
        data = data.cast_column("image", Image())
        for cache in (None, tmp_path / "cache"):
            model = make_writer("bart", freeze=["text", "vision"])
            args = Seq2SeqTrainingArguments(
                str(tmp_path), use_cpu=True, report_to=[], max_steps=2, save_strategy="no", learning_rate=1e-3,
                per_device_train_batch_size=2, generation_num_beams=2, disable_tqdm=True,
                predict_with_generate=True,
            )  # fmt: skip
            trainer = MMTrainer(
                model,
                args,
                processing_class=make_processor(),
                train_dataset=data,
                eval_dataset=data,
                feature_cache=cache,
            )
            calls = [count_calls(model, "text"), count_calls(model, "vision")]
            trainer.train()
            results.append((model.state_dict(), trainer.evaluate(), trainer.predict(data).predictions["german"]))
        for name, tensor in results[0][0].items():
            torch.testing.assert_close(results[1][0][name], tensor, rtol=0, atol=1e-6, msg=name)
        assert results[1][1]["eval_german_bleu"] == pytest.approx(results[0][1]["eval_german_bleu"], abs=1e-6)
        assert np.array_equal(results[0][2]["generated_ids"], results[1][2]["generated_ids"])
        assert [sum(c) for c in calls] == [4 + 2, 4]

    def test_files_that_cannot_be_read(self, tmp_path, caplog):
        rows = make_rows(6)
        rows[2]["image"], rows[3]["image"] = b"no image", str(tmp_path / "missing.png")
        model = make_model(freeze=["vision"])
        with pytest.raises(ValueError, match="row 3, column 'image': .*missing.png' does not exist"):
            FeatureCache(tmp_path / "a").prepare(model, MMDataCollator(make_processor(), model.config), rows)
        rows[3]["image"] = make_image(0)
        with pytest.raises(ValueError, match="row 2, column 'image': the image .8 bytes. is not an image"):
            FeatureCache(tmp_path / "b").prepare(model, MMDataCollator(make_processor(), model.config), rows)
        rows[3]["image"] = str(tmp_path / "missing.png")
        collator = MMDataCollator(make_processor(), model.config, on_bad_file="drop")
        cached = FeatureCache(tmp_path / "c").prepare(model, collator, rows)
        assert collator.num_bad_files == 0  # nothing was lost in a batch
        same_answers(model, collator, cached, rows)
        assert collator.num_bad_files == cached.num_bad_files == 4


class TestRefusals:
    def test_nothing_is_frozen(self, tmp_path):
        for freeze in (None, ["text_model.embeddings"]):
            with pytest.raises(
                ValueError,
                match="an encoder that is frozen as a whole, but this model has none: give the model freeze=",
            ):
                MMTrainer(
                    make_model(freeze=freeze), make_args(tmp_path), processing_class=make_processor(),
                    feature_cache=tmp_path,
                )  # fmt: skip

    def test_streams(self, tmp_path):
        model = make_model(freeze=["vision"])
        data = make_dataset(4).to_iterable_dataset()
        trainer = MMTrainer(
            model, make_args(tmp_path), processing_class=make_processor(), train_dataset=data, feature_cache=tmp_path
        )
        with pytest.raises(ValueError, match="this one is a stream: load it without streaming=True"):
            trainer.train()

    def test_augmentation(self, tmp_path):
        """What is made anew each time that it is read cannot have been encoded before."""
        data = make_dataset(8)
        seeds = iter(range(100, 10_000))
        data.set_transform(lambda rows: {**rows, "image": [make_image(next(seeds)) for _ in rows["text"]]})
        trainer = MMTrainer(
            make_model(freeze=["vision"]), make_args(tmp_path), processing_class=make_processor(), train_dataset=data,
            feature_cache=tmp_path / "cache",
        )  # fmt: skip
        with pytest.raises(ValueError, match="row \\d.* is not in the feature cache, .* \\(augmentation\\)"):
            trainer.train()

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [({"dtype": "int8"}, "'bfloat16' or 'float16', but is 'int8'"), ({"max_size_gb": 0}, "must be more than 0")],
    )
    def test_options(self, kwargs, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            FeatureCache(tmp_path, **kwargs)

    def test_features_and_what_they_stand_for(self):
        model = make_model(freeze=["vision"])
        batch = MMDataCollator(make_processor(), model.config)(make_rows(4))
        features, _ = model.model.encode("vision", pixel_values=batch["pixel_values"])
        with pytest.raises(ValueError, match="vision input is given as pixel_values and as features; give one"):
            model(**batch, image_features=features)
        with pytest.raises(ValueError, match="text_features has the shape .* which does not fit"):
            model(**batch, text_features=torch.zeros(4, 2, 32))


class TestSize:
    def build(self, path, seed=0, rows=20, **kwargs):
        model = make_model(freeze=["vision"], seed=seed)
        data = [{"text": "a", "image": make_image(i)} for i in range(rows)]
        return FeatureCache(path, **kwargs).prepare(model, MMDataCollator(make_processor(), model.config), data, 4)

    def test_it_is_said_before_it_is_built_how_much_is_needed(self, tmp_path):
        # 20 images of 17 tokens of 24 numbers of 4 bytes
        with pytest.raises(ValueError, match="The features of 20 images need about 3.26e-05 GB in .*max_size_gb=1e-05"):
            self.build(tmp_path, max_size_gb=1e-5)
        assert len(shards(tmp_path)) == 0

    def test_the_evaluation_data_are_encoded_before_training(self, tmp_path):
        """So that what does not fit is told before the first step, not after the first epoch."""
        rows = [{"text": "a", "image": make_image(i), "topic": i % 3} for i in range(40)]
        steps = []
        model = make_model(freeze=["vision"], tasks=[TOPIC])
        model.register_forward_hook(lambda *_: steps.append(1))
        trainer = MMTrainer(
            model, make_args(tmp_path, eval_strategy="epoch"), processing_class=make_processor(),
            train_dataset=rows[:4], eval_dataset={"a": rows[4:8], "b": rows[8:]},
            feature_cache=FeatureCache(tmp_path / "cache", max_size_gb=3e-5),
        )  # fmt: skip
        with pytest.raises(ValueError, match="The features of 32 images need about 5.22e-05 GB"):
            trainer.train()
        assert steps == []

    def test_what_was_used_longest_ago_goes_first(self, tmp_path):
        (tmp_path / "vision-of-mine").mkdir()
        (tmp_path / "vision-of-mine" / "thesis.tex").write_text("x" * 100_000)
        first, second, names = self.build(tmp_path, 0), None, {}
        names[0] = folders(tmp_path, "vision-")[0].name if first else None
        size = feature_store.size_of(first.cached.stores["vision"].folder)
        names[0] = first.cached.stores["vision"].folder
        del first
        second = self.build(tmp_path, 1)
        names[1] = second.cached.stores["vision"].folder
        del second
        past = time.time() - 1000
        os.utime(names[1] / "last_used", (past, past))
        third = self.build(tmp_path, 2, max_size_gb=2.5 * size / 1e9)  # room for two
        assert names[0].exists()
        assert not names[1].exists()
        assert (tmp_path / "vision-of-mine" / "thesis.tex").exists()  # not ours, whatever it is called
        third_folder = third.cached.stores["vision"].folder
        # What is in use stays: the first by this process again, so the fourth finds no room.
        first = self.build(tmp_path, 0)
        with pytest.raises(
            ValueError, match="The features of 20 images need about .*: set a larger limit, store them in half"
        ):
            self.build(tmp_path, 3, max_size_gb=2.5 * size / 1e9)
        assert names[0].exists()
        assert third_folder.exists()
        assert first is not None

    def test_what_was_removed_is_computed_anew(self, tmp_path):
        """Two models take turns where there is room for one."""
        data = make_dataset(8)
        cache = FeatureCache(tmp_path, max_size_gb=7e-6)
        collator = None
        for seed in (0, 1, 0):
            model = make_model(freeze=["vision"], seed=seed)
            collator = collator or MMDataCollator(make_processor(), model.config)
            cached = cache.prepare(model, collator, data)
            same_answers(model, collator, cached, make_rows(8))
            assert len(folders(tmp_path)) == 1
            del model, cached

    @pytest.mark.nightly
    @pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are those of Unix")
    def test_a_full_disk(self, tmp_path):
        """A process that may not write a file of that size is told so by the same call that a full disk would fail."""
        code = BUILD + (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))\n"
            "try:\n    build(sys.argv[1], 30)\nexcept OSError as error:\n    print(error)\n"
        )
        done = run(code, tmp_path)
        assert "cannot be written" in done.stdout
        assert "are kept, and the next run continues from there: free space" in done.stdout
        assert list(tmp_path.glob("*/*.tmp")) == []
        cached = self.build(tmp_path, 0, rows=30)
        assert len(cached.cached.stores["vision"]) == 30


BUILD = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from tiny import *
from mm_transformers import FeatureCache, MMDataCollator
from mm_transformers.data import feature_store

feature_store.SHARD_BYTES = 5_000

def build(path, rows, seed=0, **kwargs):
    model = make_model(freeze=["vision"], seed=seed)
    data = [{"text": "a", "image": make_image(i)} for i in range(rows)]
    return FeatureCache(path, **kwargs).prepare(model, MMDataCollator(make_processor(), model.config), data, 2)
"""


def start(code: str, path: Path, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(Path(__file__).parents[1])], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
             **environment},
    )  # fmt: skip


def run(code: str, path: Path, **environment) -> subprocess.CompletedProcess:
    process = start(code, path, **environment)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return subprocess.CompletedProcess(process.args, 0, output)


def expected_features(rows: int) -> torch.Tensor:
    """Straight from the encoder, in batches of the same size."""
    model, processor = make_model(freeze=["vision"]), make_processor()
    parts = []
    with torch.no_grad():
        for i in range(0, rows, 2):
            pixels = processor(text=["a", "a"], images=[make_image(i), make_image(i + 1)])["pixel_values"]
            parts.append(model.model.vision_model(pixels).last_hidden_state)
    return torch.cat(parts)


def check(path: Path, rows: int, built: int) -> None:
    """All that is in the cache is right, and a build adds what is missing, no more."""
    model = make_model(freeze=["vision"])
    calls = count_calls(model, "vision")
    data = [{"text": "a", "image": make_image(i)} for i in range(rows)]
    cached = FeatureCache(path).prepare(model, MMDataCollator(make_processor(), model.config), data, 2)
    assert sum(calls) == rows - built
    torch.testing.assert_close(cached(data)["image_features"], expected_features(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_killed_while_it_builds(tmp_path):
    rows = 400
    process = start(BUILD + f"build(sys.argv[1], {rows})", tmp_path)
    deadline = time.time() + 100
    while len(shards(tmp_path)) < 3 and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    folder = folders(tmp_path)[0]
    # What a write that was cut short leaves: under another name, of a process that is gone.
    begun = folder / f"{next(folder.glob('*.use')).stem}.tmp"
    begun.write_bytes(b"half")
    assert len(list(folder.glob("*.use"))) == 1
    store = feature_store.FeatureStore(folder, {})
    built = len(store)
    assert 6 <= built < rows
    assert not begun.exists()
    check(tmp_path, rows, built)
    assert len(list(folder.glob("*.tmp"))) == 0


def test_a_file_that_lost_its_content_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 5_000)
    check(tmp_path, 20, 0)
    whole = shards(tmp_path)
    assert len(whole) == 5  # of 4 images each
    whole[0].write_bytes(whole[0].read_bytes()[:-1000])
    whole[1].write_bytes(b"")
    check(tmp_path, 20, 20 - 8)
    assert not whole[0].exists()


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_bit_that_flipped_is_noticed(place, tmp_path, monkeypatch, caplog):
    """Whether it is one of the features, of the keys or of the shapes."""
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 5_000)
    check(tmp_path, 8, 0)
    damaged = shards(tmp_path)[0]
    content = bytearray(damaged.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")  # behind the header
    content[start + int(place * (len(content) - start))] ^= 4
    damaged.write_bytes(content)
    check(tmp_path, 8, 4)
    assert f"{damaged} cannot be used (its content does not match its checksum)" in caplog.text


def test_features_that_are_not_finite_are_refused(tmp_path):
    model = make_model(freeze=["vision"])
    model.model.vision_model.embeddings.cls_token.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="Row 0: the vision encoder outputs values that are not finite"):
        FeatureCache(tmp_path).prepare(model, MMDataCollator(make_processor(), model.config), make_rows(4))
    assert not shards(tmp_path)


@pytest.mark.nightly
def test_two_runs_that_build_at_once(tmp_path):
    processes = [start(BUILD + "build(sys.argv[1], 60)", tmp_path) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert len(folders(tmp_path)) == 1
    check(tmp_path, 60, 60)


def in_two_processes(code: str, path: Path) -> list:
    """What each of two processes, started as `torchrun` does, prints as JSON after the word RESULT."""
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"}
    environment["MASTER_PORT"] = str(random.randrange(20_000, 40_000))
    processes = [start(code, path, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
    results = []
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        results.append(json.loads(output.split("RESULT ")[1].splitlines()[0]))
    return results


@pytest.mark.nightly
def test_two_processes_share_the_work(tmp_path):
    """As `torchrun` starts them: each encodes its share, both see all, and an error of one is told by both."""
    code = BUILD + (
        "import json\nfrom accelerate import PartialState\nstate = PartialState(cpu=True)\n"
        "assert state.num_processes == 2\n"
        "model = make_model(freeze=['vision', 'text'])\nencoded = []\n"
        "model.model.vision_model.register_forward_pre_hook(\n"
        "    lambda _, args, kwargs: encoded.append(len(kwargs['pixel_values'])), with_kwargs=True)\n"
        "data = [{'text': 'a' * (i + 1), 'image': make_image(i)} for i in range(21)]\n"
        "collator = MMDataCollator(make_processor(), model.config)\n"
        "cache = FeatureCache(sys.argv[1])\n"
        "cached = cache.prepare(model, collator, data, 2)\n"
        "batch = cached(data)\n"
        "plain = model.model.encode('vision', pixel_values=collator(data)['pixel_values'])[0]\n"
        "torch.testing.assert_close(batch['image_features'], plain)\n"
        "data[3]['image'] = b'broken'\n"
        "try:\n    cache.prepare(model, collator, data, 2)\n    message = None\n"
        "except ValueError as error:\n    message = str(error)\n"
        "print('RESULT', json.dumps([sum(encoded[:-1]), message]))\n"
    )
    results = in_two_processes(code, tmp_path)
    assert sorted(count for count, _ in results) == [10, 11]
    messages = [message for _, message in results]
    assert any(message.startswith("row 3, column 'image'") for message in messages)
    assert all("row 3, column 'image'" in message for message in messages)


@pytest.mark.nightly
def test_two_processes_train_as_without(tmp_path):
    """With DDP; in most steps one of them has no image, and so nothing for its vision encoder."""
    code = BUILD + (
        "import json, pathlib, test_trainer\nfrom mm_transformers import MMTrainer\n"
        "rows = test_trainer.make_rows(12)\n"
        "for i in (2, 3, 6, 7, 10, 11):\n    rows[i]['image'] = None\n"
        "states = []\n"
        "for cache in (None, sys.argv[1] + '/cache'):\n"
        "    model = make_model(freeze=['text', 'vision'])\n"
        "    args = test_trainer.make_args(sys.argv[1], seed=3, per_device_train_batch_size=2, ddp_backend='gloo',\n"
        "                                  eval_strategy='steps', eval_steps=2)\n"
        "    assert args.world_size == 2\n"
        "    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=rows,\n"
        "                        eval_dataset=rows, feature_cache=cache)\n"
        "    trainer.train()\n"
        "    states.append(model.state_dict())\n"
        "difference = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])\n"
        "print('RESULT', json.dumps(difference))\n"
    )
    assert in_two_processes(code, tmp_path) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_hashing_weights_takes_about_a_second_for_a_vit_b():
    """An eighth of its 86 million numbers."""
    encoder = torch.nn.Linear(2048, 5250)
    encoder.config = make_model().config.vision_config
    start_time = time.perf_counter()
    hash_of_encoder(encoder, None, torch.float32)
    assert time.perf_counter() - start_time < 0.5


def test_images_of_a_batch_that_are_not_equally_long_are_told():
    items = [[CachedItem(b"a", torch.ones(5, 8))], [CachedItem(b"b", torch.zeros(3, 8)), CachedItem(b"a", None)]]
    with pytest.raises(ValueError, match="images of a batch have 3 to 5 tokens, but must have"):
        _images([items[0], items[1][:1]], ["row 0", "row 1"])
    with pytest.raises(ValueError, match="row 1"):
        _images(items, ["row 0", "row 1"])
    batch = _images([items[0], [], items[0] * 2], ["row 0", "row 1", "row 2"])
    assert batch["image_index"].tolist() == [[0, -1], [-1, -1], [0, 0]]
    assert batch["image_features"].shape == (1, 5, 8), "an image that rows share is there once"
    assert "frame_index" not in batch
    batch = _images([[CachedItem(b"v", torch.ones(2, 5, 8))], items[0]], ["row 0", "row 1"])
    assert batch["frame_index"].tolist() == [[0, 1], [-1, -1]]
