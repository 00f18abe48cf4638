"""Rows of files, and labels as files store them."""

import csv
import io
import json
import os
import re

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_transformers import Regression
from mm_transformers.data.files import check_writable
from mm_transformers.data.labels import check_labels, prepare_labels
from mm_transformers.data.loading import load_files, sample_rows
from mm_transformers.data.tables import TableRows, table_writer
from mm_transformers.model.label_cells import infer_labels
from mm_transformers.model.safe_writing import write_atomically
from mm_transformers.model.tasks import task_from_dict


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@settings(deadline=None)
@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6))
def test_cells_of_csv_are_the_texts_that_were_written(folder, rows):
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text", "topic"], *rows])
    expected = [{"text": text or None, "topic": topic or None} for text, topic in rows]
    assert list(TableRows(path)) == expected
    data = load_files({"train": str(path)}, (), cache_dir=str(folder / "cache"))["train"]
    assert data.to_list() == expected


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("\ufefftext,n\na,007\n", [{"text": "a", "n": "007"}]),
        ("text,n\na,\n\nb,1,\n", [{"text": "a", "n": None}, {"text": "b", "n": "1"}]),
        (",text\n0,a\n", [{"Unnamed: 0": "0", "text": "a"}]),
        ('text,n\r\n"a\nb",NA\r\n', [{"text": "a\nb", "n": "NA"}]),
        ("text\n" + "a" * 200_000 + "\n", [{"text": "a" * 200_000}]),
    ],
)
def test_csv_as_it_comes(tmp_path, text, rows):
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8", newline="")
    assert list(TableRows(tmp_path / "rows.csv")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "text,topic\na,b\nI like it, really,b\n", "row 1 has 3 cells, but there are 2 columns"),
        ("rows.csv", "text,topic\n\na,b\n\nc\n", "row 1 has 1 cells, but there are 2 columns (line 5; an empty cell"),
        ("rows.csv", 'text,topic\n"a\nb",c\nd,"e\nf,g\n', "begins in line 4 has a quote that is not closed"),
        ("rows.csv", 'text,topic\na,b\n"c,d\ne,"f"\n', "the row that begins in line 3 has a quote that is not closed"),
        ("rows.csv", "text,topic,text\na,b,c\n", "has two columns 'text': rename one"),
        ("rows.csv", b"text\n\xff\xfe\n", "cannot be read as CSV"),
        ("rows.csv", "text,topic\n", "has no rows"),
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "row 1 cannot be read as JSON"),
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', "row 1 must be a JSON object, but is \"['b']\""),
        ("rows.jsonl", '{"n": 1, "m": 1}\n{"n": 1, "m": [2]}\n', "column 'm' has values of several types"),
        ("rows.jsonl", '{"n": 99999999999999999999999}\n', "column 'n' has values of several types"),
        ("rows.jsonl", '{"n": "\\ud800"}\n', "column 'n' has values of several types, or of a type that tables"),
        ("rows.jsonl", '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "row 0 cannot be read as JSON"),
        ("rows.parquet", "PAR1 it is not", "cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_one_sentence_says_what_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (TableRows, lambda path: load_files({"train": str(path)}, (), option="data.{split}")):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_what_comes_late_in_a_file_has_its_type(tmp_path):
    """`datasets` guesses types by the first block of a file."""
    rows = [{"n": 1, "tags": None, "word": "1"} for _ in range(5000)]
    rows += [{"n": 0.5, "tags": ["a"], "word": "x", "late": True}, {"n": float("nan")}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_files({"train": str(path)}, ())["train"]
    assert data.features == datasets.Features(
        n=datasets.Value("float64"), tags=datasets.List(datasets.Value("string")), word=datasets.Value("string"),
        late=datasets.Value("bool"),
    )  # fmt: skip
    assert data[0] == {"n": 1.0, "tags": None, "word": "1", "late": None}
    assert data[-2] == {"n": 0.5, "tags": ["a"], "word": "x", "late": True}
    assert data[-1] == {"n": None, "tags": None, "word": None, "late": None}
    path = tmp_path / "rows.csv"
    path.write_text("topic\n" + "1\n" * 50_000 + "one\n")
    assert load_files({"train": str(path)}, ())["train"][-1] == {"topic": "one"}


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\na\n")
    assert load_files({"train": str(path)}, ())["train"]["text"][:] == ["a"]
    path.write_text("text\nb\n")  # as long, and perhaps within the same second
    os.utime(path, ns=(0, 12345))
    assert load_files({"train": str(path)}, ())["train"]["text"][:] == ["b"]


def prepared(task: dict, train: list, validation: list) -> datasets.DatasetDict:
    splits = {"train": train, "validation": validation}
    data = datasets.DatasetDict({k: datasets.Dataset.from_dict({"topic": v}) for k, v in splits.items()})
    return prepare_labels(data, [{"name": "topic", **task}])


@pytest.mark.parametrize(
    ("kind", "cells", "expected"),
    [
        ("classification", ["0", "1.0", " "], [0, 1, None]),
        ("classification", ["007", "1", None], ["007", "1", None]),
        ("classification", ["1", "one", "NA"], ["1", "one", "NA"]),
        ("classification", ["9007199254740993", "1"], [9007199254740993, 1]),
        ("multi_label", ["0", "1"], ["0", "1"]),
        ("generation", [1, None], ["1", None]),
    ],
)
def test_a_column_of_whole_numbers_holds_numbers(kind, cells, expected):
    data = prepared({"kind": kind}, cells, cells[:1])
    assert data["train"]["topic"][:] == expected
    assert data["validation"]["topic"][:] == expected[:1]


def test_splits_are_read_alike():
    assert prepared({"kind": "classification"}, ["a", "b"], ["1"])["validation"]["topic"][:] == ["1"]  # no id


@pytest.mark.parametrize(
    ("kind", "expected"), [("regression", "expected a finite number"), ("matching", "expected True or False")]
)
def test_a_text_that_is_none_of_the_task_is_named(kind, expected):
    task = task_from_dict({"name": "topic", "kind": kind})
    rows = datasets.Dataset.from_dict({"topic": ["1", None, "two"]})
    with pytest.raises(ValueError, match=rf"^validation rows: row 2, column 'topic': task 'topic': {expected}.*'two'"):
        check_labels({"validation": rows}, [task], "text")


def test_labels_that_a_task_does_not_know_are_found_in_all_splits():
    task = task_from_dict({"name": "topic", "kind": "classification", "labels": ["a", "b"]})
    data = {
        "train": datasets.Dataset.from_dict({"text": ["x", "y"], "topic": ["a", "b"]}),
        "test": datasets.Dataset.from_dict({"text": ["x", "y", "z"], "topic": ["a", None, "c"]}),
    }
    with pytest.raises(ValueError, match=r"^test rows: row 2, column 'topic': .*'c'"):
        check_labels(data, [task], "text")
    check_labels({"train": data["train"]}, [task], "text")
    words = task_from_dict({"name": "tags", "kind": "token_classification", "labels": ["O", "B"]})
    rows = datasets.Dataset.from_dict({"text": ["a b", "a b"], "tags": [["O", "B"], ["O"]]})
    with pytest.raises(ValueError, match=r"^train rows: row 1, column 'tags'"):
        check_labels({"train": rows}, [words], "text")


@pytest.mark.parametrize(
    ("cells", "labels"),
    [(["b", None, "a"], ["a", "b"]), ([10, 9, -100, 2.0], ["2", "9", "10"]), ([["x"], [], ["y"]], ["x", "y"])],
)
def test_labels_are_inferred(cells, labels):
    assert infer_labels(cells, "topic") == labels


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([0.5, 1.0], "numbers that are not whole: for a regression"),
        (["0.5", "1"], "numbers that are not whole: for a regression"),
        (["a", 1], "holds texts and numbers"),
        ([{"a": 1}], "which cannot be a label"),
        ([None, -100], "has no label in the training rows"),
    ],
)
def test_what_is_no_label_is_told(cells, message):
    with pytest.raises(ValueError, match=message):
        infer_labels(cells, "topic")


def test_numbers_of_rows_are_positive():
    with pytest.raises(ValueError, match="at least 1, but is -3"):
        sample_rows(datasets.Dataset.from_dict({"text": ["a"]}), -3)


def test_fewer_random_rows_are_some_of_more():
    rows = datasets.Dataset.from_dict({"text": list(map(str, range(200)))})
    some, few = sample_rows(rows, 50)["text"], sample_rows(rows, 10)["text"]
    assert (len(few), len(set(few) & set(some))) == (10, 10)
    assert list(map(int, some)) == sorted(map(int, some))
    assert sample_rows(rows, 200)["text"] == rows["text"]


@pytest.mark.parametrize(
    ("numbers", "row", "more"),
    [
        ([*np.random.default_rng(0).normal(size=50), 1e12], 50, False),
        ([-999.0, *np.random.default_rng(0).normal(size=50), 400.0], 0, True),
        ([*[0.0] * 40, 1.0, 2.0, 3.0, 1e9], 43, False),  # the median distance is 0
        ([*np.random.default_rng(0).normal(size=50), 30.0], None, False),
        ([*[0.0] * 40, 1.0], None, False),
        ([3.0] * 10, None, False),
        ([1.0, 1e9], None, False),
    ],
)
def test_numbers_to_predict_that_are_far_away_are_told(numbers, row, more, caplog):
    rows = datasets.Dataset.from_dict({"text": ["a"] * (len(numbers) + 1), "Preis": [None, *numbers]})
    task = Regression("price", column="Preis")
    for _ in range(2):  # told once
        check_labels({"train": rows, "test": rows}, [task], "text")
    told = [message for message in caplog.messages if "'price'" in message]
    assert len(told) == (row is not None)
    if row is not None:
        assert f"column 'Preis' has {numbers[row]:.6g} in row {row + 1} of the training table, more than 100" in told[0]
        assert ("(2 rows have such numbers)" in told[0]) == more


def test_where_nothing_can_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "rows.csv")
    assert not (tmp_path / "new").exists()
    for path, message in [(tmp_path, "is a folder"), (tmp_path / "file" / "rows.csv", "is not a folder")]:
        with pytest.raises(ValueError, match=message):
            check_writable(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_named_by_its_file(tmp_path):
    def write():
        with write_atomically(tmp_path / "rows.csv") as file, open("/dev/full", "wb", buffering=0) as full:
            file.write(b"some")
            full.write(b"more")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/rows.csv'"):
        write()
    assert os.listdir(tmp_path) == []


def test_parquet_of_nested_columns(tmp_path):
    table = pyarrow.table({"text": ["a"], "scores": [[1, 2]]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert list(TableRows(tmp_path / "rows.parquet")) == [{"text": "a", "scores": [1, 2]}]


def test_texts_and_numbers_in_one_column_of_json_become_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    cells = ["a", 1776, 2.5, True, None, "é"]
    for order in (cells, cells[1:] + cells[:1], [300] * 1500 + ["a"], ["a"] * 1500 + [300]):
        path.write_text("".join(json.dumps({"title": cell, "n": 1}) + "\n" for cell in order))
        expected = [None if c is None else c if isinstance(c, str) else json.dumps(c) for c in order]
        assert [row["title"] for row in TableRows(path)] == expected
        assert TableRows(path).schema.field("title").type == pyarrow.string()
        assert load_files({"train": str(path)}, (), cache_dir=str(tmp_path / "cache"))["train"]["title"][:] == expected


def test_the_columns_of_csv_are_written_once_before_the_first_row():
    file = io.BytesIO()
    writer = table_writer(file, ".csv", {})
    writer.write([])
    writer.write([{"text": "a, b", "=price": 1}])
    writer.write([{"text": "=1", "=price": None}, {"text": "c", "=price": 2}])
    rows = list(csv.reader(io.StringIO(file.getvalue().decode(), newline="")))
    assert rows == [["text", "'=price"], ["a, b", "1"], ["'=1", ""], ["c", "2"]]
