"""The example for Ray Data answers as `mm-transformers predict`, with two workers, in the order of the rows."""

import re

import pandas as pd
import pyarrow.parquet as pq
import pytest
from command_line import mm
from recipes import make_rows
from scripts import EXAMPLES, run
from tiny import make_model, make_processor

from mm_transformers import Classification, Regression


pytest.importorskip("ray.data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    tasks = [Classification("topic", labels=["animals", "food"]), Regression("stars")]
    make_model(tasks=tasks).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    rows = [row for i in range(4) for row in make_rows(folder)]
    table = pd.DataFrame([{"id": i, **{n: row[n] for n in ("text", "image", "topic")}} for i, row in enumerate(rows)])
    table.to_parquet(folder / "rows.parquet")
    return folder


@pytest.mark.slow
def test_two_workers_answer_as_predict(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    (tmp_path / "elsewhere").mkdir()
    rows = folder / "rows.parquet"
    options = [folder / "model", rows, tmp_path / "answers", "--workers", 2, "--batch_size", 3]
    done = run(EXAMPLES / "ray_predict.py", *options, cwd=tmp_path / "elsewhere")
    assert "Wrote the answers to 52 rows" in done.stdout
    assert len(set(re.findall(r"Worker (\d+) has loaded the model\.", done.stdout + done.stderr))) == 2
    mm("predict", folder / "model", rows, "--output", tmp_path / "expected.parquet")
    found, expected = pq.read_table(tmp_path / "answers").to_pandas(), pd.read_parquet(tmp_path / "expected.parquet")
    assert found["id"].tolist() == list(range(52))
    assert list(found.columns) == list(expected.columns)
    for name in ("id", "text", "topic_input", "topic"):
        assert found[name].fillna("").tolist() == expected[name].fillna("").tolist()
    for name in ("topic_score", "stars"):
        assert found[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=1e-5)
