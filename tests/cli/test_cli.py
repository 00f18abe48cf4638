"""The command line. The demo's claims about accuracy are checked by the nightly test; here it runs for a few steps."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from PIL import Image
from typer.testing import CliRunner

from mm_transformers import MMTransformerForMultiTask
from mm_transformers.cli import app


COLUMNS = [
    "fused", "text only", "image only", "shuffled pictures", "no picture", "majority", "best from text",
    "best from image",
]  # fmt: skip


def run_demo(path, *options: str) -> str:
    command = [sys.executable, "-m", "mm_transformers.cli", "demo", "--output-dir", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr  # no other progress bars than those of rich
    return done.stdout


@pytest.mark.slow
def test_demo_trains_prints_saves_reloads_and_draws(tmp_path):
    shown = run_demo(tmp_path, "--steps", "3", "--fusion", "late", "--seed", "1")
    assert "in a new process, the model gives the same answers" in shown
    assert shown.splitlines()[-1].split() == ["mm-transformers", "demo", "--ui", "--output-dir", str(tmp_path)]
    saved = json.loads((tmp_path / "results.json").read_text())
    results = saved["accuracy"]
    assert list(results) == ["sentiment", "topic", "intent", "german", "french"]
    assert list(saved["contrastive_accuracy"]["german"]) == ["fused", "shuffled pictures", "no picture"]
    for row in results.values():
        assert list(row) == COLUMNS
        assert all(0 <= value <= 1 for value in row.values())
    assert Image.open(tmp_path / "demo.png").size[0] > 1000
    for name in ("ablation.png", "explanation.png"):
        assert Image.open(tmp_path / name).size[0] > 500
    assert set(saved["ablation"]["contributions"]) == {"sentiment", "topic", "intent"}
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
    assert model.config.fusion_type == "late"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1])
def test_demo_shows_what_it_claims(tmp_path, seed):
    run_demo(tmp_path, "--seed", str(seed))
    saved = json.loads((tmp_path / "results.json").read_text())
    results, contrast = saved["accuracy"], saved["contrastive_accuracy"]
    for task, least in {"sentiment": 0.95, "topic": 0.95, "german": 0.9, "french": 0.9}.items():
        row = results[task]
        assert row["fused"] >= least
        assert row["text only"] <= row["best from text"] + 0.01
        assert row["image only"] <= row["best from image"] + 0.01
        for view in ("shuffled pictures", "no picture"):
            assert row[view] <= row["best from text"] + 0.05
    assert results["intent"]["fused"] >= results["intent"]["text only"] - 0.02
    assert contrast["german"]["fused"] >= 0.95
    # Every message is there once with a picture of each place.
    assert contrast["german"]["no picture"] == pytest.approx(0.5, abs=0.02)
    assert contrast["german"]["shuffled pictures"] <= 0.55
    # On a whole pass of minimal pairs, no answer from one part alone can beat its limit, not even by chance.
    ablation = saved["ablation"]
    for task in ("sentiment", "topic"):
        scores = {name: metrics[f"{task}_accuracy"] for name, metrics in ablation["variants"].items()}
        assert scores["all"] >= 0.95
        assert scores["text only"] <= results[task]["best from text"] + 1e-9
        assert scores["image only"] <= results[task]["best from image"] + 1e-9
        assert scores["nothing"] <= ablation["majority_class_accuracy"][task] + 1e-9
        found = ablation["contributions"][task]
        assert sum(found["shapley"].values()) == pytest.approx(scores["all"] - scores["nothing"])
        # Each part rules out half of the labels, so that their votes may be summed.
        assert found["additive"] >= 0.95


@pytest.mark.slow
def test_unknown_fusion_is_one_sentence(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--fusion", "nonsense", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "Unknown fusion_type 'nonsense'; known are bottleneck" in result.output
    assert "Traceback" not in result.output


def test_version_is_that_of_the_package():
    done = subprocess.run([sys.executable, "-m", "mm_transformers.cli", "--version"], capture_output=True, text=True)
    assert done.stdout == f"mm-transformers {metadata.version('mm-transformers')}\n"


def test_help_names_the_commands():
    done = subprocess.run([sys.executable, "-m", "mm_transformers.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout
