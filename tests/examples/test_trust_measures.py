"""examples/trust/measure.py on stored answers, and the names that examples import from the package."""

import ast
import importlib
import json
import sys

import pytest
import torch
from scripts import EXAMPLES, import_script

from mm_transformers import Classification, Regression


SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
TASKS = [Classification("topic", labels=["a", "b", "c"]), Regression("price")]


def stored_rows(n, seed):
    """The answers to `n` rows: whole, and without their picture or text."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(n, 3, generator=generator)
    labels = {
        "topic": torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0],
        "price": torch.randn(n, generator=generator),
    }
    labels["price"][1] = torch.nan
    found = {}
    for group, noise in (("text", 1.0), ("vision", 1.5), ("text + vision", 0.1)):
        logits = {
            "topic": scores + noise * torch.randn(n, 3, generator=generator),
            "price": labels["price"].nan_to_num() + noise * torch.randn(n, generator=generator),
        }
        vectors = {part: torch.randn(n, 6, generator=generator) for part in (*group.split(" + "), "fused")}
        found[group] = {
            "numbers": torch.arange(n),
            "natural": torch.full((n,), group == "text + vision"),
            "logits": logits,
            "labels": labels,
            "vectors": vectors,
        }
    return found


def test_the_measures_of_trust(tmp_path, monkeypatch):
    foreign = stored_rows(150, 1)
    for rows in foreign.values():
        rows["vectors"] = {name: value + 20 for name, value in rows["vectors"].items()}
    stored = {
        "tasks": [task.to_dict() for task in TASKS],
        "held_out": {"own": stored_rows(200, 0)},
        "train": stored_rows(200, 2),
        "foreign": foreign,
    }
    torch.save(stored, tmp_path / "tiny.pt")
    measure = import_script(EXAMPLES / "trust/measure.py")
    monkeypatch.setattr(measure, "FITTED_SPLITS", 1)
    given = ["measure.py", "--answers", str(tmp_path), "--output", str(tmp_path / "trust.json"), "--splits", "20"]
    monkeypatch.setattr(sys, "argv", given)
    measure.main()
    found = json.loads((tmp_path / "trust.json").read_text())["tiny"]
    for task in ("topic", "price"):
        for levels in found[task]["coverage"]["own -> own"].values():
            assert levels["0.9"]["own_coverage"] == pytest.approx(0.9, abs=0.05)
            assert levels["0.9"]["calibration_rows"] in (99, 100)
    assert found["odd rows"]["True"]["text"]["auroc"] == 1
    assert set(found["topic"]["errors"]["own"]) == {"text", "vision", "text + vision", "mixed"}


@pytest.mark.parametrize("path", SCRIPTS, ids=[str(path.relative_to(EXAMPLES)) for path in SCRIPTS])
def test_the_package_has_what_the_examples_import(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mm_transformers"):
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"line {node.lineno} imports {missing[0]}, which {node.module} does not have"
