"""`mm-transformers predict` with probabilities and with folders, on a saved model."""

import csv
import json
import os

import pyarrow.parquet
import pytest
import torch
from command_line import mm
from distributed import run_in_processes
from recipes import write_csv
from tiny import (
    make_audio_processor,
    make_clip,
    make_image,
    make_model,
    make_processor,
    make_tasks,
    make_tokenizer,
    open_gates,
)

from mm_transformers import MMTransformerForMultiTask, MMTransformerProcessor, Predictor, Regression, TableConfig
from mm_transformers.cli.predict import Reading, run_prediction


TEXTS = ["a red dog", "the big cat is in the river", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a table whose last row has a picture only."""
    folder = tmp_path_factory.mktemp("predict")
    make_model(tasks=make_tasks()).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    make_image(3).save(folder / "3.png")
    rows = [{"id": i, "text": text, "image": None if text else "3.png"} for i, text in enumerate(TEXTS)]
    write_csv(folder / "rows.csv", rows)
    return folder


def logits_of(text, image=None):
    model = make_model(tasks=make_tasks())
    inputs = make_processor()(text=[text], images=[image], return_word_index=True)
    word_index = inputs.pop("word_index")
    with torch.no_grad():
        return model(**inputs).logits, word_index


def read(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_each_label_has_a_column(folder, tmp_path, kind):
    output = tmp_path / f"answers.{kind}"
    mm("predict", folder / "model", folder / "rows.csv", "--output", output, "--probabilities", "--batch-size", 2)
    rows = read(output)
    assert len(rows) == 3
    names = [name for name in rows[0] if "_probability_" in name]
    assert names == [
        *(f"topic_probability_{label}" for label in ("animals", "food", "travel")),
        *(f"sentiment_probability_{label}" for label in ("negative", "positive")),
        *(f"tags_probability_{label}" for label in ("red", "green", "blue")),
        *(f"entities_probability_{label}" for label in ("O", "NAME")),
    ]
    assert all(list(row) == list(rows[0]) for row in rows)
    for row, text in zip(rows, TEXTS, strict=True):
        logits, word_index = logits_of(text, None if text else make_image(3))
        expected = {
            "topic": logits["topic"].softmax(-1)[0],
            "sentiment": logits["sentiment"].softmax(-1)[0],
            "tags": logits["tags"].sigmoid()[0],
        }
        for task, label_names in (("topic", ("animals", "food", "travel")), ("tags", ("red", "green", "blue"))):
            found = [float(row[f"{task}_probability_{label}"]) for label in label_names]
            assert found == pytest.approx(expected[task].tolist(), abs=1e-5)
        words = row["entities_probability_NAME"]
        words = json.loads(words) if isinstance(words, str) else words
        starts = word_index[0] >= 0
        assert words == pytest.approx(logits["entities"].softmax(-1)[0, starts, 1].tolist(), abs=1e-5)
        assert len(words) == len(text.split())


def test_without_the_option_there_is_no_such_column(folder, tmp_path):
    mm("predict", folder / "model", folder / "rows.csv", "--output", tmp_path / "a.csv")
    assert not any("probability" in name for name in read(tmp_path / "a.csv")[0])


def test_the_predictor_adds_them_to_answers(folder):
    predictor = Predictor.from_pretrained(folder / "model", ["topic", "entities", "score"], probabilities=True)
    [answer] = predictor([{"text": TEXTS[1], "image": None}])
    logits, _ = logits_of(TEXTS[1])
    expected = dict(zip(("animals", "food", "travel"), logits["topic"].softmax(-1)[0].tolist(), strict=True))
    assert answer["topic"]["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert sum(answer["entities"][6]["probabilities"].values()) == pytest.approx(1)
    assert answer["score"].keys() == {"value"}
    assert predictor.probability_names["score"] == Regression("score").probability_names == []


# Rows without any content


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_without_content_keep_their_places(folder, tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr("mm_transformers.data.tables.CHUNK_SIZE", 2)  # so that the first ones have no type
    write_csv(tmp_path / "rows.csv", [{"id": i, "text": t} for i, t in enumerate(["", " ", "", "a red dog"])])
    write_csv(tmp_path / "filled.csv", [{"id": 3, "text": "a red dog"}])
    options = ("--probabilities", "--batch-size", 2, "--output")
    mm("predict", folder / "model", tmp_path / "rows.csv", *options, tmp_path / f"a.{kind}")
    mm("predict", folder / "model", tmp_path / "filled.csv", *options, tmp_path / f"b.{kind}")
    rows, [filled] = read(tmp_path / f"a.{kind}"), read(tmp_path / f"b.{kind}")
    assert [str(row["id"]) for row in rows] == ["0", "1", "2", "3"]
    assert rows[3].keys() == filled.keys()
    assert rows[3]["topic"] == filled["topic"]
    assert float(rows[3]["score"]) == pytest.approx(float(filled["score"]), abs=1e-5)
    new = [name for name in filled if name not in ("id", "text")]
    assert all(row[name] in (None, "", [], "[]") for row in rows[:3] for name in new)
    assert "3 rows have no content in 'text', 'image', 'video' and no answer; the first is row 0." in caplog.messages


@pytest.mark.slow
def test_processes_count_rows_without_content_together(folder, tmp_path):
    texts = ["a red dog", "", "the cat", "", "a", "b", ""]
    write_csv(tmp_path / "rows.csv", [{"id": i, "text": text} for i, text in enumerate(texts)])
    command = ["predict", str(folder / "model"), str(tmp_path / "rows.csv"), "--batch-size", "2", "--output"]
    said = run_in_processes(["-m", "mm_transformers.cli", *command, str(tmp_path / "two.csv")])
    mm(*command, tmp_path / "one.csv")
    assert said.count("3 rows have no content in 'text', 'image', 'video' and no answer; the first is row 1.") == 1
    for two, one in zip(read(tmp_path / "two.csv"), read(tmp_path / "one.csv"), strict=True):
        assert (two["id"], two["topic"]) == (one["id"], one["topic"])
        assert (two["topic"] == "") == (two["text"] == "")


def test_evaluation_leaves_out_rows_without_content(folder, tmp_path, caplog):
    rows = [{"text": "a red dog", "topic": "animals"}, {"text": "", "topic": "food"}, {"text": "sea", "topic": "food"}]
    write_csv(tmp_path / "rows.csv", rows)
    write_csv(tmp_path / "filled.csv", [rows[0], rows[2]])
    mm("evaluate", folder / "model", tmp_path / "rows.csv", "--output", tmp_path / "a.json")
    mm("evaluate", folder / "model", tmp_path / "filled.csv", "--output", tmp_path / "b.json")
    assert any(message.startswith("1 of 3 rows.csv rows has no content in 'text' and") for message in caplog.messages)
    scores = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert scores[0]["eval_topic_f1"] == scores[1]["eval_topic_f1"]
    assert scores[0]["eval_samples"] == 2


# Folders


def alone(image):
    """The answer to a picture without a text."""
    model = make_model(tasks=make_tasks())
    with torch.no_grad():
        return model.decode(model(**make_processor()(text=[""], images=[image])))[0]


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    (root / "a/deep").mkdir(parents=True)
    make_image(1).save(root / "b.png")
    make_image(2).save(root / "a/deep/C.BMP")
    make_image(4).save(root / "a/x.tiff")
    (root / "notes.txt").write_text("no picture")
    return root


def test_a_folder_of_pictures(folder, pictures, tmp_path):
    mm("predict", folder / "model", pictures, "--output", tmp_path / "a.csv", "--tasks", "topic,score")
    rows = read(tmp_path / "a.csv")
    assert [row["image"] for row in rows] == ["a/deep/C.BMP", "a/x.tiff", "b.png"]
    assert list(rows[0]) == ["image", "topic", "topic_score", "score"]
    for row, seed in zip(rows, (2, 4, 1), strict=True):
        expected = alone(make_image(seed))
        assert row["topic"] == expected["topic"]["label"]
        assert float(row["score"]) == pytest.approx(expected["score"]["value"], abs=1e-5)


def test_the_predictor_answers_a_folder(folder, pictures):
    predictor = Predictor.from_pretrained(folder / "model", ["score"], batch_size=2)
    answered = [pair for batch in predictor.stream(pictures) for pair in batch]
    assert [row for row, _ in answered] == [{"image": "a/deep/C.BMP"}, {"image": "a/x.tiff"}, {"image": "b.png"}]
    assert predictor(str(pictures)) == [answers for _, answers in answered]
    assert answered[2][1]["score"]["value"] == pytest.approx(alone(make_image(1))["score"]["value"], abs=1e-5)


def test_links_out_of_the_folder_are_not_followed(folder, pictures, tmp_path, caplog):
    make_image(9).save(tmp_path / "secret.png")
    (tmp_path / "outside").mkdir()
    make_image(9).save(tmp_path / "outside/s.png")
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    (pictures / "linked").symlink_to(tmp_path / "outside")
    (pictures / "loop").symlink_to(pictures)
    (pictures / "inside.png").symlink_to("b.png")
    (pictures / ".hidden.png").symlink_to("b.png")
    os.mkfifo(pictures / "pipe.png")
    predictor = Predictor.from_pretrained(folder / "model", ["score"])
    names = [row["image"] for batch in predictor.stream(pictures) for row, _ in batch]
    assert names == ["a/deep/C.BMP", "a/x.tiff", "b.png", "inside.png"]


def test_names_of_files_that_look_like_addresses(folder, tmp_path):
    (tmp_path / "f/http:").mkdir(parents=True)
    make_image(1).save(tmp_path / "f/data:,x.png")
    make_image(1).save(tmp_path / "f/http:/host.png")
    found = Predictor.from_pretrained(folder / "model", ["score"])(tmp_path / "f")
    assert found[0] == found[1]


@pytest.mark.parametrize("case", ["empty", "unread", "name", "text"])
def test_what_is_wrong_with_a_folder(folder, tmp_path, case):
    model, rows = folder / "model", tmp_path / "rows"
    rows.mkdir()
    if case == "empty":
        message = "rows has no files of pictures or video (names that end in .png, .jpg"
    elif case == "unread":
        (rows / "a.png").write_bytes(b"no picture")
        message = f"column 'image': image '{rows}/a.png'"
    elif case == "name":
        open(os.fsencode(rows) + b"/\xff.png", "wb").close()
        message = "is not valid Unicode; rename it."
    else:
        make_model(tasks=make_tasks(), vision=None).save_pretrained(tmp_path / "model")
        MMTransformerProcessor(tokenizer=make_tokenizer()).save_pretrained(tmp_path / "model")
        model, message = tmp_path / "model", "The model reads neither pictures nor sounds"
    said = mm("predict", model, rows, "--output", tmp_path / "a.csv", ok=False)
    assert message in " ".join(said.split())
    assert not (tmp_path / "a.csv").exists()


def test_a_folder_of_sounds(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    model = make_model(tasks=make_tasks(), vision=None, audio="wav2vec2")
    processor = make_audio_processor(images=False)
    (tmp_path / "sounds").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / f"sounds/{i}.wav", make_clip(seed=i), 16_000, subtype="FLOAT")
    make_image(1).save(tmp_path / "sounds/cover.png")
    rows = Predictor(model, processor, ["score"])(tmp_path / "sounds")
    with torch.no_grad():
        inputs = processor(text=[""], audio=[{"array": make_clip(seed=1), "sampling_rate": 16_000}])
        expected = model(**inputs).logits["score"]
    assert len(rows) == 3
    assert rows[1]["score"]["value"] == pytest.approx(float(expected), abs=1e-5)


def answers_of(model, rows, output, **columns):
    run_prediction(str(model), rows, output, None, 2, 0, None, Reading(columns))
    return [row["score"] for row in read(output)]


def test_columns_are_those_of_the_processor(tmp_path):
    """Also without a recipe beside the model, as in Python."""
    model, processor = make_model(tasks=[Regression("score")]), make_processor()
    processor.input_columns = {"text": ["title", "body"], "image": ["photo"]}
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    make_image(3).save(tmp_path / "3.png")
    rows = [{"title": "a red dog", "body": "in the river", "photo": "3.png", "name": "big cat"}]
    write_csv(tmp_path / "rows.csv", rows)
    expected = Predictor.from_pretrained(tmp_path / "model")([{**rows[0], "photo": str(tmp_path / "3.png")}])
    found = answers_of(tmp_path / "model", tmp_path / "rows.csv", tmp_path / "answers.jsonl")
    assert found == pytest.approx([expected[0]["score"]["value"]])
    found = answers_of(tmp_path / "model", tmp_path / "rows.csv", tmp_path / "other.jsonl", text="name")
    assert found != pytest.approx([expected[0]["score"]["value"]])
    (tmp_path / "model" / "recipe.yaml").write_text("columns: {text: name}")
    assert answers_of(tmp_path / "model", tmp_path / "rows.csv", tmp_path / "third.jsonl") == found


def test_a_model_without_text_and_recipe(tmp_path):
    table = TableConfig(columns=[{"name": "price", "kind": "number", "mean": 3.0, "std": 2.0}], hidden_size=16)
    model = MMTransformerForMultiTask.from_encoders(text=None, table=table, tasks=[Regression("score")])
    open_gates(model)
    model.save_pretrained(tmp_path / "model")
    MMTransformerProcessor.from_encoders(text=None, table=table).save_pretrained(tmp_path / "model")
    write_csv(tmp_path / "rows.csv", [{"price": 1}, {"price": 7}])
    found = answers_of(tmp_path / "model", tmp_path / "rows.csv", tmp_path / "answers.jsonl")
    expected = Predictor.from_pretrained(tmp_path / "model")([{"price": 1}, {"price": 7}])
    assert found == pytest.approx([answer["score"]["value"] for answer in expected])
    assert len(set(found)) == 2
