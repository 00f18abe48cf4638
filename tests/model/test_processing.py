"""The processor: texts as the tokenizer gives them, every distinct image once, and everything saved."""

import copy
import json
import logging
import math
import pickle

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    IMAGE_SIZE,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_clip,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
)
from transformers import AutoProcessor, AutoTokenizer, CLIPConfig, PreTrainedTokenizer

from mm_transformers import MMTransformerProcessor
from mm_transformers.model.images import ImageError
from mm_transformers.model.task_token_classification import split_words
from mm_transformers.model.text_tokens import tokenize


PROCESSOR = make_processor()
# Backends may round differently when they resize: by one step of 255, in standard deviations of 0.5.
ONE_STEP = 2.1 / 255


def saved(picture, path):
    picture.save(path)
    return path


def expected_pixels(pictures):
    """What a ViT processor does, by Pillow and numpy: bilinear to 32 x 32, to 0..1, to -1..1, channels first."""
    resized = [np.asarray(p.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), resample=2)) for p in pictures]
    return torch.tensor(np.stack(resized) / 255 * 2 - 1, dtype=torch.float32).permute(0, 3, 1, 2)


@pytest.fixture
def warnings_of(monkeypatch):
    """Collects what the processor's logger warns of."""
    messages = []
    logger = logging.getLogger("mm_transformers.model.processing_mm_transformer")
    monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    return messages


class TestTexts:
    def test_as_the_tokenizer_gives_them(self):
        texts = ["a red cat", "", "Rain on the river is lovely"]
        inputs = PROCESSOR(text=texts)
        rows = [PROCESSOR.tokenizer.encode(text) for text in texts]
        length = max(len(row) for row in rows)
        assert inputs["input_ids"].tolist() == [row + [0] * (length - len(row)) for row in rows]
        # The empty text is absent, so nothing of it is to be seen.
        assert inputs["attention_mask"].tolist() == [
            [int(text != "")] * len(row) + [0] * (length - len(row)) for text, row in zip(texts, rows, strict=True)
        ]
        assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
        assert set(inputs) == {"input_ids", "attention_mask", "image_index"}
        assert inputs["image_index"].tolist() == [[-1], [-1], [-1]]

    @pytest.mark.parametrize("nothing", [None, "", " \n"])
    def test_no_text(self, nothing):
        inputs = PROCESSOR(text=["a cat", nothing], images=[None, make_image()])
        assert inputs["attention_mask"].sum(1).tolist() == [4, 0]
        # Where there is nothing but text, the empty text is one.
        alone = MMTransformerProcessor(tokenizer=make_tokenizer())(text=["a cat", nothing])
        assert alone["attention_mask"].sum(1).tolist() == [4, 2]

    def test_a_single_text_is_a_batch_of_one(self):
        single, batch = PROCESSOR(text="a cat", images=make_image()), PROCESSOR(text=["a cat"], images=[make_image()])
        assert single.keys() == batch.keys()
        assert all(torch.equal(single[name], batch[name]) for name in batch)

    @pytest.mark.parametrize("options", [
        {"pad_to_multiple_of": 8}, {"padding": "max_length"}, {"padding": "max_length", "max_length": 12},
    ])  # fmt: skip
    def test_padding(self, options):
        inputs = PROCESSOR(text=["a red cat", "a"], **options)
        length = {"max_length": options.get("max_length", 40), True: 8}[options.get("padding", True)]
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, length)
        assert inputs["attention_mask"].sum(1).tolist() == [5, 3]

    def test_padding_on_the_left(self):
        processor = make_processor()
        processor.tokenizer.padding_side = "left"
        inputs = processor(text=["a red cat", "dog"], return_word_index=True)
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
        assert inputs["word_index"].tolist() == [[-1, 0, 1, 2, -1], [-1, -1, -1, 0, -1]]

    def test_too_long_texts_are_cut_and_told_once(self, warnings_of):
        processor = make_processor()
        for _ in range(3):
            inputs = processor(text=["the " * 100, "a cat"])
            assert inputs["input_ids"].shape == (2, 40)
            assert inputs["input_ids"][0, -1] == processor.tokenizer.sep_token_id
            assert inputs["attention_mask"].sum(1).tolist() == [40, 4]
        (message,) = warnings_of
        assert message.startswith("A text of 102 tokens was cut to 40, the most that the text encoder accepts.")

    def test_the_limit_can_be_lower(self, warnings_of):
        inputs = make_processor()(text=["the red cat is big", "a"], max_length=4)
        assert inputs["input_ids"].shape == (2, 4)
        assert warnings_of[0].startswith("A text of 7 tokens was cut to 4, ")

    @pytest.mark.parametrize("words", [38, 32, 31, 30])
    def test_rounding_up_stays_within_the_limit(self, words, warnings_of):
        """Tokens: words + 2. From 33 on, a multiple of 16 would be 48, where 40 is all there is."""
        inputs = make_processor()(text=["the " * words, "a"], pad_to_multiple_of=16)
        assert inputs["input_ids"].shape[1] == (words + 2 if words + 2 > 32 else 32)
        assert inputs["attention_mask"].sum(1).tolist() == [words + 2, 3]
        assert not warnings_of, "nothing was cut"

    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
        multiple=st.sampled_from([None, 4, 16, 64]),
        limit=st.none() | st.integers(3, 40),
        padding=st.sampled_from([True, "longest", "max_length"]),
    )
    def test_any_lengths(self, lengths, multiple, limit, padding):
        texts = ["cat " * n for n in lengths]
        inputs = PROCESSOR(
            text=texts, pad_to_multiple_of=multiple, max_length=limit, padding=padding, return_word_index=True
        )
        limit = limit or 40
        kept = [min(n + 2, limit) for n in lengths]
        assert inputs["attention_mask"].sum(1).tolist() == [k if n else 0 for k, n in zip(kept, lengths, strict=True)]
        assert max(kept) <= inputs["input_ids"].shape[1] <= limit
        for row, n in zip(inputs["word_index"].tolist(), kept, strict=True):
            assert row == [-1, *range(n - 2), -1] + [-1] * (len(row) - n)

    def test_word_index(self):
        texts = ["Lovely dogs, red  cats", "", "the"]
        inputs = PROCESSOR(text=texts, return_word_index=True)
        assert inputs["word_index"].dtype == torch.int64
        assert inputs["word_index"].shape == inputs["input_ids"].shape
        assert "offset_mapping" not in inputs
        for text, ids, row in zip(texts, inputs["input_ids"], inputs["word_index"].tolist(), strict=True):
            assert [i for i in row if i >= 0] == list(range(len(text.split())))
            for token, i in zip(PROCESSOR.tokenizer.convert_ids_to_tokens(ids), row, strict=True):
                if i >= 0:
                    start, end = split_words(text)[i]
                    assert text[start:end].lower().startswith(token)

    @pytest.mark.parametrize("text", [None, 3, b"a", ["a", 3], [["a"]], [], float("nan")])
    def test_what_is_no_text(self, text):
        with pytest.raises(
            ValueError, match="text must be a string or a list of strings, one per row; for a row without text"
        ):
            PROCESSOR(text=text)

    def test_other_tensors(self):
        with pytest.raises(ValueError, match="return_tensors must be 'pt', .*, but text_kwargs has 'np'"):
            PROCESSOR(text="a", return_tensors="np")

    def test_a_slow_tokenizer_knows_no_words(self):
        class SlowTokenizer(PreTrainedTokenizer):
            """One token per letter."""

            vocab_size = 130

            def get_vocab(self):
                return {"[PAD]": 0, **{chr(i): i for i in range(1, 128)}}

            def _tokenize(self, text, **kwargs):
                return list(text)

            def _convert_token_to_id(self, token):
                return self.get_vocab().get(token, 1)

            def _convert_id_to_token(self, index):
                return chr(index)

        tokenizer = SlowTokenizer(pad_token="[PAD]", model_max_length=20)
        assert not tokenizer.is_fast
        processor = MMTransformerProcessor(image_processor=make_image_processor(), tokenizer=tokenizer)
        assert processor(text=["abc", "a"])["attention_mask"].sum(1).tolist() == [3, 1]
        with pytest.raises(ValueError, match="Labels of words need a fast tokenizer, but SlowTokenizer is a slow one"):
            processor(text=["abc"], return_word_index=True)


class TestImages:
    def test_pixels(self):
        pictures = [make_image(0), make_image(1, size=(50, 8)), make_image(2).convert("L")]
        inputs = PROCESSOR(text=["a", "b", "c"], images=pictures)
        assert inputs["pixel_values"].dtype == torch.float32
        assert inputs["image_index"].dtype == torch.int64
        torch.testing.assert_close(inputs["pixel_values"], expected_pixels(pictures), rtol=0, atol=ONE_STEP)

    def test_none_one_many_and_shared(self, tmp_path):
        first, second = make_image(0), make_image(1)
        path = saved(make_image(2), tmp_path / "third.png")
        content = saved(make_image(3), tmp_path / "fourth.png").read_bytes()
        images = [
            first,
            None,
            [second, first],
            [],
            [str(path), None, content],
            {"path": str(path), "bytes": None},
            (bytes(bytearray(content)), second, second),
            float("nan"),
            path,
        ]
        inputs = PROCESSOR(text=["a"] * 9, images=images)
        n = -1
        assert inputs["image_index"].tolist() == [
            [0, n, n], [n, n, n], [1, 0, n], [n, n, n], [2, 3, n], [2, n, n], [3, 1, 1], [n, n, n], [2, n, n],
        ]  # fmt: skip
        expected = expected_pixels([first, second, make_image(2), make_image(3)])
        torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=ONE_STEP)

    def test_equal_pictures_that_are_different_objects_are_not_compared(self):
        inputs = PROCESSOR(text=["a", "b"], images=[make_image(0), make_image(0)])
        assert inputs["image_index"].tolist() == [[0], [1]]
        assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])

    @settings(max_examples=25, deadline=None)
    @given(rows=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=6))
    def test_any_sharing(self, rows):
        pool = [np.full((4, 4, 3), 50 * i, np.uint8) for i in range(5)]
        inputs = PROCESSOR(text=["a"] * len(rows), images=[[pool[i] for i in row] for row in rows])
        index = inputs["image_index"]
        assert index.shape == (len(rows), max(1, *(len(row) for row in rows), 1))
        used = {i for row in rows for i in row}
        assert ("pixel_values" in inputs) == bool(used)
        if used:
            assert inputs["pixel_values"].shape == (len(used), 3, IMAGE_SIZE, IMAGE_SIZE)
        for row, entries in zip(rows, index.tolist(), strict=True):
            assert [i == -1 for i in entries] == [False] * len(row) + [True] * (len(entries) - len(row))
            for i, entry in zip(row, entries, strict=False):
                assert inputs["pixel_values"][entry].mean().item() == pytest.approx(50 * i / 255 * 2 - 1, abs=1e-5)

    def test_images_of_a_single_text(self):
        pictures = [make_image(0), make_image(1)]
        assert PROCESSOR(text="a", images=pictures)["image_index"].tolist() == [[0, 1]]
        assert PROCESSOR(text="a", images=pictures[0])["image_index"].tolist() == [[0]]
        assert PROCESSOR(text="a", images=[])["image_index"].tolist() == [[-1]]
        assert PROCESSOR(text="a", images=None)["image_index"].tolist() == [[-1]]

    def test_an_array_of_images(self):
        array = np.zeros((2, 5, 6, 3), np.uint8)
        for images in (array, torch.zeros(2, 3, 5, 6)):
            assert PROCESSOR(text=["a", "b"], images=images)["image_index"].tolist() == [[0], [1]]

    def test_as_many_entries_as_texts(self):
        with pytest.raises(ValueError, match="one entry per text .*, but there are 1 entries for 2 texts"):
            PROCESSOR(text=["a", "b"], images=[make_image()])
        with pytest.raises(ValueError, match="there are 2 entries for 1 texts"):
            PROCESSOR(text=["a"], images=[None, None])

    @pytest.mark.parametrize("images", ["rain.jpg", b"12345678", make_image(), {"path": "rain.jpg"}, 8])
    def test_a_list_of_texts_wants_a_list_of_images(self, images):
        """Not the eight letters of a path for eight texts."""
        with pytest.raises(ValueError, match=f"must be a list with one .*, but is of type {type(images).__name__}"):
            PROCESSOR(text=["a"] * 8, images=images)

    def test_unreadable(self, tmp_path):
        with pytest.raises(ImageError, match=r"image '.*nowhere.png' does not exist"):
            PROCESSOR(text="a", images=tmp_path / "nowhere.png")


class TestTextAlone:
    def test_takes_no_images(self):
        processor = MMTransformerProcessor(tokenizer=make_tokenizer())
        assert processor(text="a cat")["image_index"].tolist() == [[-1]]
        with pytest.raises(ValueError, match="This processor has no image processor, but got images. It belongs to a"):
            processor(text="a cat", images=make_image())
        assert processor.model_input_names == ["input_ids", "attention_mask"]

    @pytest.mark.parametrize("cls", [MMTransformerProcessor, AutoProcessor])
    def test_save_and_load(self, cls, tmp_path):
        processor = MMTransformerProcessor(tokenizer=make_tokenizer())
        processor = pickle.loads(pickle.dumps(copy.deepcopy(processor)))
        processor.save_pretrained(tmp_path)
        assert "image_processor" not in json.loads((tmp_path / "processor_config.json").read_text())
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is MMTransformerProcessor
        assert loaded.image_processor is None
        assert torch.equal(loaded(text="a red cat")["input_ids"], processor(text="a red cat")["input_ids"])
        with pytest.raises(ValueError, match="no image processor"):
            loaded(text="a", images=make_image())


class TestSaving:
    @pytest.mark.parametrize("cls", [MMTransformerProcessor, AutoProcessor])
    def test_loaded_gives_equal_tensors(self, cls, tmp_path, warnings_of):
        processor = MMTransformerProcessor(
            image_processor=make_image_processor(image_mean=[0.1, 0.2, 0.3]), tokenizer=make_tokenizer(pad_token_id=1)
        )
        batch = dict(text=["a red cat", "the " * 100], images=[[make_image(0), make_image(1)], None])
        expected = processor(**batch, return_word_index=True)
        processor.save_pretrained(tmp_path)
        assert "_warned" not in json.loads((tmp_path / "processor_config.json").read_text())
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is MMTransformerProcessor
        actual = loaded(**batch, return_word_index=True)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert loaded.model_input_names == ["input_ids", "attention_mask", "pixel_values", "image_index", "frame_index"]
        assert len(warnings_of) == 2, "once for each processor"


def save_encoders(folder, text="bert", vision="vit", max_length=None, **image_options):
    """Config, tokenizer and image processor, as a Hub repository holds them."""
    config = TEXT_ENCODERS[text]()
    config.save_pretrained(folder / "text")
    tokenizer = make_tokenizer(pad_token_id=config.pad_token_id)
    # Many checkpoints do not say how long a text may be.
    tokenizer.model_max_length = max_length or int(1e30)
    tokenizer.save_pretrained(folder / "text")
    VISION_ENCODERS[vision]().save_pretrained(folder / "vision")
    make_image_processor(**image_options).save_pretrained(folder / "vision")
    return {"text": str(folder / "text"), "vision": str(folder / "vision")}


class TestFromEncoders:
    def test_from_folders(self, tmp_path):
        encoders = save_encoders(tmp_path, image_mean=[0.1, 0.2, 0.3])
        processor = MMTransformerProcessor.from_encoders(**encoders)
        assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
        batch = dict(text=["a red cat", "dog"], images=[make_image(), None])
        direct = MMTransformerProcessor(
            image_processor=make_image_processor(image_mean=[0.1, 0.2, 0.3]), tokenizer=make_tokenizer()
        )
        expected, actual = direct(**batch), processor(**batch)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert "token_type_ids" not in actual

    @pytest.mark.parametrize(("text", "max_length", "limit"), [
        ("bert", None, 40),
        ("bert", 25, 25),
        ("bert", 512, 40),
        ("roberta", None, 40),  # 42 positions, counted from 1 (padding) + 1
        ("roberta", 42, 40),
        ("xlm-roberta", None, 40),
        ("mpnet", 512, 40),
        ("t5", None, math.inf),
        ("t5", 77, 77),
    ])  # fmt: skip
    def test_texts_are_cut_to_what_the_encoder_takes(self, text, max_length, limit, tmp_path):
        encoders = save_encoders(tmp_path, text=text, max_length=max_length)
        config = TEXT_ENCODERS[text]()
        if text in ("roberta", "xlm-roberta", "mpnet"):
            assert config.max_position_embeddings - config.pad_token_id - 1 == 40
        processor = MMTransformerProcessor.from_encoders(**encoders)
        assert processor(text=["the " * 200])["input_ids"].shape[1] == min(limit, 202)
        processor.save_pretrained(tmp_path / "both")
        loaded = MMTransformerProcessor.from_pretrained(tmp_path / "both")
        assert loaded(text=["the " * 200])["input_ids"].shape[1] == min(limit, 202)

    def test_without_vision(self, tmp_path):
        processor = MMTransformerProcessor.from_encoders(text=save_encoders(tmp_path)["text"])
        assert processor.image_processor is None
        assert processor.tokenizer.model_max_length == 40

    def test_limit_of_a_text_tower(self, tmp_path):
        encoders = save_encoders(tmp_path)
        CLIPConfig(
            text_config=TEXT_ENCODERS["clip-text"]().to_dict(), vision_config=VISION_ENCODERS["clip-vision"]().to_dict()
        ).save_pretrained(tmp_path / "text")
        assert MMTransformerProcessor.from_encoders(**encoders).tokenizer.model_max_length == 40

    def test_pil_backend(self, tmp_path):
        encoders = save_encoders(tmp_path)
        processor = MMTransformerProcessor.from_encoders(**encoders, backend="pil")
        pictures = [make_image(0), make_image(1, size=(70, 40))]
        values = processor(text=["a", "b"], images=pictures)["pixel_values"]
        torch.testing.assert_close(values, expected_pixels(pictures), rtol=0, atol=1e-5)

    def test_torchvision_backend_agrees(self, tmp_path):
        pytest.importorskip("torchvision", exc_type=ImportError)
        encoders = save_encoders(tmp_path)
        processor = MMTransformerProcessor.from_encoders(**encoders, backend="torchvision")
        pictures = [make_image(0), make_image(1, size=(70, 40))]
        values = processor(text=["a", "b"], images=pictures)["pixel_values"]
        torch.testing.assert_close(values, expected_pixels(pictures), rtol=0, atol=ONE_STEP)

    def test_nothing_there(self, tmp_path):
        with pytest.raises((OSError, ValueError), match="nowhere"):
            MMTransformerProcessor.from_encoders(text=str(tmp_path / "nowhere"))


def test_options_reach_tokenizer_and_image_processor():
    processor = make_processor()
    image = make_image(0)
    plain, raw = (
        processor(text="a red dog", images=image),
        processor(text="a red dog", images=image, do_normalize=False),
    )
    expected = processor.image_processor(images=[image], return_tensors="pt", do_normalize=False)["pixel_values"]
    assert torch.equal(raw["pixel_values"], expected)
    assert not torch.equal(raw["pixel_values"], plain["pixel_values"])
    assert torch.equal(
        processor(text="a red dog", images=image, images_kwargs={"do_normalize": False})["pixel_values"], expected
    )
    bare = processor(text="a red dog", add_special_tokens=False)["input_ids"]
    assert bare.shape[1] == plain["input_ids"].shape[1] - 2
    assert torch.equal(processor(text="a red dog", text_kwargs={"add_special_tokens": False})["input_ids"], bare)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("image", "'images'"), ("do_normalise", "'do_normalize'"), ("add_special_token", "'add_special_tokens'")],
)
def test_arguments_that_nobody_takes_are_told(name, hint):
    with pytest.raises(TypeError, match=f"takes no argument {name!r}; did you mean {hint}"):
        make_processor()(text="a red dog", **{name: True})


def test_options_in_dicts_are_those_of_the_call():
    processor = make_processor()
    given = processor(text="a red dog", text_kwargs={"padding": "max_length", "max_length": 12})
    assert torch.equal(
        given["input_ids"], processor(text="a red dog", padding="max_length", max_length=12)["input_ids"]
    )
    with pytest.raises(ValueError, match="return_tensors must be 'pt', .*, but text_kwargs has 'np'"):
        processor(text="a red dog", text_kwargs={"return_tensors": "np"})
    inputs = processor(text="a red dog", images=make_image(0), return_word_index=True)
    assert make_model()(**inputs).logits  # what the processor gives beside the inputs of the model is passed over


def test_options_that_would_break_rows_are_refused():
    processor = make_processor()
    for option in ({"return_attention_mask": False}, {"return_overflowing_tokens": True}):
        name, value = next(iter(option.items()))
        with pytest.raises(ValueError, match=f"{name} must be {not value!r}, .*, but text_kwargs has {value!r}"):
            processor(text="a red dog", **option)
    with pytest.raises(ValueError, match="'do_normalize' is given twice: in images_kwargs and by its name"):
        processor(text="a", images=make_image(0), images_kwargs={"do_normalize": False}, do_normalize=False)
    with pytest.raises(TypeError, match="images_kwargs takes no 'do_normalise'; did you mean 'do_normalize'"):
        processor(text="a", images=make_image(0), images_kwargs={"do_normalise": False})


def test_options_of_videos_and_sound_reach_their_readers():
    frames = [make_image(seed) for seed in range(12)]
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor(), num_frames=8)
    for options, count in (({}, 8), ({"num_frames": 3}, 3), ({"do_sample_frames": False}, 12)):
        assert len(processor(text="a", videos=frames, **options)["pixel_values"]) == count
        assert len(processor(text="a", videos=frames, videos_kwargs=options)["pixel_values"]) == count
    clip = make_clip(0.1)
    # The length of texts is not that of sound.
    inputs = processor(text="a red dog", audio=clip, sampling_rate=16_000, max_length=12, padding="max_length")
    assert inputs["input_ids"].shape == (1, 12)
    assert inputs["input_values"].shape == (1, len(clip))
    cut = processor(text="a", audio=clip, audio_kwargs={"sampling_rate": 16_000, "max_length": 500, "truncation": True})
    assert cut["input_values"].shape == (1, 500)


def test_a_tokenizer_that_pads_to_a_length_does_so_in_the_processor(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding="max_length", max_length=17)
    processor = MMTransformerProcessor(make_image_processor(), tokenizer)
    assert processor(text=["a red dog", "a"])["input_ids"].shape == (2, 17)
    assert processor(text=["a red dog", "a"], padding=True)["input_ids"].shape == (2, 5)


def test_pictures_that_are_lists_are_told_apart():
    """Of each a temporary array is made, whose id may be that of the one before."""
    pictures = [np.full((8, 8, 3), value, np.uint8).tolist() for value in (0, 100, 200, 100)]
    inputs = make_processor()(text=["a"] * 4, images=pictures)
    pixels = inputs["pixel_values"][inputs["image_index"][:, 0]]
    alone = [make_processor()(text=["a"], images=[picture])["pixel_values"][0] for picture in pictures]
    torch.testing.assert_close(pixels, torch.stack(alone))


@pytest.mark.parametrize(
    "name", ["BeitImageProcessorPil", "ConvNextImageProcessorPil", "EfficientNetImageProcessorPil"]
)
def test_image_processors_that_name_types_they_do_not_import(name):
    """Their type hints cannot be resolved; their options are known all the same."""
    image_processor = getattr(transformers, name)()
    processor = MMTransformerProcessor(image_processor, make_tokenizer())
    assert processor(text=["a"], images=[make_image(0)], do_normalize=False)["pixel_values"].shape[0] == 1
    with pytest.raises(TypeError, match="did you mean 'do_normalize'"):
        processor(text=["a"], images=[make_image(0)], do_normalise=False)


def test_keys_of_rows_from_columns_of_a_table():
    processor = make_processor()
    processor.input_columns = {"text": ["text", "title"], "image": ["photo"]}
    keys = processor.with_keys
    assert keys({"title": "b", "text": "a"}) == {"text": "text: a\ntitle: b"}
    assert keys({"text": "a", "photo": "x.png"}) == {"text": "text: a", "image": "x.png"}
    assert keys({"photo": "x.png", "image": "y.png"}) == {"image": "y.png"}  # the key of the pipeline wins
    assert keys({"price": 3}) == {"price": 3}


def test_only_the_beginning_of_an_endless_text_is_tokenized(monkeypatch):
    processor, longest = make_processor(), []

    def tokenize_and_note(tokenizer, text, **options):
        longest.append(max(map(len, text)))
        return tokenize(tokenizer, text, **options)

    monkeypatch.setattr("mm_transformers.model.processing_mm_transformer.tokenize", tokenize_and_note)
    texts = ["a red cat " * 10_000, "the sun"]
    shortened = processor(text=texts, max_length=10)["input_ids"]
    assert max(longest) < 2000  # of 100,000 characters
    whole = processor.tokenizer(texts, max_length=10, truncation=True, padding=True, return_tensors="pt")["input_ids"]
    assert shortened.equal(whole)
