"""Rows without content, against a plain loop over the cells."""

import io
import math

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm_transformers.data.loading import leave_out_empty_rows


def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "words": datasets.Sequence(datasets.Value("string")),
        "image": datasets.Image(),
        "price": datasets.Value("float32"),
        "stock": datasets.Value("int64"),
        "note": datasets.Value("string"),
    }
)
CELLS = st.fixed_dictionaries(
    {
        "text": st.sampled_from([None, "", "  \n", "\u3000", "a cat"]),
        "words": st.sampled_from([None, [], ["a", "cat"]]),
        "image": st.sampled_from([None, png()]),
        "price": st.sampled_from([None, math.nan, 0.0]),
        "stock": st.sampled_from([None, 0]),
        "note": st.just("not read"),
    }
)


def has_content(row, columns):
    empty = {"text": lambda x: not (x or "").strip(), "words": lambda x: not x, "price": lambda x: math.isnan(x or 0)}
    return any(row[c] is not None and not empty.get(c, lambda x: False)(row[c]) for c in columns)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(CELLS, min_size=1, max_size=12),
    st.sets(st.sampled_from(["text", "words", "image", "price", "stock"]), min_size=1),
)
def test_the_rows_with_content_stay(cells, columns):
    kept = [number for number, row in enumerate(cells) if has_content(row, columns)]
    rows = datasets.Dataset.from_list(cells, features=FEATURES).add_column("number", np.arange(len(cells)))
    # Also behind a selection, which `datasets` keeps as indices.
    for start in {0, len(cells) // 2}:
        data = datasets.DatasetDict({"train": rows.select(range(start, len(cells)))})
        here = [number for number in kept if number >= start]
        if not here:
            with pytest.raises(ValueError, match=r"^No train row has content in '"):
                leave_out_empty_rows(data, sorted(columns))
            continue
        leave_out_empty_rows(data, [*sorted(columns), "not there"])
        assert list(data["train"]["number"]) == here


def test_a_warning_counts_them(caplog):
    rows = datasets.Dataset.from_dict({"text": ["a", " ", None, "b"], "price": [None, math.nan, None, 1.0]})
    data = datasets.DatasetDict({"train": rows, "test": rows.select([0, 3])})
    test = data["test"]
    left = leave_out_empty_rows(data, ["text", "price"])
    assert {split: numbers.tolist() for split, numbers in left.items()} == {"train": [0, 3], "test": [0, 1]}
    assert data["test"] is test
    assert [r.message for r in caplog.records] == [
        "2 of 4 train rows have no content in 'text', 'price' and are left out; the first is row 1. "
        "Later messages number the other rows, unless they say 'of the training table'."
    ]


def test_texts_that_are_no_numbers_are_missing_in_columns_of_numbers():
    cells = {"text": [None, "n/a", None, None], "price": ["N/A", None, " - ", "3"], "brand": [None, None, None, "-"]}
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict({**cells, "number": range(4)})})
    leave_out_empty_rows(data, list(cells), ["price"])
    assert data["train"]["number"][:] == [1, 3]
