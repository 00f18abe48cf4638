"""The tables of the pages hold what their result files say, so that figures cannot drift."""

import json
from pathlib import Path

import pytest
from scripts import import_script


ROOT = Path(__file__).parents[2]
render = import_script(ROOT / "docs" / "render.py")
benchmarks = import_script(ROOT / "benchmarks" / "render.py")


@pytest.mark.parametrize("page", render.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_result_files(page):
    """If this fails, somebody changed a table by hand or took new results: `python docs/render.py` writes it again."""
    text = page.read_text()
    assert render.rendered(text) == text


@pytest.mark.parametrize("page", benchmarks.pages(), ids=lambda page: page.name)
def test_benchmarks_are_those_of_the_result_files(page):
    text = page.read_text()
    assert benchmarks.rendered(text, draws=False) == text


def test_every_result_file_is_shown_somewhere():
    shown = {name for page in render.pages() for _, name, _, _ in render.PLACE.findall(page.read_text())}
    files = {path.stem for path in render.RESULTS.glob("*.json")} & set(render.result_files())
    assert files == {render.TABLES[name][0] for name in shown}


def test_an_unknown_or_unmeasured_table_is_told(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="asks for an unknown table; known are demo, "):
        render.rendered("<!-- table: nothing -->\n<!-- end -->")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="needs results/speech.json: write it by --take speech=FILE"):
        render.rendered("<!-- table: speech -->\n<!-- end -->")


def of(*values: float) -> dict:
    return {str(seed): {"sentiment": value, "seconds": 9.0} for seed, value in enumerate(values)}


# Results as the commands write them, cut to a row or two, and a line of what is made of them.
CASES = {
    "missing_pictures": (
        {"scores": {"no dropout": {task: {"30%": [0.9, 0.8]} for task in render._TASKS},
                    "dropout 0.15": {task: {"30%": [0.5]} for task in render._TASKS}}},
        ["| 30% | 85.0 (88.8) | 85.0 (85.0) |", "| 30%, trained with modality dropout 0.15 | 50.0 | 50.0 |"],
    ),
    "emoji": (
        {"rows": {"group": 2007, "group_ambiguous": 3, "polarity": 2},
         "accuracy": {"keyword alone": {"group": [0.5, 0.6], "group_ambiguous": [0.2], "polarity": [1.0]},
                      "always the commonest class": {"group": [0.1], "group_ambiguous": [0.3], "polarity": [1.0]}}},
        ["| what the model sees | group (2,007 rows) |", "| keyword alone | **55.0** ± 7.1 | 20.0 | 100.0 |",
         "| majority class | 10.0 | **30.0** | 100.0 |"],
    ),
    "speech": (
        {"accuracy": {"always the commonest class": [{"word": 0.1, "only heard": float("nan")}],
                      "text alone": [{"word": 0.5, "only heard": float("nan")}, {"word": 0.7, "only heard": 0.25}]}},
        ["| text alone (rows with a text) | **60.0** ± 14.1 | **25.0** |\n| majority class | 10.0 | – |"],
    ),
    "task_weighting": (
        {"scores": {"famo": of(0.5, 0.6), "static": of(0.7)}},
        ["| | sentiment |\n|---|--:|\n| static | **70.0** |\n| famo | 55.0 ± 7.1 |"],
    ),
    "translation_new_keyword": (
        {"results": {"fused, no picture": {"new_keyword": [
            {"german": {"exact_match": 0.5, "bleu": 10.0, "chrf": 20.0, "contrastive": 0.25}}]}}},
        ["| what the model has | German: exact | BLEU | chrF | likelier |",
         "| the same model, no picture (one seed) | 50.0 | 10.0 | 20.0 | 25.0 |"],
    ),
    "compare_tasks": (
        {"runs": {"topic": {"0": {"topic": {"accuracy": 0.5}}, "1": {"topic": {"accuracy": 0.6}}},
                  "<jointly>": {"0": {"topic": {"accuracy": 0.75}}, "1": {"topic": {"accuracy": 0.85}}}}},
        ["| topic | 0.5500 ± 0.0707 | 0.8000 ± 0.0707 | +0.2500 ± 0.0000 | better |"],
    ),
    "export": (
        {"batches": [{"shape": "1, 16, 1", "eager_ms": 14.6, "ratios": {"ONNX": 2.734}, "difference": 6e-7}]},
        ["| rows, words, images | eager (ms) | ONNX |", "| 1, 16, 1 | 14.6 | 2.73 |", "differ by 6e-07 at most"],
    ),
    "quantization": (
        {"demo": {"int8": {"accuracy": 1.0}}, "untrained": {"int8": {"mb": 51.12, "speed": 3.5}}},
        ["| int8 | 100.0 | 51.1 | 3.50 |"],
    ),
    "feature_cache": (
        {"ratios": {"full": {"first": 1.2, "later": 1.0}, "cached": {"first": 0.36, "later": 0.05}}},
        ["| cached | 0.36 | 0.05 | **20.0** |"],
    ),
    "processes": (
        {"results": {"2": {"sentiment": 1.0, "topic": 0.5, "intent": 0.25, "rows_per_second": 140.4}}},
        ["| 2 | 100.0 | 50.0 | 25.0 | 140 |"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_a_table_is_made_of(name):
    results, expected = CASES[name]
    made = render.TABLES[name][1](json.loads(json.dumps(results)))
    for line in expected:
        assert line in made, made
