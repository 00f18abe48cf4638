"""`explain`, `evaluate --ablate`, `space` and `demo --ui`, as a person calls them."""

import json
import re

import pytest
from pages import Page
from rows import make_rows
from tiny import make_image, make_model, make_processor
from typer.testing import CliRunner

from mm_transformers import Matching
from mm_transformers.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    make_model(seed=2).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    with open(folder / "rows.jsonl", "w") as file:
        for i, row in enumerate(make_rows(12)):
            if row["image"] is not None:
                row["image"].save(folder / f"{i}.png")
            file.write(json.dumps({**row, "image": row["image"] and f"{i}.png"}) + "\n")
    make_image(1).save(folder / "rain.png")
    return folder


def run(*words, fails: bool = False) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert (result.exit_code != 0) == fails, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.slow
def test_a_report_on_rows(folder, tmp_path):
    output = tmp_path / "report.html"
    shown = run("explain", folder / "model", folder / "rows.jsonl", "--output", output, "--task", "topic", "--ablate")
    assert "Wrote" in shown
    page = Page(output.read_text())
    assert "task-topic" in page.ids
    assert "task-sentiment" not in page.ids
    assert "modalities" in page.ids
    assert any("relevan" in text or "depends on" in text for text in page.texts)


def test_one_row(folder, tmp_path):
    row = ["--text", "a cat", "--image", folder / "rain.png", "--task", "topic"]
    shown = run("explain", folder / "model", *row, "--output", tmp_path / "why.png", "--answer", "food")
    assert re.search(r"topic: food\. It depends on: text \d+%, image \d+%\. Wrote", shown)
    assert (tmp_path / "why.png").stat().st_size > 5000
    run("explain", folder / "model", *row, "--output", tmp_path / "why.json", "--method", "rollout")
    found = json.loads((tmp_path / "why.json").read_text())
    assert found["method"] == "rollout"
    assert sum(found["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give either a file of rows or one row"),
        (["rows.jsonl", "--text", "a"], "Give either a file of rows or one row"),
        (["rows.jsonl", "--output", "report.pdf"], "must end in .html"),
        (["--text", "a", "--output", "report.html"], "must end in .png, .svg, .pdf or .json"),
        (["--text", "a", "--output", "why.png"], "Choose the task to explain"),
        (["--text", "a", "--task", "topik", "--output", "why.png"], "did you mean 'topic'"),
        (["rows.jsonl", "--method", "shap"], "method must be one of"),
        (["--image", "no.png", "--task", "topic", "--output", "why.png"], "does not exist"),
    ],
)
def test_what_is_wrong_is_told(folder, words, said, monkeypatch):
    monkeypatch.chdir(folder)
    assert said in run("explain", "model", *words, fails=True)
    assert not (folder / "why.png").exists()


def test_whether_a_pair_matches_is_asked_in_words(tmp_path):
    make_model(tasks=[Matching("fits")]).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    make_image(1).save(tmp_path / "rain.png")
    row = ("--text", "a cat", "--image", tmp_path / "rain.png", "--output", tmp_path / "why.json")
    for told, answer in (("yes", True), ("False", False)):
        run("explain", tmp_path / "model", *row, "--answer", told)
        assert json.loads((tmp_path / "why.json").read_text())["answer"] is answer
    assert "must be True or False" in run("explain", tmp_path / "model", *row, "--answer", "maybe", fails=True)


@pytest.mark.slow
def test_tables_are_whole_on_a_terminal_and_in_a_file(folder, monkeypatch, capsys):
    """Printed to few columns, and to something that is no terminal: each cell is there, and no line is cut."""
    from mm_transformers.analysis import ablate
    from mm_transformers.cli.metrics_table import print_ablation

    found = ablate(make_model(seed=2), make_processor(), make_rows(12), num_permutations=2, num_additive_rows=5)
    for columns in ("80", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        print_ablation(found)
        shown = capsys.readouterr().out
        assert "…" not in shown
        cells = [cell.strip() for line in shown.splitlines() for cell in line.strip("|").split("|")]
        for table in found.tables():
            assert {cell for row in (table.header, *table.rows) for cell in row if cell} <= set(cells)
        assert max(map(len, shown.splitlines())) <= 80
        assert "measured on 5 of 12 rows" in shown


@pytest.mark.slow
def test_evaluation_with_ablation(folder, tmp_path):
    shown = run("evaluate", folder / "model", folder / "rows.jsonl", "--ablate", "--output", tmp_path / "metrics.json")
    assert "Shapley" in shown
    found = json.loads((tmp_path / "metrics.json").read_text())
    all_inputs = found["ablation"]["variants"]["all"]
    assert all_inputs["topic_accuracy"] == pytest.approx(found["eval_topic_accuracy"])
    assert (tmp_path / "metrics.png").exists()
    by_topic = ("--ablate", "--slice", "sentiment", "--output", tmp_path / "sliced.json")
    assert "positive" in run("evaluate", folder / "model", folder / "rows.jsonl", *by_topic)
    sliced = json.loads((tmp_path / "sliced.json").read_text())["ablation"]["slices"]["sentiment"]
    assert set(sliced) >= {"negative", "positive"}
    said = run("evaluate", folder / "model", folder / "rows.jsonl", "--slice", "sentiment", fails=True)
    assert "give both" in said
    said = run("evaluate", folder / "model", folder / "rows.jsonl", "--ablate", "--slice", "origin", fails=True)
    assert "slices names the column 'origin'" in said


def test_a_space_and_a_page_without_a_model(tmp_path, monkeypatch):
    assert "app.py" in run("space", "me/my-model", "--output", tmp_path / "space")
    assert "Nothing to write" in run("space", "me/my-model", "--output", tmp_path / "space")
    monkeypatch.chdir(tmp_path)
    assert "There is no model in demo-output/model yet" in run("demo", "--ui", fails=True)
