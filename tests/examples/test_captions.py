"""examples/captions.py with a tiny language model: each place where pictures enter."""

import json

import datasets
import numpy as np
import pytest
from language_models import save_language_model
from scripts import EXAMPLES, import_script, run
from tiny import make_image


@pytest.mark.slow
@pytest.mark.parametrize(
    ("captions", "options"),
    [
        (["text", "german"], ["--fusion", "behind"]),
        (["text"], ["--fusion", "inside", "--every", 2]),
        (["text"], ["--fusion", "inside", "--every", 1, "--language_model", "lora"]),
        (["german"], ["--fusion", "prefix", "--language_model", "trained"]),
    ],
    ids=str,
)
def test_captions_are_scored_with_right_no_and_shuffled_pictures(captions, options, tmp_path):
    encoders = save_language_model(tmp_path)
    words = ["red dog", "green cat", "blue crane", "small bat", "big desk", "lovely sun"]
    text = datasets.Value("string")
    rows = [
        {"text": words[i], "german": words[-i], "image": make_image(i), "topic": "ab"[i % 2]} for i in range(6)
    ]  # fmt: skip
    features = datasets.Features({"text": text, "german": text, "image": datasets.Image(), "topic": text})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    given = [x for name, path in encoders.items() for x in (f"--{name}", path)]
    given += ["--data", tmp_path / "data", "--max_steps", 4, "--batch_size", 6, "--prompt", "the", "--test_rows", 5]
    given += ["--learning_rate", 0.01]
    more = ["--captions", *captions, "--labels", "topic"]
    for seed in (0, 1):
        shown = run(EXAMPLES / "captions.py", *given, *more, *options, "--seed", seed, cwd=tmp_path)
    assert "(2 seeds)" in shown.stdout
    results = [json.loads(line) for line in (tmp_path / "captions/results.jsonl").read_text().splitlines()]
    for result in results:
        scores = result["scores"]
        for column in captions:
            losses = {scores[f"{column} loss, {kind} picture"] for kind in ("right", "no", "shuffled")}
            assert len(losses) == 3  # pictures count, and which picture it is
            # Without a picture, one caption of a pair is preferred for both of its rows.
            assert scores[f"{column} contrastive accuracy, no picture"] == 0.5
            assert 0 <= scores[f"{column} accuracy, own picture or another"] <= 1
        assert 0 <= scores["topic accuracy, linear model"] <= 1
        assert result["steps"] == 4
        assert min(result["costs"].values()) > 0


def test_only_results_with_the_same_settings_are_averaged():
    captions = import_script(EXAMPLES / "captions.py")

    def result(fusion, seed, rate, score):
        return {"settings": {"fusion": fusion, "seed": seed, "learning_rate": rate}, "score": score}

    other_rate, first, again = result("behind", 0, 0.1, 1), result("behind", 0, 0.2, 2), result("behind", 0, 0.2, 3)
    last = [result("inside", 0, 0.2, 4), result("behind", 1, 0.2, 5)]
    assert captions.alike([other_rate, first, again, *last]) == [again, *last]


def test_each_caption_is_compared_with_itself(monkeypatch):
    """A likely caption has no advantage: only the picture beside it counts."""
    captions = import_script(EXAMPLES / "captions.py")
    pairs = datasets.Dataset.from_list([{"image": i, "text": i} for i in range(6)])
    fitting = {(0, 0), (1, 1), (2, 3), (3, 2)}  # the first two fit their own picture, the next two that of the other

    def losses(trainer, rows, column):
        return np.array([row["text"] - 0.5 * ((row["text"], row["image"]) in fitting) for row in rows])

    monkeypatch.setattr(captions, "caption_losses", losses)
    assert captions.own_picture_preferred(None, pairs, "text") == (2 + 0 + 0.5 * 2) / 6
