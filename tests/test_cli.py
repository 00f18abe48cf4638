"""The command line. The demo's claims about accuracy are checked by the slow test; here it runs for a few steps."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from mm_transformers import MMTransformerForMultiTask
from mm_transformers.cli import app


COLUMNS = [
    "fused", "text only", "image only", "shuffled pictures", "majority", "best from text", "best from image",
]  # fmt: skip


def run_demo(path, *options: str) -> str:
    command = [sys.executable, "-m", "mm_transformers.cli", "demo", "--output-dir", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_trains_prints_saves_reloads_and_draws(tmp_path):
    shown = run_demo(tmp_path, "--steps", "3", "--fusion", "late", "--seed", "1")
    assert "in a fresh process, it gives the same answers" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["sentiment", "topic", "intent"]
    for row in results.values():
        assert list(row) == COLUMNS
        assert all(0 <= value <= 1 for value in row.values())
    assert Image.open(tmp_path / "demo.png").size[0] > 1000
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
    assert model.config.fusion_type == "late"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_demo_shows_what_it_claims(tmp_path, seed):
    run_demo(tmp_path, "--seed", str(seed))
    results = json.loads((tmp_path / "results.json").read_text())
    for task in ("sentiment", "topic"):
        row = results[task]
        assert row["fused"] >= 0.95
        assert row["text only"] <= row["best from text"] + 0.01
        assert row["image only"] <= row["best from image"] + 0.01
        assert row["shuffled pictures"] <= row["best from text"] + 0.05
    assert results["intent"]["fused"] >= results["intent"]["text only"] - 0.02


def test_unknown_fusion_is_one_sentence(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--fusion", "nonsense", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "Unknown fusion_type 'nonsense'; known are bottleneck" in result.output
    assert "Traceback" not in result.output


def test_help_names_the_commands():
    done = subprocess.run([sys.executable, "-m", "mm_transformers.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout
