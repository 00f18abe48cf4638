"""Each task alone and all jointly."""

import json
import math

import numpy as np
import pytest
import yaml
from recipes import make_rows, recipe_values, save_encoders, write_csv
from typer.testing import CliRunner

from mm_transformers.analysis.task_comparison import JOINTLY, Comparison, as_cells, compare, run_comparison, to_markdown
from mm_transformers.cli.app import app


RUNS = {
    "a": {"0": {"a": {"accuracy": 0.5, "loss": 1.0}}, "1": {"a": {"accuracy": 0.6, "loss": 0.9}}},
    "b": {"0": {"b": {"mae": 2.0}}, "1": {"b": {"mae": 1.0}}},
    JOINTLY: {
        "0": {"a": {"accuracy": 0.7, "loss": 0.8}, "b": {"mae": 2.5}},
        "1": {"a": {"accuracy": 0.81, "loss": 0.8}, "b": {"mae": 1.1}},
    },
}


def test_gains_and_their_errors():
    """Paired; of what is better the smaller it is, less is a gain. 12.706 is the 97.5% quantile of t with 1 degree."""
    accuracy, loss, mae = compare(RUNS, [0, 1])
    assert (accuracy.task, accuracy.metric) == ("a", "accuracy")
    assert (accuracy.alone, accuracy.jointly) == ([0.5, 0.6], [0.7, 0.81])
    assert accuracy.gain == pytest.approx(0.205)  # 0.2 and 0.21
    assert accuracy.standard_error == pytest.approx(0.005)
    assert accuracy.verdict == "better"  # 0.205 > 12.706 * 0.005
    assert loss.gain == pytest.approx(0.15)  # 0.2 and 0.1
    assert loss.verdict == "no clear difference"  # 0.15 < 12.706 * 0.05
    assert mae.gain == pytest.approx(-0.3)  # 0.5 and 0.1 worse
    assert mae.verdict == "no clear difference"
    assert compare(RUNS, [0])[0].verdict == "no clear difference"  # of one seed nobody knows
    assert as_cells(accuracy)[4] == "+0.2050 ± 0.0050"
    assert to_markdown([accuracy]).splitlines()[2] == (
        "| a | accuracy | 0.5500 ± 0.0707 | 0.7550 ± 0.0778 | +0.2050 ± 0.0050 | better |"
    )


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_chance_is_seldom_called_a_gain(num_seeds):
    """Differences of no tasks at all: one in twenty is called clear."""
    random = np.random.default_rng(0)
    clear = 0
    for _ in range(1000):
        differences = random.normal(size=num_seeds)
        error = differences.std(ddof=1) / math.sqrt(num_seeds)
        comparison = Comparison("a", "f1", [0.0] * num_seeds, list(differences), differences.mean(), error)
        clear += comparison.verdict != "no clear difference"
    assert 30 < clear < 70


def test_a_stopped_comparison_goes_on(tmp_path):
    done = []

    def train(tasks, seed):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((tuple(tasks), seed))
        return {task: {"accuracy": 0.1 * len(done)} for task in tasks}

    path = tmp_path / "comparison.json"
    with pytest.raises(KeyboardInterrupt):
        run_comparison(train, ["a", "b"], [0, 1], path, {"steps": 3})
    assert done == [(("a",), 0), (("b",), 0), (("a", "b"), 0), (("a",), 1)]
    first, done[:] = list(done), []
    runs = run_comparison(train, ["a", "b"], [0, 1], path, {"steps": 3})
    assert done == [(("b",), 1), (("a", "b"), 1)]
    assert runs == json.loads(path.read_text())["runs"]
    assert runs["a"]["1"]["a"]["accuracy"] == pytest.approx(0.1 * len(first))
    with pytest.raises(ValueError, match="is the result of another comparison. Choose another output folder"):
        run_comparison(train, ["a", "b"], [0, 1], path, {"steps": 4})
    with pytest.raises(ValueError, match="There is only one task, a, so there is nothing to train jointly"):
        run_comparison(train, ["a"], [0], tmp_path / "other.json", {})


@pytest.mark.slow
def test_from_a_recipe(tmp_path, monkeypatch):
    """The tasks of a recipe, with a weighting and a regulariser that name tasks; table, plot and report are there."""
    monkeypatch.chdir(tmp_path)
    save_encoders(tmp_path)
    write_csv(tmp_path / "train.csv", make_rows(tmp_path))
    values = recipe_values(tmp_path)
    values["model"]["task_weighting"] = "famo"
    values["model"]["regularization"] = {"kind": "l2", "weight": 1e-4, "tasks": {"stars": {"weight": 1e-3}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["compare-tasks", "recipe.yaml", "--seeds", "2", "--output_dir", "out"])
    assert done.exit_code == 0, done.output
    runs = json.loads((tmp_path / "out/comparison.json").read_text())["runs"]
    assert list(runs) == ["topic", "stars", "tags", JOINTLY]
    assert all(sorted(seeds) == ["42", "43"] for seeds in runs.values())
    assert set(runs[JOINTLY]["42"]) == {"topic", "stars", "tags"}
    assert runs["topic"]["42"]["topic"]["accuracy"] <= 1
    assert set(runs["topic"]["42"]) == {"topic"}
    assert "| stars | mae |" in (tmp_path / "out/comparison.md").read_text()
    assert (tmp_path / "out/comparison.png").stat().st_size > 10_000
    write_csv(tmp_path / "test.csv", [{**row, "stars": None} for row in make_rows(tmp_path)])
    done = CliRunner().invoke(app, ["compare-tasks", "recipe.yaml", "data.test=test.csv", "--output_dir", "none"])
    assert done.exit_code == 2
    assert "The test rows have no label of task 'stars'" in done.output
    values["tasks"] = values["tasks"][:1]
    values["model"].pop("regularization")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["compare-tasks", "recipe.yaml", "--output_dir", "one"])
    assert done.exit_code == 2
    assert "There is only one task, topic" in done.output
