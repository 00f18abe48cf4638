"""Every code block of the README runs, in order, in a folder with data and tiny encoders under the names it uses."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_image, make_image_processor, make_tokenizer
from transformers import AutoModel, AutoModelForSeq2SeqLM


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python"]
SHELL_LINES = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]


def test_every_block_has_a_language_that_is_run():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "text"}
    assert len(PYTHON_BLOCKS) >= 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data and encoders as a reader of the README would have them; the encoders are tiny, nothing is fetched."""
    torch.manual_seed(0)
    text = tmp_path / "distilbert" / "distilbert-base-uncased"
    AutoModel.from_config(TEXT_ENCODERS["distilbert"]()).save_pretrained(text)
    make_tokenizer().save_pretrained(text)
    marian = tmp_path / "Helsinki-NLP" / "opus-mt-en-de"
    AutoModelForSeq2SeqLM.from_config(SEQ2SEQ["marian"]()).save_pretrained(marian)
    make_tokenizer().save_pretrained(marian)
    vision = tmp_path / "google" / "vit-base-patch16-224-in21k"
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(vision)
    make_image_processor().save_pretrained(vision)
    rows = []
    for i in range(12):
        make_image(i).save(tmp_path / f"{i}.png")
        rows.append({
            "text": ["a lovely picnic", "a ruined desk", "a red crane in the rain"][i % 3],
            "image": None if i % 4 == 0 else f"{i}.png",
            "topic": ["animals", "food", "travel"][i % 3],
            "sentiment": None if i % 2 else ["negative", "neutral", "positive"][i % 3],
            "german": None if i == 2 else ["a picnic", "a desk", "a crane"][i % 3],
            "stars": None if i % 3 else 1.0 + i % 5,
        })  # fmt: skip
    make_image(3).save(tmp_path / "rain.jpg")
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(rows).to_csv(tmp_path / "test.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python_blocks_run_one_after_the_other(folder, capsys):
    names: dict = {"__name__": "readme"}
    for code in PYTHON_BLOCKS:
        exec(compile(code, "README.md", "exec"), names)
    assert (folder / "my-model" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_script_does_what_its_line_says(folder):
    """With the options of the README, and as few steps as possible."""
    [line] = [line for line in SHELL_LINES if line.startswith("python examples/finetune.py")]
    command = [sys.executable, str(ROOT / "examples/finetune.py"), *line.split()[2:]]
    few = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "4"]
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, *few], cwd=folder, env=environment, check=True, capture_output=True)
    assert (folder / "out/eval_results.json").exists()
    assert (folder / "out/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", SHELL_LINES)
def test_shell_lines_can_be_run(line):
    """What they call exists: targets of make, extras of the package, commands, scripts and their options."""
    words = line.split("#")[0].split()
    if words[0] == "make":
        subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        assert words[2:] in (["mm-transformers"], ["-e", "."], ["-c", "constraints.txt", "-e", "."])
        assert (ROOT / "constraints.txt").exists()
    elif words[0] == "mm-transformers":
        command = [sys.executable, "-m", "mm_transformers.cli", words[1], "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in shown
    elif words[0] in ("python", "accelerate"):
        script = next(word for word in words if word.endswith(".py"))
        shown = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in words[words.index(script) + 1 :]:
            assert not option.startswith("--") or option in shown
    elif words[0] in ("apt", "npm", "git", "cd", "sudo"):
        pass  # not ours
    else:
        raise AssertionError(f"nobody checks {line!r}")


def test_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path.split("#")[0]).exists(), path


def test_make_is_there_to_check_targets():
    assert shutil.which("make")
