"""`mm-transformers predict` with probabilities and with folders, on a saved model."""

import csv
import json

import pyarrow.parquet
import pytest
import torch
from command_line import mm
from recipes import write_csv
from tiny import make_image, make_model, make_processor, make_tasks

from mm_transformers import Predictor, Regression


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
