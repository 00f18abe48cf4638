"""From rows of a table to a batch: what is in it, and what is said of rows that do not fit."""

import copy
import gc
import io
import pickle
import zipfile
from collections.abc import Mapping

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_SIZE, make_config, make_image, make_image_processor, make_model, make_processor, make_tokenizer
from torch.utils.data import DataLoader

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTransformerProcessor,
    MultiLabel,
    Regression,
    TokenClassification,
)
from mm_transformers.data.collator import ROW_KEY
from mm_transformers.model.images import ImageError


PROCESSOR = make_processor()
COLLATOR = MMDataCollator(PROCESSOR, make_config())
NAN = float("nan")


def png(seed=0):
    buffer = io.BytesIO()
    make_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def make_collator(tasks=None, vision="vit", **kwargs):
    return MMDataCollator(make_processor(), make_config(vision=vision, tasks=tasks or [Regression("score")]), **kwargs)


def message_of(collator, rows, error_class=ValueError):
    """What is said of rows that do not fit: one sentence that ends like one."""
    with pytest.raises(error_class) as error:
        collator(rows)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    return message


def same(first, second):
    """Whether two batches hold the same tensors; a missing label is the same as a missing label."""
    labels = first["labels"].keys() == second["labels"].keys() and all(
        torch.equal(first["labels"][name].nan_to_num(-9.0), second["labels"][name].nan_to_num(-9.0))
        for name in first["labels"]
    )
    names = first.keys() - {"labels"}
    return labels and first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in names)


class TestBatch:
    def test_all_in_all(self):
        shared = make_image(0)
        rows = [
            {"text": "a red cat", "image": shared, "topic": "food", "sentiment": 1, "tags": ["blue"], "score": 2,
             "entities": ["O", None, "NAME"]},
            {"text": "dogs", "image": None},
            {"text": "", "image": [make_image(1), shared], "tags": [], "score": None, "topic": None},
        ]  # fmt: skip
        batch = COLLATOR(rows)
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_index", "labels"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 5)
        assert batch["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["image_index"].tolist() == [[0, -1], [-1, -1], [1, 0]]
        labels = batch["labels"]
        assert list(labels) == ["topic", "sentiment", "tags", "score", "entities"]
        assert labels["topic"].tolist() == [1, -100, -100]
        assert labels["sentiment"].tolist() == [1, -100, -100]
        assert labels["tags"].nan_to_num(9).tolist() == [[0, 0, 1], [9, 9, 9], [0, 0, 0]]
        assert labels["score"].nan_to_num(9).tolist() == [2, 9, 9]
        n = -100
        assert labels["entities"].tolist() == [[n, 0, n, 1, n], [n] * 5, [n] * 5]
        dtypes = {name: tensor.dtype for name, tensor in labels.items()}
        assert dtypes == {
            "topic": torch.int64, "sentiment": torch.int64, "tags": torch.float32, "score": torch.float32,
            "entities": torch.int64,
        }  # fmt: skip

    def test_the_model_takes_it(self):
        model = make_model()
        outputs = model(**COLLATOR([{"text": "a cat", "image": make_image(), "topic": 0}, {"text": "rain"}]))
        assert outputs.loss.isfinite()
        assert outputs.losses["score"] == 0

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_every_task_in_every_batch(self, data):
        tables = {
            "topic": st.sampled_from(["animals", "food", "travel", 0, 2, None, NAN]),
            "sentiment": st.sampled_from([0, 1.0, "positive", -100, None]),
            "tags": st.none() | st.lists(st.sampled_from(["red", "blue"]), unique=True),
            "score": st.sampled_from([None, NAN, 0.5, 3]),
        }
        rows = []
        for _ in range(data.draw(st.integers(1, 5))):
            row = {"text": "cat " * data.draw(st.integers(1, 6))}
            row.update({name: data.draw(v) for name, v in tables.items() if data.draw(st.booleans())})
            rows.append(row)
        batch = COLLATOR(rows)
        n, length = len(rows), max(len(row["text"].split()) for row in rows) + 2
        assert {name: tuple(v.shape) for name, v in batch["labels"].items()} == {
            "topic": (n,), "sentiment": (n,), "tags": (n, 3), "score": (n,), "entities": (n, length),
        }  # fmt: skip
        for name in ("topic", "sentiment", "tags", "score"):
            tensor = batch["labels"][name]
            for row, label in zip(rows, tensor, strict=True):
                cell = row.get(name)
                missing = cell is None or (isinstance(cell, float) and cell != cell) or cell == -100
                is_missing = label.isnan().all() if tensor.is_floating_point() else label == -100
                assert bool(is_missing) == missing
        assert (batch["labels"]["entities"] == -100).all()
        assert batch["input_ids"].shape == (n, length)
        assert "pixel_values" not in batch
        assert batch["image_index"].tolist() == [[-1]] * n

    def test_length_is_that_of_the_longest(self):
        for words in ([1, 3], [7, 2, 5], [60, 1]):
            batch = COLLATOR([{"text": "cat " * n} for n in words])
            assert batch["input_ids"].shape[1] == min(max(words) + 2, 40)
        assert make_collator(pad_to_multiple_of=8)([{"text": "a b c d e f g"}])["input_ids"].shape[1] == 16
        assert make_collator(max_length=5)([{"text": "a b c d e f g"}])["input_ids"].shape[1] == 5
        assert make_collator(max_length=5000)([{"text": "cat " * 60}])["input_ids"].shape[1] == 40

    def test_the_encoder_limits_where_the_tokenizer_does_not(self):
        processor = MMTransformerProcessor(
            image_processor=make_image_processor(), tokenizer=make_tokenizer(pad_token_id=1, max_length=10**30)
        )
        collator = MMDataCollator(processor, make_config(text="roberta", tasks=[Regression("score")]))
        assert collator([{"text": "cat " * 60}])["input_ids"].shape[1] == 40

    def test_columns_have_any_name(self):
        tasks = [Classification("topic", labels=["a", "b"], column="my label"), Regression("other", column="my label")]
        collator = make_collator(tasks, text_column="caption", image_column="photo")
        batch = collator([{"caption": "a cat", "photo": make_image(), "my label": 1, "text": 3, "image": "no.png"}])
        assert batch["labels"]["topic"].tolist() == [1]
        assert batch["labels"]["other"].tolist() == [1.0]
        assert batch["image_index"].tolist() == [[0]]

    def test_labels_of_words_are_cut_with_the_text(self):
        collator = make_collator([TokenClassification("entities", labels=["O", "NAME"])], max_length=5)
        batch = collator(
            [{"text": "a cat is on the desk", "entities": [0, 1, 0, 0, 0, 1]}, {"text": "dogs", "entities": [1]}]
        )
        n = -100
        assert batch["labels"]["entities"].tolist() == [[n, 0, 1, 0, n], [n, 1, n, n, n]]

    def test_a_model_of_text_alone_does_not_read_images(self):
        rows = [{"text": "a cat", "image": "not/there.png", "score": 1}]
        expected = make_collator(vision=None)([{"text": "a cat", "score": 1}])
        for processor in (make_processor(), MMTransformerProcessor(tokenizer=make_tokenizer())):
            collator = MMDataCollator(processor, make_config(vision=None, tasks=[Regression("score")]))
            batch = collator(rows)
            assert set(batch) == {"input_ids", "attention_mask", "labels"}
            assert same(batch, expected)
        assert "row 0 of the batch has no content in 'text': remove the row." in message_of(
            collator, [{"text": "", "image": png()}]
        )


class TestImages:
    def test_every_kind_of_cell(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(png())
        picture = make_image()
        array = np.asarray(picture)
        expected = COLLATOR([{"text": "a cat", "image": picture}])
        cells = [
            str(path), path, png(), {"bytes": png(), "path": None}, {"bytes": None, "path": str(path)}, array,
            array.transpose(2, 0, 1), torch.from_numpy(array.copy()), array / 255, [picture],
            (str(path),), [None, path],
        ]  # fmt: skip
        for cell in cells:
            assert same(COLLATOR([{"text": "a cat", "image": cell}]), expected)

    @pytest.mark.parametrize("cell", [None, NAN, np.float64("nan"), pd.NA, [], [None], (), [NAN]])
    def test_no_image(self, cell):
        batch = COLLATOR([{"text": "a cat", "image": cell}, {"text": "a dog"}])
        assert batch["image_index"].tolist() == [[-1], [-1]]
        assert "pixel_values" not in batch

    @pytest.mark.parametrize("decode", [True, False])
    def test_cells_of_datasets(self, decode, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(png(1))
        table = datasets.Dataset.from_dict(
            {
                "text": ["a cat", "a dog", "rain", "sun"],
                "image": [{"bytes": png(0), "path": None}, None, str(path), {"bytes": png(0), "path": None}],
                "album": [[str(path)], [], None, [str(path), {"bytes": png(0), "path": None}]],
                "score": [1.0, None, 2.0, 3.0],
            },
            features=datasets.Features(
                {
                    "text": datasets.Value("string"),
                    "image": datasets.Image(decode=decode),
                    "album": datasets.List(datasets.Image(decode=decode)),
                    "score": datasets.Value("float64"),
                }
            ),
        )
        rows = [table[i] for i in range(4)]
        expected = PROCESSOR(text=["a", "b"], images=[make_image(0), make_image(1)])["pixel_values"]
        batch = make_collator()(rows)
        # Decoded, equal bytes are different objects; as they are stored, they are seen to be the same.
        assert batch["image_index"].tolist() == ([[0], [-1], [1], [2]] if decode else [[0], [-1], [1], [0]])
        assert torch.equal(batch["pixel_values"][batch["image_index"][[0, 2, 3], 0]], expected[[0, 1, 0]])
        assert batch["labels"]["score"].nan_to_num(9).tolist() == [1, 9, 2, 3]

        batch = make_collator(image_column="album")(rows)
        expected_index = [[0, -1], [-1, -1], [-1, -1], [1, 2]] if decode else [[0, -1], [-1, -1], [-1, -1], [0, 1]]
        assert batch["image_index"].tolist() == expected_index

    def test_rows_of_a_torch_formatted_data_set(self):
        table = datasets.Dataset.from_dict(
            {"text": ["a cat", "a dog"], "topic": [2, -100], "score": [0.5, NAN], "tags": [[0, 2], []],
             "image": np.zeros((2, 3, 6, 7), np.uint8).tolist()},
        ).with_format("torch")  # fmt: skip
        tasks = [
            Classification("topic", labels=["a", "b", "c"]),
            Regression("score"),
            MultiLabel("tags", labels=["x", "y", "z"]),
        ]
        labels = make_collator(tasks)([table[0], table[1]])["labels"]
        assert labels["topic"].tolist() == [2, -100]
        assert labels["score"].nan_to_num(9).tolist() == [0.5, 9]
        assert labels["tags"].tolist() == [[1, 0, 1], [0, 0, 0]]

    def test_rows_of_a_data_frame(self):
        frame = pd.DataFrame(
            {"text": ["a cat", None, "a dog"], "image": [png(), png(), None], "topic": ["food", None, pd.NA],
             "score": [1.5, None, 2]},
        )  # fmt: skip
        batch = COLLATOR(frame.to_dict("records"))
        assert batch["image_index"].tolist() == [[0], [0], [-1]]
        assert batch["labels"]["topic"].tolist() == [1, -100, -100]
        assert batch["labels"]["score"].nan_to_num(9).tolist() == [1.5, 9, 2]

    def test_shared_images_are_read_once(self, tmp_path, monkeypatch):
        path = tmp_path / "a.png"
        path.write_bytes(png(1))
        rows = [{"text": "a", "image": cell} for cell in (str(path), png(), path, [png(), {"path": str(path)}])]
        opened = []
        original = PIL.Image.open
        monkeypatch.setattr(
            PIL.Image, "open", lambda source, *a, **k: opened.append(source) or original(source, *a, **k)
        )
        batch = COLLATOR(rows)
        assert len(opened) == 2
        assert batch["image_index"].tolist() == [[0, -1], [1, -1], [0, -1], [1, 0]]

    def test_images_that_live_only_while_they_are_read(self):
        """A row may decode its image anew each time it is asked; Python then gives the same id to different objects."""

        class LazyRow(Mapping):
            def __init__(self, colour):
                self.colour = colour

            def __getitem__(self, name):
                if name == "text":
                    return "a cat"
                if name == "image":
                    return np.full((4, 4, 3), self.colour, np.uint8)
                raise KeyError(name)

            def __iter__(self):
                return iter(("text", "image"))

            def __len__(self):
                return 2

        colours = list(range(0, 250, 10))
        batch = COLLATOR([LazyRow(colour) for colour in colours])
        assert batch["image_index"].flatten().tolist() == list(range(len(colours)))
        means = batch["pixel_values"].mean((1, 2, 3))
        torch.testing.assert_close(means, torch.tensor(colours) / 255 * 2 - 1)


class TestBadImages:
    def test_are_told_by_row_column_and_file(self, tmp_path):
        path = str(tmp_path / "lost.jpg")
        rows = [{"text": "a", ROW_KEY: 3}, {"text": "b", "image": path, ROW_KEY: 7314}]
        assert message_of(COLLATOR, rows, ImageError) == (
            f"row 7,314, column 'image': image '{path}' does not exist; repair or remove it, or pass "
            "on_bad_file='drop' to treat it as missing."
        )
        del rows[1][ROW_KEY]
        assert message_of(COLLATOR, rows, ImageError).startswith(f"row 1 of the batch, column 'image': image '{path}'")
        rows[1] = {"text": "b", "photo": [make_image(), path], ROW_KEY: 1}
        assert message_of(make_collator(image_column="photo"), rows, ImageError).startswith("row 1, column 'photo': ")

    @pytest.mark.parametrize("cell", [b"nonsense", png()[:60], b"", 5, np.zeros(3), np.zeros((0, 3)), {"path": "no"}])
    def test_of_any_kind_are_told_or_dropped(self, cell):
        rows = [{"text": "a", "image": cell, ROW_KEY: 0}, {"text": "b", "image": [make_image(), cell], ROW_KEY: 1}]
        assert message_of(make_collator(), rows, ImageError).startswith("row 0, column 'image': ")

        collator = make_collator(on_bad_file="drop")
        assert collator.num_bad_files == 0
        batch = collator(rows)
        assert same(batch, make_collator()([{"text": "a"}, {"text": "b", "image": make_image()}]))
        assert collator.num_bad_files == 2
        collator(rows)
        assert collator.num_bad_files == 4

    def test_a_row_of_which_nothing_is_left_teaches_nothing(self):
        collator = make_collator(on_bad_file="drop")
        batch = collator([{"text": "", "image": b"nonsense", "score": 1.5}, {"text": "a", "score": 1.5}])
        assert batch["labels"]["score"].isnan().tolist() == [True, False]
        batch = collator([{"text": "", "image": [b"nonsense", make_image()]}])
        assert batch["image_index"].tolist() == [[0]]

    @pytest.mark.parametrize("name", ["max_length", "pad_to_multiple_of"])
    def test_lengths_are_at_least_one(self, name):
        make_collator(**{name: 1})
        with pytest.raises(ValueError, match=f"{name} must be at least 1, but is 0"):
            make_collator(**{name: 0})

    def test_other_choices(self):
        with pytest.raises(ValueError, match=r"on_bad_file must be 'raise' or 'drop', but is 'skip'\."):
            make_collator(on_bad_file="skip")

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
    def test_are_counted_across_workers(self, context):
        rows = [{"text": f"a {n}", "image": b"bad" if n % 3 == 0 else None, "score": n} for n in range(20)]
        collator = make_collator(on_bad_file="drop")
        loader = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=2, multiprocessing_context=context)
        scores = [score for batch in loader for score in batch["labels"]["score"].tolist()]
        assert scores == list(range(20))
        assert collator.num_bad_files == 7
        collator(rows[:1])
        assert collator.num_bad_files == 8

    @pytest.mark.slow
    def test_errors_of_workers_name_the_row(self):
        rows = [{"text": "a", "image": b"bad" if n == 5 else None, ROW_KEY: n} for n in range(8)]
        loader = DataLoader(rows, batch_size=2, collate_fn=make_collator(), num_workers=2)
        with pytest.raises(ValueError, match=r"row 5, column 'image': the image \(3 bytes\) is not an image"):
            list(loader)
        # The workers live as long as the traceback, whose end must not fall into that of another test's workers.
        gc.collect()

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda collator: pickle.loads(pickle.dumps(collator))])
    def test_copies_count_for_themselves(self, clone):
        collator = make_collator(on_bad_file="drop", max_length=7)
        rows = [{"text": "cat " * 9, "image": b"bad", "score": 1}]
        collator(rows)
        copied = clone(collator)
        assert same(copied(rows), collator(rows))
        assert (collator.num_bad_files, copied.num_bad_files) == (2, 2)
        list(DataLoader(rows * 3, collate_fn=copied, num_workers=1, multiprocessing_context="fork"))
        assert (collator.num_bad_files, copied.num_bad_files) == (2, 5)


class TestTexts:
    @pytest.mark.parametrize(("cell", "text"), [
        (["a", "red", "cat"], "a red cat"), (("a",), "a"), (np.str_("a cat"), "a cat"), ("  a  cat\n", "  a  cat\n"),
    ])  # fmt: skip
    def test_strings_and_lists_of_words(self, cell, text):
        expected = [PROCESSOR.tokenizer.encode(text)]
        assert COLLATOR([{"text": cell}])["input_ids"].tolist() == expected

    def test_labels_of_a_list_of_words(self):
        batch = COLLATOR([{"text": ["A", "lovely", "cat"], "entities": ["O", "O", "NAME"]}])
        assert batch["labels"]["entities"].tolist() == [[-100, 0, 0, 1, -100]]

    @pytest.mark.parametrize("cell", ["", " \n", None, NAN, np.float64("nan"), pd.NA, [], [""]])
    def test_no_text(self, cell):
        batch = COLLATOR([{"text": cell, "image": make_image()}])
        tokenizer = PROCESSOR.tokenizer
        assert batch["input_ids"].tolist() == [[tokenizer.cls_token_id, tokenizer.sep_token_id]]
        for row in ({"text": cell}, {"text": cell, "image": None}, {"text": cell, "image": []}):
            assert message_of(COLLATOR, [{"text": "a"}, {**row, ROW_KEY: 1_000_000}]) == (
                "row 1,000,000 has no content in 'text', 'image', 'video': remove the row."
            )

    def test_missing_column(self):
        rows = [{"caption": "a cat", "image": None, ROW_KEY: 12}]
        assert message_of(COLLATOR, rows) == (
            "row 12 has no column 'text' (its columns are 'caption', 'image'); name the column of your texts by "
            "text_column=."
        )

    @pytest.mark.parametrize("cell", [3, 2.5, True, b"a cat", {"a": 1}, ["a", 3], [["a"]]])
    def test_what_is_no_text(self, cell):
        assert message_of(COLLATOR, [{"text": "a"}, {"text": cell, ROW_KEY: 4321}]) == (
            f"row 4,321, column 'text': expected a text (or a list of words), but got {cell!r} of type "
            f"{type(cell).__name__}."
        )

    def test_half_a_character(self):
        """JSON may hold one of the two surrogates of an emoji; no tokenizer takes it."""
        message = message_of(COLLATOR, [{"text": "a \ud83d cat", ROW_KEY: 4}])
        assert message.startswith("row 4, column 'text': the text is not valid Unicode (")


class TestLabelErrors:
    @pytest.mark.parametrize(("column", "cell", "message"), [
        ("topic", "sports", "task 'topic': label 'sports' is not one of: animals, food, travel."),
        ("topic", 3, "task 'topic': label 3 is not one of: animals, food, travel (or an id from 0 to 2); a missing "),
        ("sentiment", -1, "task 'sentiment': label -1 is not one of: negative, positive (or an id from 0 to 1); a "),
        ("tags", 1, "task 'tags': expected a list of labels"),
        ("tags", "pink", "task 'tags': label 'pink' is not one of: red, green, blue"),
        ("score", "much", "task 'score': expected a finite number (of float32; None if it is missing), but got "),
        ("entities", [0], "task 'entities': got 1 labels for a text of 2 words."),
        ("entities", [0, 9], "task 'entities': label 9 is not one of: O, NAME"),
    ])  # fmt: skip
    def test_name_row_column_and_task(self, column, cell, message):
        rows = [{"text": "a cat", ROW_KEY: 7313}, {"text": "a dog", column: cell, ROW_KEY: 7314}]
        assert message_of(COLLATOR, rows).startswith(f"row 7,314, column '{column}': {message}")

    def test_the_column_may_be_called_otherwise(self):
        collator = make_collator([Regression("score", column="my score")])
        assert message_of(collator, [{"text": "a", "my score": "x"}]).startswith(
            "row 0 of the batch, column 'my score': task 'score': expected a finite number"
        )


class TestTokenizerFits:
    def test_more_tokens_than_embeddings(self):
        processor = make_processor()
        processor.tokenizer.add_tokens([f"word{i}" for i in range(2000)])
        size = len(processor.tokenizer)
        with pytest.raises(ValueError, match=(
            rf"^The tokenizer has {size:,} tokens, but the text encoder has embeddings for 99: load the processor that "
            r"belongs to the model, or call model\.resize_token_embeddings\(len\(tokenizer\)\)\.$"
        )):  # fmt: skip
            MMDataCollator(processor, make_config())
        model = make_model()
        model.resize_token_embeddings(size)
        batch = MMDataCollator(processor, model.config)([{"text": "word1999"}])
        assert batch["input_ids"].max() == size - 1
        assert model(**batch).logits["score"].isfinite().all()

    def test_no_padding_token(self):
        processor = make_processor()
        processor.tokenizer.pad_token = None
        with pytest.raises(ValueError, match=r"^The tokenizer has no padding token; set one, for example tokenizer\."):
            MMDataCollator(processor, make_config())

    @pytest.mark.parametrize("text", ["roberta", "xlm-roberta", "mpnet"])
    def test_positions_are_counted_from_the_padding(self, text):
        with pytest.raises(ValueError, match=(
            "^The tokenizer pads with id 0, but the text encoder counts positions from padding id 1: load the processor"
        )):  # fmt: skip
            MMDataCollator(make_processor(), make_config(text=text))
        processor = MMTransformerProcessor(
            image_processor=make_image_processor(), tokenizer=make_tokenizer(pad_token_id=1)
        )
        batch = MMDataCollator(processor, make_config(text=text))([{"text": "a"}, {"text": "a cat"}])
        assert batch["input_ids"][0, -1] == 1

    def test_where_positions_do_not_depend_on_it_any_padding_will_do(self):
        processor = MMTransformerProcessor(
            image_processor=make_image_processor(), tokenizer=make_tokenizer(pad_token_id=1)
        )
        rows = [{"text": "a"}, {"text": "a cat"}]
        batch = MMDataCollator(processor, make_config())(rows)
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_files_inside_archives(tmp_path):
    """How streamed data sets name what is not on the disk."""
    archive = tmp_path / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("0.png", png())
    address = f"zip://0.png::{archive}"
    batch = make_collator()([{"text": "a", "image": {"path": address, "bytes": None}, "score": 1}])
    assert torch.equal(
        batch["pixel_values"], make_collator()([{"text": "a", "image": png(), "score": 1}])["pixel_values"]
    )
    row = {"text": "a", "image": {"path": address.replace("0.png", "1.png"), "bytes": None}, "score": 1}
    assert "row 0 of the batch, column 'image': 'zip://1.png" in message_of(make_collator(), [row])


@pytest.mark.parametrize("num_columns", [20, 21])
def test_at_most_twenty_columns_are_named(num_columns):
    names = [f"note {i}" for i in range(num_columns)]
    config = make_config(vision=None, tasks=[Classification("topic", ["animals", "food"])])
    collator = MMDataCollator(make_processor(), config, text_column=names)
    with pytest.raises(ValueError, match="no content in") as error:
        collator([dict.fromkeys(names)])
    shown = [repr(name) for name in names[:20]] + ["..."] * (num_columns > 20)
    assert str(error.value) == f"row 0 of the batch has no content in {', '.join(shown)}: remove the row."
