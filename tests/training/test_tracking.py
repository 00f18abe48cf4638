"""What arrives in Trackio, which runs without a network."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import yaml
from recipes import make_rows, recipe_values, save_encoders, write_csv


READ = """
import json, trackio
runs = trackio.SQLiteStorage.get_runs("prices")
print(json.dumps({run: trackio.SQLiteStorage.get_logs("prices", run) for run in runs}))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_losses_and_metrics_of_each_task_are_in_trackio(tmp_path):
    save_encoders(tmp_path / "encoders")
    write_csv(tmp_path / "train.csv", make_rows(tmp_path))
    values = recipe_values(tmp_path / "encoders", logging_steps=1, project="prices")
    values["data"]["test"] = "train.csv"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    def run(*command):
        environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "mm_transformers.cli", "train", "recipe.yaml", "training.report_to=trackio")
    runs = json.loads(run("-c", READ).splitlines()[-1])
    [(name, logs)] = runs.items()  # the test scores have no run of their own
    assert name.startswith("out 20")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    for key in ("topic_loss", "stars_loss", "tags_loss", "loss"):
        expected = [entry[key] for entry in state["log_history"] if key in entry]
        assert len(expected) == 2
        assert [log[f"train/{key}"] for log in logs if f"train/{key}" in log] == pytest.approx(expected)
    results = json.loads((tmp_path / "out" / "test_results.json").read_text())
    [tested] = [log for log in logs if "test/topic_accuracy" in log]
    for key in ("topic_accuracy", "stars_mae", "loss"):
        assert tested[f"test/{key}"] == pytest.approx(results[f"test_{key}"])
