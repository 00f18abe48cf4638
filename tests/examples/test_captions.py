"""examples/captions.py with a tiny language model: each place where pictures enter."""

import json

import datasets
import pytest
from language_models import save_language_model
from scripts import EXAMPLES, run
from tiny import make_image


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--fusion", "behind"],
        ["--fusion", "inside", "--every", 2],
        ["--fusion", "inside", "--every", 1, "--language_model", "lora"],
        ["--fusion", "prefix", "--language_model", "trained"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_captions_are_scored_with_right_no_and_shuffled_pictures(options, tmp_path):
    encoders = save_language_model(tmp_path)
    words = ["red dog", "green cat", "blue crane", "small bat", "big desk", "lovely sun"]
    rows = [{"text": words[i], "image": make_image(i)} for i in range(6)]
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    given = [x for name, path in encoders.items() for x in (f"--{name}", path)]
    more = ["--data", tmp_path / "data", "--max_steps", 4, "--batch_size", 6, "--prompt", "the", "--test_rows", 5]
    run(EXAMPLES / "captions.py", *given, *more, *options, "--learning_rate", 0.01, cwd=tmp_path)
    report = json.loads((tmp_path / "captions/results.json").read_text())
    losses = {kind: scores["loss"] for kind, scores in report["scores"].items()}
    assert list(losses) == ["right", "no", "shuffled"]
    assert len(set(losses.values())) == 3  # pictures count, and which picture it is
    assert all(set(scores) == {"loss", "bleu", "chrf"} for scores in report["scores"].values())
