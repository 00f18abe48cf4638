"""`mm-transformers train`, `evaluate` and `predict`, run as users run them, on files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from command_line import mm
from recipes import make_rows, read_csv, recipe_values, save_encoders, write_csv, write_jsonl
from safetensors.torch import load_file
from scripts import EXAMPLES, import_script

from mm_transformers import MMDataCollator, MMTransformerForMultiTask, MMTransformerProcessor
from mm_transformers.data.embedded import load_demo_dataset
from mm_transformers.training.predictor import Predictor, answer_columns


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_recipe(folder: Path, values: dict) -> Path:
    write_csv(folder / "train.csv", make_rows(folder))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def trained(encoders, tmp_path_factory):
    """A folder with rows, a recipe, and in `out` what the recipe has made."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, recipe_values(encoders, max_steps=3))
    shown = mm("train", recipe, "data.test=" + str(folder / "train.csv"), "data.max_eval_samples=7")
    (folder / "shown.txt").write_text(shown)
    return folder


# train


@pytest.mark.slow
def test_train_saves_measures_and_shows(trained):
    out = trained / "out"
    shown = (trained / "shown.txt").read_text()
    assert "validation" in shown
    assert "test" in shown
    assert f"The model is in {out}." in shown
    metrics = json.loads((out / "all_results.json").read_text())
    assert {"eval_topic_accuracy", "test_stars_mae", "eval_tags_f1", "train_loss"} <= set(metrics)
    assert (metrics["train_samples"], metrics["eval_samples"], metrics["test_samples"]) == (13, 7, 7)
    assert f"{metrics['eval_topic_accuracy']:.4g}" in shown
    assert list(MMTransformerForMultiTask.from_pretrained(out).config.get_tasks()) == ["topic", "stars", "tags"]
    # The recipe lies beside each, with what the command line said.
    for folder in (out, out / "checkpoint-1", out / "checkpoint-3"):
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["max_eval_samples"] == 7


@pytest.mark.slow
def test_train_goes_on_and_knows_when_it_is_done(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    out = folder / "out"
    # Paths are those of the copy: of another folder, so another recipe, whose model is not touched.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said = mm("train", folder / "recipe.yaml", ok=False)
    assert "holds a model of another recipe: data.train is" in said.replace("\n", "")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    shutil.rmtree(out)
    recipe = folder / "recipe.yaml"
    assert "Resuming" not in mm("train", recipe)
    weights = load_file(out / "model.safetensors")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert "has already been trained, for 3 steps" in mm("train", recipe)
    assert "Another training" not in mm("train", recipe)
    said = " ".join(mm("train", recipe, "training.learning_rate=0.1").split())
    assert "(training.output_dir=...): training.learning_rate was 0.001 and is 0.1." in said
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    # Stopped after the second step: it ends where it would have ended.
    shutil.rmtree(out / "checkpoint-3")
    for name in ("trainer_state.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    assert f"Resuming from {out}/checkpoint-2." in mm("train", recipe)
    again = load_file(out / "model.safetensors")
    assert set(again) == set(weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    # For longer, it goes on; then a measurement that is missing is made, without training.
    mm("train", recipe, "training.max_steps=4")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    (out / "eval_results.json").unlink()
    assert "has already been trained, for 4 steps" in mm("train", recipe)
    assert (out / "eval_results.json").is_file()
    # Other labels in the rows would be another task.
    rows = make_rows(folder)
    write_csv(
        folder / "train.csv", [{**row, "topic": "travel" if i == 7 else row["topic"]} for i, row in enumerate(rows)]
    )
    said = mm("train", recipe, "training.max_steps=5", ok=False)
    assert "has task 'topic' with labels ['animals', 'food'], unlike the present data" in " ".join(said.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.validation=none.csv"], "none.csv does not exist"),
        (["data.train=train.xlsx"], "must end in one of .csv, .json, .jsonl, .parquet"),
        (["columns.text=caption"], "have no column 'caption'; set columns.text to one of"),
        (["columns.image=photo"], "set columns.image (or columns.video) to one of"),
        (["tasks.0.name=mood"], "have no column 'mood' for task 'mood'"),
        (["tasks.1.kind=classification"], "numbers that are not whole"),
        (["model.fusion_type=lat"], "Unknown fusion_type 'lat'"),
        (["training.eval_strategy=often"], "often is not a valid IntervalStrategy"),
        (["training.resume_from_checkpoint=none"], "There is no checkpoint 'none' to resume from"),
        (
            ["training.metric_for_best_model=topic_acuracy"],
            "metric_for_best_model is 'topic_acuracy', but no such metric is computed; "
            "did you mean 'eval_topic_accuracy'?",
        ),
        (
            ["training.metric_for_best_model=stars_mae"],
            "'stars_mae', and lower values are better: set greater_is_better to",
        ),
    ],
)
def test_train_says_what_is_wrong(encoders, tmp_path, overrides, message):
    recipe = write_recipe(tmp_path, recipe_values(encoders))
    assert message in " ".join(mm("train", recipe, *overrides, ok=False).split())
    assert not (tmp_path / "out/config.json").exists()


def test_an_output_folder_that_is_none_is_told_before_encoders_are_loaded(encoders, tmp_path):
    recipe = write_recipe(tmp_path, recipe_values(encoders))
    (tmp_path / "out").write_text("a file")
    said = mm("train", recipe, "model.text=nowhere", ok=False)
    assert "recipe.yaml cannot be written" in " ".join(said.split())


def test_a_package_that_is_missing_is_told(encoders, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    said = mm("train", write_recipe(tmp_path, recipe_values(encoders)), "training.report_to=wandb", ok=False)
    assert "Error: WandbCallback requires wandb to be installed" in " ".join(said.split())


@pytest.mark.slow
def test_the_recipe_of_the_examples_trains(encoders, tmp_path):
    rows = make_rows(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text((EXAMPLES / "recipe.yaml").read_text())
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "validation.csv", rows[:6])
    options = ["training.use_cpu=true", "training.num_train_epochs=1", "training.disable_tqdm=true"]
    mm("train", path, f"model.text={encoders / 'text'}", f"model.vision={encoders / 'vision'}", *options)
    metrics = json.loads((tmp_path / "out/all_results.json").read_text())
    assert metrics["epoch"] == 1
    assert "eval_tags_f1" in metrics


# evaluate


def test_evaluate_measures_as_training_did(trained, tmp_path):
    rows = read_csv(trained / "train.csv")
    rows = [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:7])]  # as `max_eval_samples` does
    for row in rows:
        row["image"] = row["image"] and str(trained / row["image"])
        row["words"] = row.pop("text")
    mm("evaluate", trained / "out", write_csv(tmp_path / "rows.csv", rows), "--output", tmp_path / "m.json",
       "--text_column", "words", "--batch_size", 3)  # fmt: skip
    metrics = json.loads((tmp_path / "m.json").read_text())
    known = json.loads((trained / "out/eval_results.json").read_text())
    for name in ("eval_loss", "eval_topic_loss", "eval_stars_mae", "eval_tags_f1", "eval_samples"):
        assert metrics[name] == pytest.approx(known[name], abs=1e-6)
    assert "set --text_column to one of" in " ".join(
        mm("evaluate", trained / "out", tmp_path / "rows.csv", ok=False).split()
    )


# predict


def expected_answers(folder: Path, rows: list[dict]) -> list[dict]:
    """Each row on its own, as the README answers one."""
    model = MMTransformerForMultiTask.from_pretrained(folder / "out")
    processor = MMTransformerProcessor.from_pretrained(folder / "out")
    answers = []
    for row in rows:
        inputs = processor(text=[row["text"]], images=[str(folder / row["image"]) if row["image"] else None])
        with torch.no_grad():
            answers += model.decode(model(**inputs))
    return answers


def check_answers(rows: list[dict], answers: list[dict], expected: list[dict]) -> None:
    assert len(answers) == len(rows) == len(expected)
    for row, answer, right in zip(rows, answers, expected, strict=True):
        assert (answer["id"], answer["text"], answer["image"] or None) == (row["id"], row["text"], row["image"])
        assert answer["topic"] == right["topic"]["label"]
        assert float(answer["topic_score"]) == pytest.approx(right["topic"]["score"], abs=1e-5)
        assert float(answer["stars"]) == pytest.approx(right["stars"]["value"], abs=1e-5)
        tags, scores = answer["tags"], answer["tags_scores"]
        assert (json.loads(tags) if isinstance(tags, str) else tags) == right["tags"]["labels"]
        scores = json.loads(scores) if isinstance(scores, str) else scores
        assert scores == pytest.approx(right["tags"]["scores"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_predict_reads_and_writes(trained, tmp_path, kind):
    rows = make_rows(trained)
    file = trained / f"unlabelled.{kind}"
    unlabelled = [{name: row[name] for name in ("id", "text", "image")} for row in rows]
    if kind == "csv":
        write_csv(file, unlabelled)
    elif kind == "json":
        file.write_text(json.dumps(unlabelled))
    elif kind == "jsonl":
        write_jsonl(file, [{name: cell for name, cell in row.items() if cell is not None} for row in unlabelled])
    else:
        datasets.Dataset.from_list(unlabelled).to_parquet(file)
    expected = expected_answers(trained, rows)
    mm("predict", trained / "out", file, "--output", tmp_path / "a.csv", "--batch_size", 3)
    check_answers(rows, read_csv(tmp_path / "a.csv"), expected)
    mm("predict", trained / "out", file, "--output", tmp_path / "a.jsonl", "--batch_size", 5, "--num_workers", 2)
    check_answers(rows, [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()], expected)
    mm("predict", trained / "out", file, "--output", tmp_path / "a.parquet")
    check_answers(rows, pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist(), expected)
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"a.csv", "a.jsonl", "a.parquet"}


def test_predict_keeps_what_is_plain(trained, tmp_path):
    """Pictures as bytes, labels that are no labels, columns that are called as answers are."""
    rows = [
        {**row, "topic": "no label", "number": i, "when": None, "image": None, "parts": ["a"] * (i % 2)}
        for i, row in enumerate(make_rows(tmp_path))
    ]
    for i in (1, 2):
        rows[i]["image"] = {"bytes": (tmp_path / f"pictures/{i}.png").read_bytes(), "path": f"{i}.png"}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    mm("predict", trained / "out", tmp_path / "rows.parquet", "--output", tmp_path / "a.parquet", "--tasks", "topic")
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == [
        "id", "text", "image", "topic_input", "stars", "tags", "number", "when", "parts", "topic", "topic_score",
    ]  # fmt: skip
    answers = table.to_pylist()
    assert [row["number"] for row in answers] == list(range(13))
    assert [row["image"] for row in answers[:4]] == [None, "1.png", "2.png", None]
    assert answers[1]["topic_input"] == "no label"
    assert answers[1]["parts"] == ["a"]
    paths = [{**row, "image": f"pictures/{i}.png" if i in (1, 2) else None} for i, row in enumerate(rows)]
    shutil.copytree(trained / "out", tmp_path / "out")
    expected = expected_answers(tmp_path, paths)
    assert [row["topic_score"] for row in answers] == pytest.approx([a["topic"]["score"] for a in expected], abs=1e-5)


def test_predict_names_what_cannot_be_read(trained, tmp_path):
    rows = make_rows(tmp_path)
    (tmp_path / "pictures/7.png").write_bytes(b"no picture")
    file, output = write_csv(tmp_path / "rows.csv", rows), tmp_path / "a.csv"
    output.write_text("what was there before")
    for workers in (0, 2):
        said = mm(
            "predict", trained / "out", file, "--output", output, "--batch_size", 3, "--num_workers", workers, ok=False
        )
        assert "rows.csv: row 7, column 'image'" in " ".join(said.split())
        assert "Traceback" not in said
    assert output.read_text() == "what was there before"
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))
    mm("predict", trained / "out", file, "--output", output, "--on_bad_file", "drop")
    assert [row["id"] for row in read_csv(output)] == [row["id"] for row in rows]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("text\na\n", ["--output", "a.xlsx"], "a.xlsx must end in one of"),
        ("text\na\n", ["--output", "rows.csv"], "rows.csv is the input"),
        ("text\na\n", ["--output", "a.csv", "--tasks", "topics"], "no task 'topics'; did you mean 'topic'?"),
        ("text\na\n", ["--output", "a.csv", "--image_column", "photo"], "set --image_column to one of 'text'"),
        ("words\na\n", ["--output", "a.csv"], "set --text_column to one of 'words'"),
        ("text\n", ["--output", "a.csv"], "rows.csv has no rows"),
        ("", ["--output", "a.csv"], "rows.csv has no rows"),
        ("text,id\na,1\nb,2,3\n", ["--output", "a.csv"], "cannot be read as CSV"),
        ("text\na\n", ["--output", "rows.csv/a.csv"], "rows.csv is not a folder"),
        ("text\na\n", ["--output", "."], ". must end in one of"),
        ("text,topic,topic_input\na,b,c\n", ["--output", "a.csv"], "columns 'topic', which has the name of an answer"),
    ],
)  # fmt: skip
def test_predict_says_what_is_wrong(trained, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(text)
    assert message in " ".join(mm("predict", trained / "out", "rows.csv", *arguments, ok=False).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("text,topic,stars\na,,\n", [], "has no label of any task (looked for in column 'topic', 'stars', 'tags')"),
        ("text,topic\na,food\nb,fud\n", [], "row 1, column 'topic': task 'topic': label 'fud' is not one of"),
        ("text,stars\na,1\nb,two\n", [], "row 1, column 'stars': task 'stars': expected a finite number"),
        ("text,topic\na,food\n", ["--output", "."], ". is a folder"),
    ],
)
def test_evaluate_says_what_is_wrong(trained, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(text)
    assert message in " ".join(mm("evaluate", trained / "out", "rows.csv", *arguments, ok=False).split())


def test_answers_of_two_tasks_in_one_column_are_told():
    with pytest.raises(ValueError, match="'topic_score' and of another task would both be in a column 'topic_score'"):
        answer_columns({"topic": {"label": "a", "score": 1.0}, "topic_score": 2.0})


def test_predict_needs_a_model_that_is_done(trained, tmp_path):
    shutil.copytree(trained / "out/checkpoint-1", tmp_path / "out/checkpoint-1")
    said = mm("predict", tmp_path / "out", trained / "train.csv", "--output", tmp_path / "a.csv", ok=False)
    assert "its training has not ended, but it has the checkpoint" in " ".join(said.split())
    mm("predict", tmp_path / "out/checkpoint-1", trained / "train.csv", "--output", tmp_path / "a.csv")


@pytest.mark.slow
def test_predict_writes_texts_and_labels_words(encoders, tmp_path):
    rows = [
        {**row, "words": " ".join("AB"[i % 2] for i in range(len(row["text"].split())))} for row in make_rows(tmp_path)
    ]
    values = recipe_values(encoders)
    values["model"]["text"] = str(encoders / "seq2seq")
    values["tasks"] = [
        {"name": "topic", "kind": "generation", "max_length": 4},
        {"name": "words", "kind": "token_classification"},
    ]
    recipe = write_recipe(tmp_path, values)
    write_csv(tmp_path / "train.csv", rows)
    mm("train", recipe)
    mm(
        "predict",
        tmp_path / "out",
        tmp_path / "train.csv",
        "--output",
        tmp_path / "a.jsonl",
        "--batch_size",
        4,
        "--num_beams",
        2,
    )
    model, processor = (
        c.from_pretrained(tmp_path / "out") for c in (MMTransformerForMultiTask, MMTransformerProcessor)
    )
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        picture = str(tmp_path / row["image"]) if row["image"] else None
        inputs = processor(text=[row["text"]], images=[picture], return_word_index=True)
        index = inputs.pop("word_index")
        [text] = processor.batch_decode(model.generate("topic", **inputs, num_beams=2), skip_special_tokens=True)
        assert answer["topic"] == text.strip()
        with torch.no_grad():
            labels = model.decode(model(**inputs), index)[0]["words"]
        assert answer["words"] == [label["label"] for label in labels]
        assert len(answer["words_score"]) == len(row["text"].split())


def test_rows_are_answered_as_they_come(trained):
    model = MMTransformerForMultiTask.from_pretrained(trained / "out").eval()
    collator = MMDataCollator(MMTransformerProcessor.from_pretrained(trained / "out"), model.config)
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield {"text": f"the red dog {len(taken)}", "number": taken[-1]}

    answers = Predictor(model, collator, ["stars"], batch_size=4).stream(endless())
    for batch in range(3):
        answered = next(answers)
        assert [row["number"] for row, _ in answered] == list(range(4 * batch, 4 * batch + 4))
        assert [list(answer) for _, answer in answered] == [["stars"]] * 4
        assert len(taken) <= 4 * (batch + 2)


# Several processes

SCRIPT = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from mm_transformers.cli import app
from mm_transformers.data.embedded import load_demo_dataset

for i, command in enumerate(json.loads(sys.argv[1])):
    app(command, standalone_mode=False)
    state = PartialState()
    Path(f"process{state.process_index}-{i}.json").write_text(json.dumps(state.num_processes))
"""


@pytest.mark.slow
def test_two_processes_train_measure_and_answer(encoders, tmp_path):
    recipe = write_recipe(tmp_path, recipe_values(encoders, max_steps=-1, num_train_epochs=1, use_cpu=False))
    rows, script = read_csv(tmp_path / "train.csv"), tmp_path / "script.py"
    script.write_text(SCRIPT)
    train = ["train", str(recipe), "training.per_device_train_batch_size=2"]
    predict = ["predict", "out", "train.csv", "--batch_size", "3", "--output"]
    evaluate = ["evaluate", "out", "train.csv", "--batch_size", "2", "--output", "m2.json"]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    commands = json.dumps([train, [*predict, "a2.csv"], evaluate])
    done = subprocess.run([*command, commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    world_sizes = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("process*.json")}
    assert world_sizes == {f"process{rank}-{i}": 2 for rank in (0, 1) for i in range(3)}
    # 13 rows, 4 in a step of both: 4 steps, not the 7 of one process.
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 4
    assert done.stdout.count("The model is in") == 1
    # As one process answers and measures.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        mm(*predict, "a1.csv")
        mm("evaluate", "out", "train.csv", "--output", "m1.json")
    one, two = read_csv(tmp_path / "a1.csv"), read_csv(tmp_path / "a2.csv")
    assert [row["id"] for row in two] == [row["id"] for row in rows]
    for a, b in zip(one, two, strict=True):
        assert a["topic"] == b["topic"]
        assert float(a["stars"]) == pytest.approx(float(b["stars"]), abs=1e-5)
    m1, m2 = (json.loads((tmp_path / name).read_text()) for name in ("m1.json", "m2.json"))
    for name in ("eval_loss", "eval_topic_loss", "eval_stars_mae", "eval_samples"):
        assert m1[name] == pytest.approx(m2[name], abs=1e-5)
    assert not list(tmp_path.glob(".*.partial"))
    # What one process cannot read ends both, with one sentence.
    (tmp_path / "pictures/5.png").write_bytes(b"no picture")
    command = [*command[:-1], "-m", "mm_transformers.cli", *predict, "a3.csv"]
    failing = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failing.returncode != 0
    assert "row 5, column 'image'" in failing.stderr
    assert not (tmp_path / "a3.csv").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.slow
def test_the_demo_as_a_recipe(tmp_path, monkeypatch):
    """examples/demo_recipe.py writes what the commands can take as it stands."""
    script = import_script(EXAMPLES / "demo_recipe.py")
    few = load_demo_dataset(train_size=64, validation_size=16, test_size=16)
    monkeypatch.setattr(script, "load_demo_dataset", lambda seed: few)
    monkeypatch.setattr(sys, "argv", ["demo_recipe.py", "--output_dir", str(tmp_path / "demo")])
    script.main()
    printed = mm("train", tmp_path / "demo/recipe.yaml", "training.max_steps=2", "training.use_cpu=true")
    assert "sentiment" in printed
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "demo/out")
    assert model.num_parameters() < 500_000
    mm("predict", tmp_path / "demo/out", tmp_path / "demo/test.parquet", "--output", tmp_path / "answers.csv")
    answers = read_csv(tmp_path / "answers.csv")
    assert [answer["text"] for answer in answers] == few["test"]["text"]
