"""What each column of a table is taken for, and which task a target becomes: each message in full."""

import dataclasses
import io
from datetime import date, datetime

import datasets
import pandas as pd
import pytest
from PIL import Image

from mm_transformers.data.column_kinds import column_kinds, known_kinds, target, task_name
from mm_transformers.model.limits import limits, set_limits


N = 60
WORDS = ["red", "blue", "green", "house", "tree", "river", "light", "stone", "cloud", "paper"]


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * k) % 10] for k in (1, 3, 7, 9, 2)) + f" {i}"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def of(cells, name="x", root=".", **kwargs):
    (found,) = column_kinds(datasets.Dataset.from_dict({name: cells}), root=root, **kwargs)
    return found.role, found.reason


@pytest.fixture
def folder(tmp_path):
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(png())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "cells", "expected"),
    [
        ("x", [sentence(i) for i in range(N)], ("text", "60 different texts of 6.0 words on average")),
        ("city", [f"Town {i % 7}" for i in range(N)], ("category", "7 different values in 60 rows")),
        ("flag", [i % 3 == 0 for i in range(N)], ("category", "2 different values in 60 rows")),
        ("price", [i * 1.5 for i in range(N)], ("number", "60 different numbers")),
        ("price", [f"{i % 20}.5" for i in range(N)], ("number", "20 different numbers")),
        ("price", [None, "?", "n/a", *(str(i % 20) for i in range(N))], ("number", "20 different numbers")),
        ("year", [1950 + i % 30 for i in range(N)], ("number", "30 different numbers")),
        ("id", list(range(500, 500 + N)), ("ignore", "an identifier: whole numbers, all different")),
        ("itemId", [i * 7 % 1009 for i in range(N)], ("ignore", "an identifier: whole numbers, all different")),
        ("count", [i * 7 % 1009 for i in range(N)], ("number", "60 different numbers")),
        ("x", list(range(N)), ("ignore", "an identifier: whole numbers, all different")),
        ("code", [f"A-{i:04}" for i in range(N)], ("ignore", "an identifier: all different, such as 'A-0000'")),
        ("source", ["shop"] * N, ("ignore", "all its cells are 'shop'")),
        ("empty", [None, "", " "] * 20, ("ignore", "it is empty")),
        ("sold", [f"2024-{1 + i % 12:02}-{1 + i % 28:02}" for i in range(N)], ("date", "dates such as 2024-01-01")),
        ("sold", [f"{1 + i % 28:02}.{1 + i % 12:02}.2024" for i in range(N)],
         ("date", "dates such as 01.01.2024, read as %d.%m.%Y")),
        ("sold", [date(2024, 1, 1 + i % 28) for i in range(N)], ("date", "dates")),
        ("sold", [datetime(2024, 1, 1 + i % 28, 9) for i in range(N)], ("date", "dates")),
        ("words", [["red", "tree"], ["blue"]] * 30, ("text", "lists of words")),
        ("points", [[1.0, 2.0], [3.0]] * 30, ("ignore", "its cells are lists of numbers")),
        ("size", [("12", "large", "small")[i % 3] for i in range(N)],
         ("category", "3 different values in 60 rows, of which some are numbers (such as '12')")),
        ("picture", [f"nowhere/{i}.jpg" for i in range(N)],
         ("ignore", "paths such as 'nowhere/0.jpg', but these files do not exist in .")),
        ("address", [f"https://example.org/{i}.jpg" for i in range(N)],
         ("image", "paths of files, of which 60 of 60 that were looked at exist")),
        ("thing", [{"a": 1}] * N, ("ignore", "its cells are neither texts, numbers nor files that can be read")),
        ("text", ["grin", "smile", "cat"] * 20, ("text", "its name (3 different values in 60 rows)")),
        ("text", ["7", "8", "9"] * 20, ("text", "its name (3 different numbers)")),
        ("text", [7, 8, 9] * 20,
         ("ignore", "an input of a row has its name; rename it to use it (3 different numbers)")),
        ("text", ["same"] * N, ("ignore", "all its cells are 'same'")),
        ("video", ["yes", "no"] * 30,
         ("ignore", "an input of a row has its name; rename it to use it (2 different values in 60 rows)")),
        ("Straße (€)", ["Weg", "Gasse", "Allee"] * 20, ("category", "3 different values in 60 rows")),
    ],
)  # fmt: skip
def test_kinds(name, cells, expected):
    assert of(cells, name) == expected


def test_files(folder):
    paths = [f"{i}.png" if i % 10 else None for i in range(N)]
    assert of(paths, root=folder) == ("image", "paths of files, of which 54 of 54 that were looked at exist")
    assert of([[f"{i}.png", "0.png"] for i in range(N)], root=folder)[0] == "image"
    assert of([f"{i}.wav" for i in range(N)], root=folder)[0] == "ignore"
    assert of([png()] * 3) == ("image", "the bytes of files (3 of 3 that were looked at)")
    features = datasets.Features({"photo": datasets.Image()})
    rows = datasets.Dataset.from_dict({"photo": [{"bytes": png(), "path": None}]}, features=features)
    assert column_kinds(rows)[0].role == "image"
    assert column_kinds(rows)[0].reason == "a column of `datasets.Image`"


def test_classes_of_a_data_set():
    features = datasets.Features({"x": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"x": [0, 1, 1]}, features=features)
    assert column_kinds(rows)[0] == column_kinds(rows, said={})[0]
    assert (column_kinds(rows)[0].role, column_kinds(rows)[0].reason) == ("category", "2 named classes")


def test_a_category_has_at_most_so_many_values():
    rows = datasets.Dataset.from_dict({"brand": [f"brand {chr(97 + i % 5)}" for i in range(60)]})
    before = limits()
    try:
        for most, role in ((5, "category"), (4, "text")):
            set_limits(category_values=most)
            [found] = column_kinds(rows, ["other"])
            assert found.role == role
    finally:
        set_limits(**dataclasses.asdict(before))


def test_one_word_of_the_user_corrects_a_wrong_guess():
    for kind in known_kinds():
        assert of([1000 + i for i in range(N)], "zip", said={"zip": kind}) == (kind, "you said so")
    with pytest.raises(ValueError, match="^Column 'x' cannot be 'word': the kinds are text, image, video, audio,"):
        of([1], said={"x": "word"})
    with pytest.raises(ValueError, match="^--column: the table has no column 'y'; its columns are 'x'.$"):
        of([1], said={"y": "text"})


def test_targets_are_no_inputs():
    rows = datasets.Dataset.from_pandas(pd.DataFrame({"a": ["x y z v w"] * 3, "b": [1, 2, 3]}))
    assert [column.name for column in column_kinds(rows, ["b"])] == ["a"]
    rows = rows.select_columns(["b", "a"]).add_column("c", [1, 2, 3])
    assert [column.name for column in column_kinds(rows, iter(["b", "c"]))] == ["a"]


@pytest.mark.parametrize(
    ("cells", "task", "reason", "separator"),
    [
        (["a", "b", None] * 20, "classification", "2 different labels", None),
        ([True, False] * 20, "classification", "truth values", None),
        ([1, 2, 3, 4, 5] * 20, "classification",
         "5 different whole numbers; some (target):regression takes them as numbers", None),
        ([i * 0.5 for i in range(40)], "regression", "40 different numbers", None),
        ([str(i) for i in range(40)], "regression", "40 different numbers", None),
        (["-", "n/a", *(str(i) for i in range(40))], "regression", "40 different numbers", None),
        (["red|blue", "red", "green|blue|red"] * 10, "multi_label",
         "3 different labels, several in a cell, separated by '|'", "|"),
        (["red; blue", "red", "green; blue"] * 10, "multi_label",
         "3 different labels, several in a cell, separated by ';'", ";"),
        ([["red"], ["red", "blue"]] * 10, "multi_label", "lists of labels", None),
    ],
)  # fmt: skip
def test_targets(cells, task, reason, separator):
    found = target(datasets.Dataset.from_dict({"some (target)": cells}), "some (target)")
    scale = {"scale": 11.5} if "1" in cells else {"scale": 5.77} if task == "regression" else {}
    assert found.task == {"name": "some_target", "kind": task, "column": "some (target)", **scale}
    assert (found.reason, found.separator) == (reason, separator)
    assert found.left_out == sum(cell in (None, "-", "n/a") for cell in cells)


def test_labels_that_are_missing():
    rows = datasets.Dataset.from_dict({"x": ["n/a", "?", None, *map(str, range(40))]})
    assert target(rows, "x").left_out == 3
    assert target(rows, "x").task == {"name": "x", "kind": "regression", "scale": 11.5}


def test_long_columns_are_sampled_at_random():
    labels = ["a", "b"] * 20_000
    assert target(datasets.Dataset.from_dict({"x": labels}), "x").reason == "2 different labels"
    assert of(labels) == ("category", "2 different values in 20,000 rows")
    # Missing labels are counted in the whole column.
    assert target(datasets.Dataset.from_dict({"x": ["n/a", "?", *map(str, range(20_100))]}), "x").left_out == 2


def test_targets_that_cannot_be_predicted():
    texts = datasets.Dataset.from_dict({"x": [sentence(i) for i in range(N)], "one": ["a"] * N, "none": [None] * N})
    with pytest.raises(
        ValueError,
        match="^--predict x: 60 different texts in 60 rows are neither few labels nor numbers; give a text encoder "
        "that can write, such as a T5, by --text.$",
    ):
        target(texts, "x")
    assert target(texts, "x", has_decoder=True).task == {"name": "x", "kind": "generation"}
    assert target(texts, "x", "classification").reason == "you said so"
    with pytest.raises(ValueError, match="^--predict one: all cells are 'a', so there is nothing to learn.$"):
        target(texts, "one")
    with pytest.raises(ValueError, match="^--predict none: the column is empty, so there is nothing to learn from.$"):
        target(texts, "none")
    with pytest.raises(
        ValueError, match="^--predict: the table has no column 'y'; its columns are 'x', 'one', 'none'.$"
    ):
        target(texts, "y")


@pytest.mark.parametrize(
    ("column", "name"),
    [("price", "price"), ("Preis (€)", "Preis"), ("größe in m²", "groe_in_m2"), ("2nd", "task_2nd"), ("日本", "task")],
)
def test_names_of_tasks(column, name):
    assert task_name(column) == name
