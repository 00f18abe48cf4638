"""Every code block of the documentation runs, and every command in it exists."""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from command_line import mm
from documents import PAGES, ROOT, RUN_ELSEWHERE, blocks_of, name_of, save_reader_folder, shell_lines
from hub_server import Hub
from listeners import running
from served import events_of

from mm_transformers import MMTransformerConfig
from mm_transformers.cli import app
from mm_transformers.model import modalities
from mm_transformers.model.fusion import FUSION_KINDS
from mm_transformers.model.limits import limits
from mm_transformers.model.table_kinds import COLUMNS
from mm_transformers.model.task_base import TASK_KINDS
from mm_transformers.sharing.serving.app import create_app
from mm_transformers.training.metrics import base
from mm_transformers.training.weighting.base import WEIGHTINGS


PYTHON_PAGES = [page for page in PAGES if blocks_of(page, "python") and page.stem not in RUN_ELSEWHERE]
COMMANDS = typer.main.get_command(app).commands
SHELL_LINES = sorted({line for page in PAGES for line in shell_lines(page)})
# Pages that push to the Hub: they run in a process of their own, with a Hub of their own.
PUSHING = {"docs/how-to/share.md"}
# What a block cannot have here: an encoder that `fit` takes from the Hub if none is named, and the table of the reader.
TEXT = 'text="distilbert/distilbert-base-uncased"'
REPLACED = {
    "docs/fit.md": {
        '["category", "price"], "my-model")': f'["category", "price"], "fitted", {TEXT})',
        "MMClassifier(), X, y, cv=5": f'MMClassifier(preset="fast", {TEXT}), X, y, cv=2',
        'preset="balanced", output_dir="my-model"': f'preset="fast", output_dir="classifier", {TEXT}',
        'pipeline("multimodal", model="my-model")': 'pipeline("multimodal", model="fitted")',
    }
}
# Libraries that no extra of the tests brings in; tests/examples/test_ray.py runs the first.
NEEDED = {
    "docs/how-to/language-model-8-bits.md": "torchao",
    "docs/how-to/predict-with-ray.md": "ray",
    "docs/how-to/track-a-run.md": "trackio",
}
# Exporting takes minutes.
NIGHTLY = {"docs/how-to/export.md"}
REGISTRIES = [
    TASK_KINDS, FUSION_KINDS, COLUMNS, WEIGHTINGS, base._METRICS, MMTransformerConfig.sub_configs,
    modalities.ENCODERS, modalities.OTHER_ENCODERS, modalities.MODALITIES, modalities.PARTS, modalities.ARGUMENTS,
    modalities.NOUNS,
]  # fmt: skip


def code_of(page: Path) -> list[str]:
    blocks = blocks_of(page, "python")
    for old, new in REPLACED.get(name_of(page), {}).items():
        assert any(old in block for block in blocks)
        blocks = [block.replace(old, new) for block in blocks]
    return blocks


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return save_reader_folder(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def folder(template, tmp_path, monkeypatch):
    """A folder as a reader has it, and the registries as they were before."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())
    before = [dict(registry) for registry in REGISTRIES]
    yield tmp_path
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)


def test_every_block_has_a_language_that_is_checked():
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, name_of(page)
        assert set(fences[::2]) <= {"python", "bash", "text", "yaml"}, name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_code_hides_in_blocks_of_text(page):
    """Python that is not run has another language than Python; there should be none."""
    for text in blocks_of(page, "text"):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)]
        assert not calls, f"{name_of(page)}: mark this block as Python, so that it is run:\n{text}"


@pytest.mark.parametrize("page", [
    pytest.param(page, id=name_of(page), marks=pytest.mark.nightly if name_of(page) in NIGHTLY else pytest.mark.slow)
    for page in PYTHON_PAGES if name_of(page) not in PUSHING
])  # fmt: skip
def test_python_blocks_run_one_after_the_other(page, folder, monkeypatch):
    if name_of(page) in NEEDED:
        pytest.importorskip(NEEDED[name_of(page)])
        monkeypatch.syspath_prepend(str(folder))  # a file that the reader has copied beside the program
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for code in code_of(page):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUSHING))
def test_blocks_that_push_run_with_a_hub(name, folder, tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"), {"token": "me"}).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "token",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / "hf_home"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    try:
        command = [sys.executable, "-c", "\n".join(code_of(ROOT / name))]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    finally:
        hub.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    assert not hub.unknown


@pytest.mark.slow
def test_the_script_does_what_its_line_says(folder):
    """With the options of the page, and as few steps as possible."""
    [line] = [line for line in SHELL_LINES if line.startswith("python examples/finetune.py")]
    command = [sys.executable, str(ROOT / "examples/finetune.py"), *line.split()[2:]]
    few = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "4"]
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, *few], cwd=folder, env=environment, check=True, capture_output=True)
    assert (folder / "out/eval_results.json").exists()
    assert (folder / "out/model.safetensors").exists()


@pytest.mark.slow
def test_requests_of_pages_are_answered(folder):
    """The lines of `curl`, sent to the server of `my-model`; their files are those of the reader."""
    lines = [line for line in SHELL_LINES if line.startswith("curl ") and "http://127.0.0.1:8000" in line]
    assert len(lines) == 4
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with running(create_app("my-model")) as address:
        for line in lines:
            command = shlex.split(line.replace("http://127.0.0.1:8000", address))
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
            if "/predict" in line:
                assert len(json.loads(told)["answers"]) == 1
            else:
                *pieces, whole = events_of(told)
                assert "".join(event["piece"] for event in pieces).strip() == whole["text"]


@functools.cache
def help_of_script(script: str) -> str:
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def help_of_command(*words: str) -> str:
    return mm(*words, "--help")


@pytest.mark.slow
@pytest.mark.parametrize("line", SHELL_LINES)
def test_shell_lines_can_be_run(line, monkeypatch):
    """What they call exists: targets of make, extras of the package, commands, scripts and their options."""
    monkeypatch.setenv("COLUMNS", "200")  # so that no option is cut
    words = line.split("#")[0].split()
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "make":
        assert shutil.which("make")
        subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        assert set(re.findall(r"\[(\w+)\]", line)) <= known
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).exists()
    elif words[0] == "mm-transformers":
        places = [i for i, word in enumerate(words) if word in COMMANDS]
        assert places, f"{line!r} calls no command"
        place = places[0]
        for shown, given in ((help_of_command(), words[1:place]), (help_of_command(words[place]), words[place:])):
            for option in (word for word in given if word.startswith("--")):
                assert option in shown
    elif words[0] in ("accelerate", "torchrun") and "-m" in words:
        module, command = words[words.index("-m") + 1 :][:2]
        assert module == "mm_transformers.cli"
        assert command in COMMANDS
    elif words[0] in ("python", "accelerate", "torchrun"):
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            assert words[:3] == ["python", "-m", "build"], line
        else:
            if script == "examples/ray_predict.py":
                pytest.importorskip("ray")
            for option in words[words.index(script) + 1 :]:
                assert not option.startswith("--") or option in help_of_script(script)
    elif words[0].startswith((".venv/", ".ci/")):
        pass  # of this repository, in a shell of a contributor
    elif words[0] == "curl":
        pass  # test_requests_of_pages_are_answered sends it
    elif words[0] in ("apt", "npm", "git", "cd", "sudo", "tar"):
        pass  # not ours
    else:
        raise AssertionError(f"nobody checks {line!r}")
