"""`mm-transformers embed`: vectors of rows in files."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from command_line import mm
from distributed import run_in_processes
from recipes import write_csv
from safetensors.numpy import load_file
from tiny import make_image, make_model, make_processor

from mm_transformers import Predictor, Retrieval


ROWS = [
    {"id": 7, "text": "a red dog", "image": "1.png", "text_embedding": "mine"},
    {"id": 8, "text": "the cat", "image": None, "text_embedding": None},
    {"id": 9, "text": "", "image": "2.png", "text_embedding": None},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    make_model(tasks=[Retrieval("captions", embedding_size=8)]).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    for i in (1, 2):
        make_image(i).save(folder / f"{i}.png")
        make_image(i).save(folder / f"pictures/{i}.png")
    write_csv(folder / "rows.csv", ROWS)
    return folder


def expected(folder, **options):
    rows = [{**row, "image": row["image"] and str(folder / row["image"])} for row in ROWS]
    return Predictor.from_pretrained(folder / "model").embed(rows, **options)


def check(found, vectors, row):
    for name, array in vectors.items():
        if np.isnan(array[row]).all():
            assert found[f"{name}_embedding"] is None
        else:
            np.testing.assert_allclose(found[f"{name}_embedding"], array[row], rtol=1e-4, atol=1e-5)


def test_parquet_keeps_the_columns_of_the_rows(folder, tmp_path):
    said = mm("embed", folder / "model", folder / "rows.csv", "--output", tmp_path / "e.parquet", "--batch-size", 2)
    assert "Wrote the vectors of 3 rows" in said
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == [
        "id", "text", "image", "text_embedding_input", "fused_embedding", "text_embedding", "vision_embedding",
    ]  # fmt: skip
    assert table.schema.field("vision_embedding").type.value_type == pyarrow.float32()
    vectors = expected(folder)
    for i, row in enumerate(table.to_pylist()):
        assert row["id"] == str(ROWS[i]["id"])
        check(row, vectors, i)


def test_json_lines_of_a_retrieval_task(folder, tmp_path):
    mm("embed", folder / "model", folder / "rows.csv", "--output", tmp_path / "e.jsonl", "--task", "captions")
    vectors = expected(folder, task="captions")
    assert list(vectors) == ["text", "vision"]
    for i, line in enumerate((tmp_path / "e.jsonl").read_text().splitlines()):
        check(json.loads(line), vectors, i)


def test_safetensors_hold_the_vectors_alone(folder, tmp_path):
    mm("embed", folder / "model", folder / "rows.csv", "--output", tmp_path / "e.safetensors", "--normalize")
    vectors = expected(folder, normalize=True)
    found = load_file(tmp_path / "e.safetensors")
    assert found.keys() == vectors.keys() == {"fused", "text", "vision"}
    for name, array in vectors.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def test_a_folder_of_pictures(folder, tmp_path):
    mm("embed", folder / "model", folder / "pictures", "--output", tmp_path / "e.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pylist()
    assert [row["image"] for row in rows] == ["1.png", "2.png"]
    vectors = expected(folder)
    np.testing.assert_allclose(rows[1]["fused_embedding"], vectors["fused"][2], rtol=1e-4, atol=1e-5)
    assert rows[1]["text_embedding"] is None


@pytest.mark.slow
def test_two_processes_write_all_rows_in_order(folder, tmp_path):
    command = [
        "-m",
        "mm_transformers.cli",
        "embed",
        str(folder / "model"),
        str(folder / "rows.csv"),
        "--batch-size",
        "1",
    ]
    for output in ("e.parquet", "e.safetensors"):
        run_in_processes([*command, "--output", str(tmp_path / output)])
    vectors = expected(folder)
    rows = pyarrow.parquet.read_table(tmp_path / "e.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["7", "8", "9"]
    for i, row in enumerate(rows):
        check(row, vectors, i)
    for name, array in load_file(tmp_path / "e.safetensors").items():
        np.testing.assert_allclose(array, vectors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "e.txt"], "must end in one of .csv, .json, .jsonl, .parquet, .safetensors"),
        (["--output", "e.parquet", "--task", "topic"], "task must name a Retrieval task, one of ['captions']"),
    ],
)
def test_what_is_wrong(folder, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = mm("embed", folder / "model", folder / "rows.csv", *arguments, ok=False)
    assert message in " ".join(said.split())
