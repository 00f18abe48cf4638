"""examples/custom_loop.py: its steps are exact, and it runs in one process and in two."""

import argparse
import copy
import json
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from distributed import run_in_processes
from scripts import EXAMPLES, import_script, run
from tiny import make_image
from torch.utils.data import DataLoader

from mm_transformers import MMDataCollator, MMTransformerForMultiTask, Predictor
from mm_transformers.cli.demo_model import make_processor
from mm_transformers.data.embedded import TASK_LABELS, load_demo_dataset


SCRIPT = EXAMPLES / "custom_loop.py"
custom_loop = import_script(SCRIPT)


def make_rows() -> list[dict]:
    """Rows of which some lack a label, unevenly."""
    labels = {name: [values[i % len(values)] for i in range(16)] for name, values in TASK_LABELS.items()}
    missing = {"topic": lambda i: i % 8 < 3, "intent": lambda i: i < 11, "sentiment": lambda i: False}
    return [
        {
            "text": f"the picture number {i}",
            "image": make_image(i % 5),
            **{name: None if missing[name](i) else values[i] for name, values in labels.items()},
        }
        for i in range(16)
    ]


def test_accumulated_batches_are_one_big_batch():
    rows = make_rows()
    processor = make_processor([row["text"] for row in rows])
    config = custom_loop.make_config(len(processor.tokenizer), processor.tokenizer.pad_token_id)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    config.fusion_dropout = config.classifier_dropout = 0.0
    config.freeze_batch_norm = True  # the statistics of a batch depend on its size
    torch.manual_seed(0)
    start = MMTransformerForMultiTask(config)
    trained = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        accelerator, model = Accelerator(cpu=True), copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        loader = DataLoader(rows, batch_size, collate_fn=MMDataCollator(processor, config))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        args = argparse.Namespace(steps=1, accumulation=accumulation)
        custom_loop.train(accelerator, model, loader, optimizer, schedule, args)
        trained.append(model.state_dict())
    moved = max(float((value - start.state_dict()[name]).abs().max()) for name, value in trained[0].items())
    assert moved > 1e-3
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-5)


def check_saved(folder):
    """The metrics of the script are those of the saved model, row by row."""
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = load_demo_dataset(seed=0)["test"]
    answers = Predictor.from_pretrained(folder)(rows)
    for name in TASK_LABELS:
        right = np.mean([answer[name]["label"] == row for answer, row in zip(answers, rows[name], strict=True)])
        assert metrics[f"{name}_accuracy"] == pytest.approx(right, abs=2 / len(rows))


@pytest.mark.slow
def test_one_process(tmp_path):
    said = run(SCRIPT, "--steps", 25, "--output_dir", tmp_path / "out", cwd=tmp_path).stdout
    assert "step 25: loss" in said
    assert "1 processes" in said
    check_saved(tmp_path / "out")


@pytest.mark.slow
def test_two_processes(tmp_path):
    environment = {"ACCELERATE_USE_CPU": "1", "HF_HOME": str(tmp_path / "hf_home")}
    command = [str(SCRIPT), "--steps", "6", "--accumulation", "1", "--output_dir", str(tmp_path / "out")]
    said = run_in_processes(command, environment={**os.environ, **environment}, cwd=tmp_path)
    assert "2 processes" in said
    check_saved(tmp_path / "out")


@pytest.mark.slow
def test_wrong_options_are_told(tmp_path):
    assert "must be at least 1" in run(SCRIPT, "--steps", 0, cwd=tmp_path, ok=False).stderr
