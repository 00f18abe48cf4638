"""`mm-transformers calibrate`, and `predict --coverage` after it."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
import yaml
from command_line import mm
from tiny import make_image, make_model, make_processor
from typer.testing import CliRunner

from mm_transformers import Classification, MMTransformerConfig, MultiLabel, Regression
from mm_transformers.analysis import calibrate
from mm_transformers.cli import app
from mm_transformers.cli.predict import Reading, run_prediction
from mm_transformers.data import tables
from mm_transformers.training.recipe import Recipe, read_recipe
from mm_transformers.training.recipe.builders import load_data, training_arguments
from mm_transformers.training.recipe.table_hashes import has_new_test_rows, hashes_of_tables, save_hashes


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
    card = (folder / "model/README.md").read_text()
    assert "## How far to trust an answer\n\nCalibrated on 60 rows" in card
    errors = {group: found["before"][0] for group, found in measures["topic"].items()}
    for group in ("text", "vision", "text + vision"):
        cells = next(
            [cell.strip() for cell in line.split("|")]
            for line in card.splitlines()
            if line.startswith("| topic ") and f"| {group} " in line
        )
        assert cells[3:5] == [str(measures["topic"][group]["rows"]), f"{100 * errors[group]:.1f}"]
    mm("predict", "model", "rows.csv", "--output", "answers.csv", "--coverage", "0.9")
    answers = pd.read_csv("answers.csv")
    assert {"topic_set", "topic_abstain", "score_interval", "score_abstain"} <= set(answers.columns)
    covered = [truth in found for truth, found in zip(answers["topic_input"], answers["topic_set"], strict=True)]
    assert sum(covered) >= 54  # on the rows that chose the thresholds at least the promised share


def test_without_a_file_the_test_rows_of_the_recipe_are_used(folder, tmp_path, monkeypatch):
    """As after `fit`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", "model")
    failed = CliRunner().invoke(app, ["calibrate", "model"])
    assert failed.exit_code == 2
    assert "model has no recipe.yaml: name a FILE of labelled rows." in " ".join(failed.output.split())
    tasks = [{"name": "topic", "kind": "classification"}, {"name": "score", "kind": "regression"}]
    recipe = {
        "data": {"train": str(folder / "rows.csv"), "image_root": str(folder)},
        "columns": {"text": "text", "image": "image"},
        "model": {"text": "text-encoder", "vision": "vision-encoder"},
        "tasks": tasks,
        "training": {"output_dir": "model"},
    }
    path = Path("model/recipe.yaml")
    path.write_text(yaml.safe_dump(recipe))
    failed = CliRunner().invoke(app, ["calibrate", "model"])
    assert "recipe.yaml holds out no test rows: name a FILE of labelled rows." in " ".join(failed.output.split())
    recipe["data"]["test_fraction"] = 0.4
    path.write_text(yaml.safe_dump(recipe))
    shown = mm("calibrate", "model", "--min-rows", "5")
    count = int(re.search(r"The (\d+) test rows of recipe\.yaml are used", shown)[1])
    assert 18 <= count <= 30
    cells = MMTransformerConfig.from_pretrained("model").calibration["tasks"]["topic"]["cells"]
    held_out = load_data(read_recipe(path), training_arguments(read_recipe(path))).splits["test"]
    with_both = sum(image is not None for image in held_out["image"])
    assert len(held_out) == count
    assert cells["text + vision"]["rows"] == with_both


def test_a_table_that_has_changed_since_the_training_is_refused(folder, tmp_path, monkeypatch):
    """Its rows are split anew, so that rows of the training may be test rows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", "model")
    shutil.copy(folder / "rows.csv", "rows.csv")
    recipe = Recipe.from_dict({
        "data": {"train": str(tmp_path / "rows.csv"), "image_root": str(folder), "test_fraction": 0.4},
        "model": {"text": "text-encoder", "vision": "vision-encoder"},
        "tasks": [{"name": "topic", "kind": "classification"}, {"name": "score", "kind": "regression"}],
        "training": {"output_dir": "model"},
    })  # fmt: skip
    recipe.save(Path("model"))
    unknown = "model has no tables.json, so it is not known whether the table is that of the training."
    assert unknown in mm("calibrate", "model", "--min-rows", "5")
    save_hashes(Path("model"), hashes_of_tables(recipe))
    assert unknown not in mm("calibrate", "model", "--min-rows", "5")
    lines = Path("rows.csv").read_text().splitlines()
    Path("rows.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    failed = CliRunner().invoke(app, ["calibrate", "model", "--min-rows", "5"])
    assert failed.exit_code == 2
    assert "rows.csv has changed since the training, so the model may have been trained on its present test rows" in (
        " ".join(failed.output.split())
    )


def test_only_the_table_from_which_test_rows_are_held_out_must_be_that_of_the_training(folder, tmp_path, monkeypatch):
    """Test rows in a file of their own were never trained on; validation rows have no part in the split."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", "model")
    paths = {split: tmp_path / f"{split}.csv" for split in ("train", "validation", "test")}
    for path in paths.values():
        shutil.copy(folder / "rows.csv", path)

    def recipe(**section):
        files = {split: str(path) for split, path in paths.items() if split != "test"}
        return Recipe.from_dict({
            "data": {**files, "image_root": str(folder), **section},
            "model": {"text": "text-encoder", "vision": "vision-encoder"},
            "tasks": [{"name": "topic", "kind": "classification"}, {"name": "score", "kind": "regression"}],
            "training": {"output_dir": "model"},
        })  # fmt: skip

    def append_row(split):
        lines = paths[split].read_text().splitlines()
        paths[split].write_text("\n".join([*lines, lines[1]]))

    own_file, held_out = recipe(test=str(paths["test"])), recipe(test_fraction=0.4)
    assert has_new_test_rows(held_out, Path("model")) is None
    save_hashes(Path("model"), hashes_of_tables(own_file))
    append_row("test")
    append_row("validation")
    own_file.save(Path("model"))
    assert "The 61 test rows of recipe.yaml are used" in mm("calibrate", "model", "--min-rows", "5")
    assert has_new_test_rows(recipe(test="renamed.csv"), Path("model")) is False
    assert has_new_test_rows(held_out, Path("model")) is False
    append_row("train")
    assert has_new_test_rows(own_file, Path("model")) is False
    assert has_new_test_rows(held_out, Path("model")) is True


def test_rows_without_content_are_left_out_and_get_no_answer(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(folder)
    table = pd.read_csv("rows.csv")
    empty = pd.DataFrame([{"text": None, "image": None, "topic": "food", "score": 1}])
    pd.concat([empty, table]).to_csv("with-empty.csv", index=False)
    mm("calibrate", "model", "rows.csv", "--output", tmp_path / "a.json", "--min-rows", "15")
    mm("calibrate", "model", "with-empty.csv", "--output", tmp_path / "b.json", "--min-rows", "15")
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())
    assert any(m.startswith("1 of 61 with-empty.csv rows has no content in 'text', 'image'") for m in caplog.messages)
    mm("predict", "model", "with-empty.csv", "--output", tmp_path / "answers.csv", "--coverage", "0.9")
    answers = pd.read_csv(tmp_path / "answers.csv")
    new = [name for name in answers if name not in ("text", "image", "topic_input", "score_input")]
    assert {"topic_set", "topic_abstain", "score_interval", "score_abstain"} <= set(new)
    assert answers[new].iloc[0].isna().all()
    assert answers[new].iloc[1:].notna().all(axis=None)


def test_parquet_has_the_types_of_intervals_also_if_the_first_rows_have_none(folder, tmp_path, monkeypatch):
    """Calibrated on rows with a picture: a text alone gets no promise, as in the first rows here."""
    model, processor = (
        make_model(tasks=[Regression("score"), MultiLabel("tags", labels=["red", "blue"])]),
        make_processor(),
    )
    rows = [{"text": "red cat", "image": make_image(i), "score": i % 5, "tags": ["red"][: i % 2]} for i in range(90)]
    calibrate(model, processor, rows, hide=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tables, "CHUNK_SIZE", 2)
    make_image(1).save(tmp_path / "1.png")
    pd.DataFrame({"text": ["red cat"] * 5, "image": [None] * 4 + ["1.png"]}).to_csv(tmp_path / "rows.csv", index=False)
    written = tmp_path / "answers.parquet"
    run_prediction(str(tmp_path / "model"), tmp_path / "rows.csv", written, None, 2, 0, None, Reading(), coverage=0.9)
    found = pyarrow.parquet.read_table(written)
    assert found["score_interval"].to_pylist()[:4] == [None] * 4
    low, high = found["score_interval"].to_pylist()[4]
    assert low < found["score"].to_pylist()[4] < high
    types = {name: str(found.schema.field(name).type) for name in found.schema.names}
    assert types["score_interval"] == "list<element: double>"
    assert types["tags_set"] == "list<element: string>"
    assert {types[f"{task}_{key}"] for task in ("score", "tags") for key in ("odd", "abstain")} == {"bool"}
