"""`mm-transformers calibrate`, and `predict --coverage` after it."""

import json

import pandas as pd
import pytest
from command_line import mm
from tiny import make_image, make_model, make_processor

from mm_transformers import Classification, MMTransformerConfig, Regression


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    tasks = [Classification("topic", labels=["animals", "food"]), Regression("score")]
    make_model(tasks=tasks).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    rows = []
    for i in range(60):
        make_image(i).save(folder / f"{i}.png")
        image = None if i % 3 == 0 else f"{i}.png"
        text = ["red cat", "the river"][i % 2]
        rows.append({"text": text, "image": image, "topic": ["animals", "food"][i % 2], "score": i % 5})
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    return folder


def test_the_folder_holds_the_calibration(folder, monkeypatch):
    monkeypatch.chdir(folder)
    mm("calibrate", "model", "rows.csv", "--output", "measures.json", "--min-rows", "15")
    cells = MMTransformerConfig.from_pretrained("model").calibration["tasks"]["topic"]["cells"]
    assert {group: cell["rows"] for group, cell in cells.items()} == {
        "text": 20, "vision": 40, "text + vision": 40, "other": 0,
    }  # fmt: skip
    measures = json.loads((folder / "measures.json").read_text())["groups"]
    assert set(measures) == {"topic", "score"}
    assert (folder / "measures.png").stat().st_size > 1000
    mm("predict", "model", "rows.csv", "--output", "answers.csv", "--coverage", "0.9")
    answers = pd.read_csv("answers.csv")
    assert {"topic_set", "topic_abstain", "score_interval", "score_abstain"} <= set(answers.columns)
    covered = [truth in found for truth, found in zip(answers["topic_input"], answers["topic_set"], strict=True)]
    assert sum(covered) >= 54  # on the rows that chose the thresholds at least the promised share
