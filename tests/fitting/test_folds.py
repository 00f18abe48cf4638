"""Cross-validation: what is in which fold, the scores, and what an interrupted run keeps."""

import csv
import json
import re

import numpy as np
import pandas as pd
import pytest
from command_line import mm
from sklearn.datasets import load_diabetes
from sklearn.metrics import accuracy_score, mean_absolute_error

from mm_transformers import Classification, fit
from mm_transformers.data.folding import fold_numbers
from mm_transformers.fitting import folds as folds_module
from mm_transformers.fitting.folds import cross_validate
from mm_transformers.training.recipe import read_recipe


QUICK = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}


def make_table(count=60):
    """The length decides the kind; each author has three rows."""
    rng = np.random.default_rng(0)
    length = rng.normal(size=count)
    return pd.DataFrame({
        "length": length, "width": rng.normal(size=count), "author": [f"author {i // 3}" for i in range(count)],
        "kind": np.where(length > 0, "long", "short"), "price": 3 * length + rng.normal(scale=0.1, size=count),
    })  # fmt: skip


def fit_in_folds(output, say, **options):
    return fit(
        make_table(), ["kind", "price"], output, group="author", preset="fast", training=QUICK, say=say, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    said = []
    output = tmp_path_factory.mktemp("folds") / "model"
    return fit_in_folds(output, said.append, folds=3), said


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_each_row_is_answered_once_by_a_model_without_its_author(fitted):
    result, _ = fitted
    rows, table = rows_of(result.output / "folds.csv"), make_table()
    assert [int(row["row"]) for row in rows] == list(range(60))
    assert [row["kind_true"] for row in rows] == table["kind"].tolist()
    assert [float(row["price_true"]) for row in rows] == table["price"].tolist()
    fold_of_author = pd.Series([row["fold"] for row in rows]).groupby(table["author"]).nunique()
    assert (fold_of_author == 1).all()
    assert set(pd.Series([row["fold"] for row in rows]).value_counts()) <= {18, 21}  # of three rows each


@pytest.mark.slow
def test_the_scores_are_those_of_the_answers(fitted):
    """Computed again from the file, by scikit-learn."""
    result, _ = fitted
    rows = pd.DataFrame(rows_of(result.output / "folds.csv"))
    accuracies = [accuracy_score(part.kind_true, part.kind_predicted) for _, part in rows.groupby("fold")]
    errors = [
        mean_absolute_error(part.price_true.astype(float), part.price_predicted.astype(float))
        for _, part in rows.groupby("fold")
    ]
    found = result.cross_validation
    assert [fold.scores["kind_accuracy"] for fold in found.folds] == pytest.approx(accuracies)
    assert [fold.scores["price_mae"] for fold in found.folds] == pytest.approx(errors, rel=1e-4)
    assert found.mean["kind_accuracy"] == pytest.approx(np.mean(accuracies))
    assert found.deviation["price_mae"] == pytest.approx(np.std(errors, ddof=1), rel=1e-3)
    kind, price = result.verdicts
    assert (kind.model, kind.num_rows, kind.rows) == (pytest.approx(np.mean(accuracies)), 60, "out-of-fold")
    assert price.model < 0.3 * price.majority


@pytest.mark.slow
def test_the_answers_depend_on_the_fold(fitted):
    """The final model knows the rows; the models of the folds do not."""
    result, _ = fitted
    rows = rows_of(result.output / "folds.csv")
    again = [row["price"]["value"] for row in result.predict(make_table())]
    assert not np.allclose(again, [float(row["price_predicted"]) for row in rows])


@pytest.mark.slow
def test_what_is_said_and_written(fitted):
    result, said = fitted
    progress = [line for line in said if line.startswith("Fold")]
    assert re.fullmatch(r"Fold 1 of 3: training on the other (39|42) rows\.", progress[0])
    assert re.fullmatch(
        r"Fold 1 of 3: kind [\d.]+ accuracy, price [\d.]+ mae \((18|21) rows, [\d.]+ minutes\)\.", progress[1]
    )
    assert any(re.fullmatch(r"kind: [\d.]+ ± [\d.]+ accuracy, mean over 3 folds \(linear start .*\)", x) for x in said)
    assert re.fullmatch(r"Rows: 5\d train, \d+ validation\.", next(x for x in said if x.startswith("Rows:")))
    assert sorted(path.name for path in (result.output / "folds").iterdir()) == [f"fold-{i}.json" for i in (1, 2, 3)]
    page = (result.output / "report.html").read_text()
    table = result.cross_validation.table()
    assert "Scores on each fold" in page
    assert "On the out-of-fold rows." in page
    assert all(f"<td>{cell}</td>" in page for row in table.rows for cell in row[1:])
    assert [row[0] for row in table.rows] == ["1", "2", "3", "mean", "standard deviation"]
    assert set(result.metrics) == {"validation"}


@pytest.mark.slow
def test_files_with_rows_stay_off_the_hub(fitted):
    output = fitted[0].output
    ignored = {line.strip("/") for line in (output / ".gitignore").read_text().splitlines()}
    files = [path for path in output.rglob("*") if path.is_file()]
    with_rows = {
        path.relative_to(output).parts[0]
        for path in files
        if any(part in path.read_bytes() for part in (b"author 13", b"price_predicted", b"price_true"))
    }
    assert {"folds", "folds.csv"} <= with_rows <= ignored


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_done(tmp_path, fitted, monkeypatch):
    measure, done = folds_module._measure, []

    def interrupted(recipe, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        done.append(number)
        return measure(recipe, number, *rest)

    monkeypatch.setattr(folds_module, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_in_folds(tmp_path / "model", str, folds=3)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "model" / "folds").iterdir()}
    assert sorted(kept) == ["fold-1.json", "fold-2.json"]
    (tmp_path / "model" / "folds" / "fold-3").mkdir()  # of the training that was interrupted
    (tmp_path / "model" / "folds" / "fold-3" / "config.json").write_text("{}")
    monkeypatch.setattr(folds_module, "_measure", measure)
    said = []
    result = fit_in_folds(tmp_path / "model", said.append, folds=3)
    assert [line for line in said if "already been measured" in line] == [
        "Fold 1 of 3 has already been measured.", "Fold 2 of 3 has already been measured."
    ]  # fmt: skip
    assert all((tmp_path / "model" / "folds" / name).read_bytes() == content for name, content in kept.items())
    plain = {name: value for name, value in fitted[0].cross_validation.mean.items() if "loss" not in name}
    assert {name: result.cross_validation.mean[name] for name in plain} == pytest.approx(plain)
    again = fit_in_folds(tmp_path / "model", said.append, folds=3)  # all is there
    assert again.cross_validation == result.cross_validation


@pytest.mark.slow
def test_other_rows_or_folds_are_measured_anew(tmp_path):
    x, y = load_diabetes(return_X_y=True, as_frame=True)
    table = x[["bmi", "bp"]].assign(y=y)
    options = dict(preset="fast", training=QUICK, report=False)
    table.to_csv(tmp_path / "rows.csv", index=False)
    fit(tmp_path / "rows.csv", ["y"], tmp_path / "model", folds=2, say=str, **options)
    said = []
    result = fit(tmp_path / "rows.csv", ["y"], tmp_path / "model", folds=3, say=said.append, **options)
    assert not any("already been measured" in line for line in said)
    assert len(result.cross_validation.folds) == 3
    table.assign(y=2 * y).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match="holds a model of another recipe"):
        fit(tmp_path / "rows.csv", ["y"], tmp_path / "model", folds=3, say=str, **options)
    stored = json.loads((tmp_path / "model" / "folds" / "fold-1.json").read_text())
    assert stored["metrics"] == result.cross_validation.folds[0].metrics


@pytest.mark.slow
def test_the_command(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_table().to_csv(tmp_path / "rows.csv", index=False)
    output = mm(
        "fit", tmp_path / "rows.csv", "--predict", "kind", "--output", tmp_path / "model", "--folds", "2",
        "--minutes", "2", "--preset", "fast", "--report-to", "tensorboard",
    )  # fmt: skip
    assert "Fold 2 of 2: kind" in output
    assert "mean over 2 folds" in output
    assert (tmp_path / "model" / "folds.csv").is_file()
    [events] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}  # the folds are not tracked
    assert EventAccumulator(str(events)).Reload().Scalars("eval/kind_loss")


@pytest.mark.slow
def test_the_first_metric_is_that_of_the_task(fitted, tmp_path):
    recipe, said = read_recipe(fitted[0].output / "recipe.yaml"), []
    recipe.tasks[0]["metrics"] = ["f1_micro", "accuracy"]
    recipe.training["output_dir"] = str(tmp_path / "model")
    result = cross_validate(recipe, 2, say=said.append, print_logs=False)
    assert result.main_metrics == {"kind": "f1_micro", "price": "mae"}
    # With one class per row it is the accuracy.
    assert result.mean["kind_f1_micro"] == result.mean["kind_accuracy"]
    assert "not measured" not in "".join([*said, *result.lines()])
    assert {verdict.metric for verdict in result.verdicts} == {"f1_micro", "mae"}


def test_folds_have_equal_shares_of_labels():
    rng = np.random.default_rng(1)
    rows = [
        {"text": f"text {i}", "image": f"{i // 2}.png", "topic": ["a", "b", "b", "b"][i % 4], "writer": i // 4}
        for i in range(400)
    ]
    order = rng.permutation(400)
    rows = [rows[i] for i in order]
    numbers = fold_numbers(rows, 5, tasks=[Classification("topic", labels=["a", "b"])])
    assert np.bincount(numbers).tolist() == [80] * 5
    assert [
        sum(row["topic"] == "a" for row, n in zip(rows, numbers, strict=True) if n == fold) for fold in range(5)
    ] == ([20] * 5)
    folds_of_picture = pd.Series(numbers).groupby([row["image"] for row in rows]).nunique()
    assert (folds_of_picture == 1).all()
    of_writers = fold_numbers(rows, 4, group_column="writer", tasks=[Classification("topic", labels=["a", "b"])])
    assert (pd.Series(of_writers).groupby([row["writer"] for row in rows]).nunique() == 1).all()
    assert np.bincount(of_writers).tolist() == [100] * 4
    assert (fold_numbers(rows, 5) == fold_numbers(pd.DataFrame(rows), 5)).all()


@pytest.mark.parametrize(
    ("rows", "folds", "message"),
    [
        ([{"text": "a"}] * 4, 1, "The number of folds must be at least 2, but is 1."),
        ([{"text": "a", "image": "x.png"}] * 4, 2, "2 folds cannot be made of 4 rows: rows of one picture, file,"),
        ([{"text": str(i), "by": i // 10} for i in range(30)], 4, "so there are 3 parts, the largest with 10 rows."),
    ],
)  # fmt: skip
def test_too_few_groups(rows, folds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fold_numbers(rows, folds, group_column="by" if "by" in rows[0] else None)


def test_a_wrong_number(tmp_path):
    with pytest.raises(ValueError, match=r"The number of folds must be at least 2, but is 1\."):
        fit(make_table(), ["kind"], tmp_path / "model", folds=1, say=str)
    assert not (tmp_path / "model").exists()
