"""Trainings with columns of numbers and categories: by a recipe on CSV, by the Trainer, and with a feature cache."""

import csv
import json
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_line import mm
from recipes import make_rows, read_csv, recipe_values, save_encoders, write_csv
from sklearn.linear_model import LogisticRegression, Ridge
from tiny import make_tokenizer

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Predictor,
    Regression,
    table_columns,
)
from mm_transformers.analysis import ablate, explain
from mm_transformers.training.linear_start.probe_start import probes_of
from mm_transformers.training.recipe import Recipe, read_recipe


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def with_columns(rows: list[dict]) -> list[dict]:
    for i, row in enumerate(rows):
        row["price"] = None if i % 5 == 4 else 2.5 * i
        row["postal code"] = None if i % 7 == 6 else ["01067", "10115"][i % 2]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe whose model reads texts, pictures and two columns of a CSV file, and in `out` the trained model."""
    folder = tmp_path_factory.mktemp("table")
    write_csv(folder / "train.csv", with_columns(make_rows(folder, 16)))
    values = recipe_values(save_encoders(folder / "encoders"), max_steps=2)
    values["columns"] = {"table": {"price": "number", "postal code": "category"}}
    values["model"] |= {"table": {"hidden_size": 16}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    mm("train", folder / "recipe.yaml", f"data.test={folder / 'train.csv'}")
    return folder


@pytest.mark.slow
def test_a_recipe_on_csv(folder):
    model = MMTransformerForMultiTask.from_pretrained(folder / "out")
    columns = {column["name"]: column for column in model.config.table_config.columns}
    price, code = columns["price"], columns["postal code"]
    known = [2.5 * i for i in range(16) if i % 5 != 4]
    assert price["mean"] == pytest.approx(np.mean(known))
    assert price["std"] == pytest.approx(np.std(known))
    assert sorted(code["values"]) == ["01067", "10115"]
    assert model.config.table_config.hidden_size == 16
    assert MMTransformerProcessor.from_pretrained(folder / "out").table_config.columns == list(columns.values())
    assert "test_topic_accuracy" in json.loads((folder / "out" / "all_results.json").read_text())
    saved = read_recipe(folder / "out" / "recipe.yaml")
    assert saved.columns.table == {"price": "number", "postal code": "category"}
    card = (folder / "out" / "README.md").read_text()
    assert '"price": ' in card
    assert '"postal code": ' in card


@pytest.mark.slow
def test_a_file_is_predicted_as_its_rows(folder):
    mm("predict", folder / "out", folder / "train.csv", "--output", folder / "answers.csv")
    answers = read_csv(folder / "answers.csv")
    rows = [
        {**row, "image": str(folder / row["image"]) if row["image"] else None} for row in read_csv(folder / "train.csv")
    ]
    found = Predictor.from_pretrained(folder / "out")(rows)
    assert [row["topic"] for row in answers] == [row["topic"]["label"] for row in found]
    for row, other in zip(answers, found, strict=True):
        assert float(row["stars"]) == pytest.approx(other["stars"]["value"], abs=1e-4)
    mm("evaluate", folder / "out", folder / "train.csv", "--ablate", "--output", folder / "metrics.json")
    with (folder / "bad.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "image", "price", "postal code"], ["a", "", "cheap", ""]])
    told = mm("predict", folder / "out", folder / "bad.csv", "--output", folder / "x.csv", ok=False)
    assert "row 0, column 'price': 'cheap' is no number" in told.replace("\n", " ")
    with (folder / "less.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "image", "price"], ["a", "", "1"]])
    told = mm("predict", folder / "out", folder / "less.csv", "--output", folder / "x.csv", ok=False)
    assert "no column 'postal code'" in told.replace("\n", " ")


@pytest.mark.slow
def test_a_report_shows_the_columns(folder):
    mm("explain", folder / "out", folder / "train.csv", "--output", folder / "report.html", "--examples", 2)
    assert "postal code: " in (folder / "report.html").read_text()


def recipe(columns, **model) -> Recipe:
    return Recipe.from_dict(
        {
            "data": {"train": "train.csv"},
            "columns": columns,
            "model": model,
            "tasks": [{"name": "topic", "kind": "classification"}],
            "training": {"output_dir": "out"},
        }
    )


def test_columns_of_a_recipe():
    assert recipe({"table": ["price"]}, text="bert").columns.table == ["price"]
    without_text = recipe({"text": None, "table": ["price"]})
    assert without_text.columns.collator_options["text_column"] is None
    assert without_text.to_dict()["columns"] == {"text": None, "table": ["price"]}
    with pytest.raises(ValueError, match="^The recipe needs model.text"):
        recipe({"table": ["price"]})
    with pytest.raises(ValueError, match="^columns.table must be a list or a mapping or null, but is 'price'"):
        recipe({"table": "price"}, text="bert")


def make_table(num_rows: int = 90) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        price, brand = rng.normal(10, 3), rng.choice(["acme", "zeta"])
        rows.append(
            {"price": float(price), "brand": str(brand), "topic": "x" if price + 4 * (brand == "acme") > 12 else "y"}
        )
    return rows


def make_trainer(folder, rows, text=None, **options) -> MMTrainer:
    torch.manual_seed(0)
    table = table_columns(rows, ["price", "brand"])
    encoders = {"text": text, "table": table}
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "refit": False, **options}
    return MMTrainer(
        MMTransformerForMultiTask.from_encoders(**encoders, tasks=[Classification("topic", labels=["x", "y"])]),
        MMTrainingArguments(str(folder), **arguments),
        processing_class=MMTransformerProcessor.from_encoders(**encoders),
        train_dataset=datasets.Dataset.from_list(rows),
    )


@pytest.mark.slow
def test_a_table_alone_starts_as_a_linear_model(tmp_path):
    rows = make_table()
    trainer = make_trainer(tmp_path, rows, learning_rate=1e-12, validation_fraction=0.0)
    trainer.train()
    [probe] = probes_of(trainer.fused_model)["topic"]
    assert probe.linear.weight.abs().sum() > 0
    collator = MMDataCollator(trainer.processing_class, trainer.fused_model.config)
    batch = collator(rows)
    batch.pop("labels")
    model = trainer.fused_model.eval()
    with torch.no_grad():
        features = probe.features(model.model(**batch))
        logits = model(**batch).logits["topic"]
        torch.testing.assert_close(logits, probe.linear(features), rtol=1e-3, atol=1e-3)
    # A logistic regression on the same columns answers alike.
    block, _ = probe.blocks[1]
    labels = [row["topic"] for row in rows]
    reference = LogisticRegression(C=10).fit(features[:, block].numpy(), labels)
    same = reference.predict(features[:, block].numpy()) == np.array(["x", "y"])[logits.argmax(-1).numpy()]
    assert same.mean() > 0.95
    accuracy = (np.array(labels) == np.array(["x", "y"])[logits.argmax(-1).numpy()]).mean()
    assert accuracy > 0.9


@pytest.mark.slow
def test_the_start_of_numbers_is_an_additive_model(tmp_path):
    """A sum of functions of columns that are not linear: the start is a ridge regression on pieces of them."""
    rng = np.random.default_rng(0)
    x, skewed = rng.normal(size=400), rng.lognormal(0, 2, 400)
    cost = np.abs(x) + np.log(skewed) + rng.normal(0, 0.1, 400)
    rows = [{"x": a, "skewed": b, "cost": c} for a, b, c in zip(x, skewed, cost, strict=True)]
    rows[5]["x"] = rows[6]["skewed"] = None
    table = table_columns(rows, ["x", "skewed"])
    torch.manual_seed(0)
    trainer = MMTrainer(
        MMTransformerForMultiTask.from_encoders(text=None, table=table, tasks=[Regression("cost")]),
        MMTrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1, refit=False, learning_rate=1e-12,
            validation_fraction=0.0, save_strategy="no",
        ),
        processing_class=MMTransformerProcessor.from_encoders(text=None, table=table),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    [strength] = trainer._start.models["cost"].scales
    parts = []
    for values, name in ((x, "x"), (skewed, "skewed")):
        known = np.array([row[name] is not None for row in rows])
        mean, std = values[known].mean(), values[known].std()
        edges = np.quantile(values[known], np.arange(9) / 8, method="inverted_cdf")
        parts.append(np.where(known, (values - mean) / std, 0))
        for pair in pairwise(edges):
            parts.append(np.where(known, np.interp(values, pair, [0, 1]) - np.interp(mean, pair, [0, 1]), 0))
    design, std = np.column_stack(parts), cost.std()
    reference = Ridge(alpha=1 / strength).fit(design, (cost - cost.mean()) / std)
    expected = reference.predict(design) * std + cost.mean()
    found = trainer.predict(rows).predictions["cost"].reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=5e-3)
    linear = Ridge().fit(design[:, [0, 9]], cost)
    assert np.abs(found - cost).mean() < 0.3 * np.abs(linear.predict(design[:, [0, 9]]) - cost).mean()


@pytest.mark.slow
def test_a_saved_model_of_a_table_alone(tmp_path):
    rows = make_table(30)
    trainer = make_trainer(tmp_path, rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = Predictor(trainer.fused_model, MMDataCollator(trainer.processing_class, trainer.fused_model.config))(
        rows
    )
    assert Predictor.from_pretrained(tmp_path / "saved")(rows) == expected
    model = MMTransformerForMultiTask.from_pretrained(tmp_path / "saved")
    processor = MMTransformerProcessor.from_pretrained(tmp_path / "saved")
    explanation = explain(model, processor, {"price": 3.0, "brand": "acme"})
    assert [column.name for column in explanation.columns] == ["price", "brand"]
    assert explanation.rests_on == "table 100%"
    with pytest.raises(ValueError, match="^The model reads only table"):
        ablate(model, processor, rows)


@pytest.mark.slow
def test_a_feature_cache_stores_the_texts_only(tmp_path):
    encoders = save_encoders(tmp_path / "encoders")
    rows = [{**row, "text": f"a cat {i % 3}"} for i, row in enumerate(make_table(12))]
    logits = []
    for cache in (None, str(tmp_path / "features")):
        torch.manual_seed(0)
        table = table_columns(rows, ["price", "brand"])
        parts = {"text": str(encoders / "text"), "table": table}
        tasks = [Classification("topic", labels=["x", "y"])]
        trainer = MMTrainer(
            MMTransformerForMultiTask.from_encoders(**parts, tasks=tasks, freeze=["text"]),
            MMTrainingArguments(
                str(tmp_path / "out"), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=2, refit=False,
                validation_fraction=0.0, save_strategy="no",
            ),
            processing_class=MMTransformerProcessor.from_encoders(**parts),
            train_dataset=datasets.Dataset.from_list(rows),
            feature_cache=cache,
        )  # fmt: skip
        trainer.train()
        logits.append(torch.tensor(trainer.predict(rows).predictions["topic"]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)
    assert {path.name.partition("-")[0] for path in (tmp_path / "features").iterdir() if path.is_dir()} == {"text"}


def test_training_rows_need_the_columns(tmp_path):
    trainer_rows = [{**row} for row in make_table(12)]
    table = table_columns(trainer_rows, ["price", "brand"])
    for row in trainer_rows:
        del row["brand"]
    encoders = {"text": None, "table": table}
    with pytest.raises(ValueError, match="^The train data set has no column 'brand', which the model reads"):
        MMTrainer(
            MMTransformerForMultiTask.from_encoders(**encoders, tasks=[Classification("topic", labels=["x", "y"])]),
            MMTrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            processing_class=MMTransformerProcessor.from_encoders(**encoders),
            train_dataset=datasets.Dataset.from_list(trainer_rows),
        )


def test_a_tokenizer_is_needed_only_for_text():
    assert len(make_tokenizer()) > 2
    processor = MMTransformerProcessor.from_encoders(text=None, table=table_columns(make_table(5), ["price"]))
    assert len(processor.tokenizer) == 2
