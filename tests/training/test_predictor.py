"""One way from rows to answers: encoders run once, texts are tokenized once, and the answers are those of the model."""

import datasets
import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from tiny import make_image, make_model, make_processor, make_tasks

from mm_transformers import MMDataCollator, Predictor
from mm_transformers.analysis.report import write_report
from mm_transformers.cli.page_answers import answers_as_html
from mm_transformers.model.predictions import Predictions
from mm_transformers.training.predictor import answer_columns


ROWS = [
    {"text": "a red dog", "image": make_image(1), "id": 7},
    {"text": "the big cat is in the river", "image": None, "id": 8},
    {"text": "", "image": make_image(2), "id": 9},
]


@pytest.fixture
def model():
    return make_model(tasks=make_tasks())


@pytest.fixture
def predictor(model):
    return Predictor(model, MMDataCollator(make_processor(), model.config), batch_size=2)


def alone(model, row):
    """The answers to one row, by the processor and the model only."""
    inputs = make_processor()(text=[row["text"]], images=[row["image"]], return_word_index=True)
    word_index = inputs.pop("word_index")
    with torch.no_grad():
        return model.eval().decode(model(**inputs), word_index)[0]


def assert_alike(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def counted(module, monkeypatch, calls):
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))


@pytest.mark.parametrize("form", [list, iter, lambda rows: Dataset.from_list([dict(r, image=None) for r in rows[:2]])])
def test_answers_are_those_of_the_model_row_by_row(model, predictor, form):
    rows = form(ROWS)
    expected = list(ROWS) if form in (list, iter) else [dict(r, image=None) for r in ROWS[:2]]
    found = predictor(rows)
    assert len(found) == len(expected)
    for answers, row in zip(found, expected, strict=True):
        assert_alike(answers, alone(model, row))


def test_a_stream_is_answered_batch_by_batch(model, predictor):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ROWS[len(taken) % 3]

    batches = predictor.stream(endless(), keep=lambda row: row["id"])
    first, second = next(batches), next(batches)
    assert [row for row, _ in [*first, *second]] == [8, 9, 7, 8]
    assert len(taken) <= 6
    assert_alike(first[0][1], alone(model, ROWS[1]))


def test_from_a_folder(model, predictor, tmp_path):
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    rows = [{"words": row["text"], "photo": row["image"]} for row in ROWS]
    loaded = Predictor.from_pretrained(tmp_path, ["topic"], text_column="words", image_column="photo", batch_size=3)
    for answers, expected in zip(loaded(rows), predictor(ROWS), strict=True):
        assert list(answers) == ["topic"]
        assert_alike(answers["topic"], expected["topic"])


def test_an_unknown_task_is_told(model):
    with pytest.raises(ValueError, match="did you mean 'topic'"):
        Predictor(model, MMDataCollator(make_processor(), model.config), ["topics"])


def test_texts_are_tokenized_once(model, predictor, monkeypatch):
    calls = []
    tokenizer = type(predictor.collator.processor.tokenizer)
    encode = tokenizer._encode_plus
    monkeypatch.setattr(tokenizer, "_encode_plus", lambda *args, **kw: calls.append(1) or encode(*args, **kw))
    predictor(ROWS[:2])
    assert len(calls) == 1


def test_logits_and_answers_come_from_one_pass(model, monkeypatch):
    calls = []
    counted(model.model.text_model, monkeypatch, calls)
    inputs = make_processor()(text=["a red dog", "the cat"])
    predictions = Predictions.of(model.train(), inputs)
    answers = predictions.answers(make_processor())
    assert len(calls) == 1
    assert model.training
    assert [row["topic"]["label"] for row in answers] == [
        model.tasks["topic"].labels[i] for i in predictions.logits["topic"].argmax(-1)
    ]
    with torch.no_grad():
        assert torch.equal(predictions.logits["topic"], model.eval()(**inputs).logits["topic"])


def test_the_page_runs_the_encoders_once_for_answers_and_bars(model, monkeypatch):
    calls = []
    counted(model.model.text_model, monkeypatch, calls)
    monkeypatch.setattr("mm_transformers.cli.page_answers.explain", raise_no_explanation)
    page = answers_as_html(model, make_processor(), {"text": "a red dog"}, ["topic"], ("text",))
    assert "no explanation" in page
    assert len(calls) == 1


def raise_no_explanation(*args, **kwargs):
    raise ValueError("no explanation")


def test_texts_may_be_lists_and_arrays_of_words(model, predictor):
    words = ["a", "red", "dog"]
    expected = alone(model, {"text": " ".join(words), "image": None})
    for text in (words, np.array(words)):
        assert_alike(predictor([{"text": text, "image": None}])[0], expected)


def test_tables_of_pandas_and_features_of_data_sets(model, predictor, tmp_path):
    """Cells mean what they mean in training: empty ones are missing, and casts are kept."""
    make_image(1).save(tmp_path / "a.webp", lossless=True)
    path = str(tmp_path / "a.webp")
    table = pandas.DataFrame({"text": ["a red dog", None], "image": [None, path], "price": [1.5, None]})
    for answers, row in zip(
        predictor(table), ({"text": "a red dog", "image": None}, {"text": "", "image": path}), strict=True
    ):
        assert_alike(answers, alone(model, row))
    grey = Dataset.from_dict({"text": [""], "image": [path]}).cast_column("image", datasets.Image(mode="L"))
    [[(row, answers)]] = predictor.stream(grey)
    assert row["image"]["path"] == path
    assert_alike(answers, alone(model, {"text": "", "image": make_image(1).convert("L")}))


def test_a_report_may_be_named_by_a_text(model, tmp_path):
    write_report(f"{tmp_path}/report.html", model, make_processor(), [{"text": "a red dog", "image": None}])
    assert "topic" in (tmp_path / "report.html").read_text()


# Rows without any content

NOTHING = {"text": " ", "image": None, "id": 10}


def leaves(answer):
    if isinstance(answer, dict):
        return [leaf for part in answer.values() for leaf in leaves(part)]
    return [leaf for part in answer for leaf in leaves(part)] if isinstance(answer, list) else [answer]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_without_content_has_an_empty_answer(model, predictor, caplog, workers):
    predictor.probabilities, predictor.num_workers = True, workers
    filled = predictor(ROWS)
    rows = [ROWS[0], NOTHING, ROWS[1], ROWS[2], NOTHING, NOTHING]  # the last batch has no other rows
    with caplog.at_level("WARNING", "mm_transformers"):
        answered = [pair for batch in predictor.stream(rows, keep=lambda row: row["id"]) for pair in batch]
    assert [kept for kept, _ in answered] == [7, 10, 8, 9, 10, 10]
    answers = [answer for _, answer in answered]
    assert_alike([answers[0], answers[2], answers[3]], filled)
    for i in (1, 4, 5):
        assert set(leaves(answers[i])) == {None}
        names, keys = predictor.probability_names, predictor.answer_keys
        columns = answer_columns(answers[i], names, keys)
        assert list(columns) == list(answer_columns(filled[0], names, keys))
        assert all(cell is None or cell == [] for cell in columns.values())
    assert [r.message for r in caplog.records] == [
        "3 rows have no content in 'text', 'image', 'video' and no answer; the first is row 1."
    ]
    assert (predictor.num_empty_rows, predictor.first_empty_row) == (3, 1)
    predictor(ROWS)
    assert predictor.num_empty_rows == 0


def test_a_row_without_content_has_no_vectors(predictor):
    vectors = predictor.embed([ROWS[0], NOTHING])
    assert np.isfinite(vectors["fused"][0]).all()
    assert all(np.isnan(vector[1]).all() for vector in vectors.values())


def test_a_row_whose_only_picture_is_dropped_has_an_empty_answer(model):
    collator = MMDataCollator(make_processor(), model.config, on_bad_file="drop")
    rows = [{"text": "", "image": b"no picture"}, {"text": "a red dog", "image": b"no picture"}]
    empty, filled = Predictor(model, collator)(rows)
    assert set(leaves(empty)) == {None}
    assert_alike(filled, alone(model, {"text": "a red dog", "image": None}))


def test_training_still_refuses_rows_without_content(predictor):
    predictor([NOTHING])
    with pytest.raises(ValueError, match="row 0 of the batch has no content in 'text', 'image', 'video': remove"):
        predictor.collator([NOTHING])
