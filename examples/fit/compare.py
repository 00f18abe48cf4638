"""
Compares `fit` with strong models of scikit-learn on tables: the same columns, the same text features, the same rows.

    npm pack vega-datasets@3.2.1 && tar xzf vega-datasets-3.2.1.tgz
    python examples/fit/compare.py movies --movies package/data/movies.json --text my-text-encoder
    python examples/fit/compare.py breast_cancer wine diabetes

Each seed shuffles the rows first, so the held-out rows differ. Of the boosted and the linear models the better one on
the validation rows counts, and is scored on the test rows once. Results go to `results.json` beside the script.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from transformers import AutoModel, AutoTokenizer

from mm_transformers import fit
from mm_transformers.training.recipe.builders import load_data, training_arguments


MOVIES = ["Major Genre", "IMDB Rating"]


def read_movies(path: Path) -> tuple[pd.DataFrame, list[str]]:
    return pd.DataFrame(json.loads(path.read_text())).astype({"Title": "string"}), MOVIES


def read_scikit_learn(name: str) -> tuple[pd.DataFrame, list[str]]:
    from sklearn import datasets

    frame = getattr(datasets, f"load_{name}")(as_frame=True).frame
    target = "target" if name == "diabetes" else "target:classification"
    return frame, [target]


@torch.no_grad()
def text_features(encoder: str, texts: list[str]) -> np.ndarray:
    """The mean of the states of an encoder."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    found = []
    for start in range(0, len(texts), 64):
        inputs = tokenizer(
            texts[start : start + 64], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(found)


def columns_of(rows: pd.DataFrame, plan, embedded: np.ndarray | None) -> pd.DataFrame:
    """The columns that `fit` reads: numbers and days, categories, and the features of the text."""
    parts = {}
    for column in plan.columns:
        cells = rows[column.name]
        if column.role == "number":
            parts[column.name] = pd.to_numeric(cells, errors="coerce").astype(float)
        elif column.role == "date":
            parts[column.name] = (pd.to_datetime(cells, errors="coerce") - pd.Timestamp(0)).dt.days.astype(float)
        elif column.role == "category":
            parts[column.name] = cells.astype("string").fillna("").astype(str)
    frame = pd.DataFrame(parts, index=rows.index)
    if embedded is not None:
        features = pd.DataFrame(embedded, index=rows.index).add_prefix("text ")
        frame = pd.concat([frame, features], axis=1)
    return frame


def baselines(is_number: bool, frame: pd.DataFrame) -> dict:
    categories = [name for name in frame if frame[name].dtype == object or str(frame[name].dtype) == "str"]
    numbers = [name for name in frame if name not in categories]
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=5)
    prepared = make_column_transformer(
        (make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), numbers), (one_hot, categories)
    )
    ordinal = make_column_transformer(
        ("passthrough", numbers), (OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=5,
                                                sparse_output=False), categories)
    )  # fmt: skip
    boosting = HistGradientBoostingRegressor if is_number else HistGradientBoostingClassifier
    boosted = {
        f"boosted {rate}": boosting(learning_rate=rate, early_stopping=True, random_state=0) for rate in (0.03, 0.1)
    }
    linear = RidgeCV(np.logspace(-2, 5, 15)) if is_number else LogisticRegressionCV(Cs=8, max_iter=500, cv=3)
    models = {name: make_pipeline(ordinal, model) for name, model in boosted.items()}
    return {**models, "linear": make_pipeline(prepared, linear)}


def scores(is_number: bool, truth: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    if is_number:
        return {"mae": mean_absolute_error(truth, answers), "r2": r2_score(truth, answers)}
    return {"accuracy": accuracy_score(truth, answers), "f1": f1_score(truth, answers, average="macro")}


def compare(name: str, table: pd.DataFrame, targets: list[str], text: str | None, seed: int, preset: str) -> dict:
    """Target -> method -> scores on the test rows."""
    table = table.sample(frac=1, random_state=seed).reset_index(drop=True)
    found: dict = {target.split(":")[0]: {} for target in targets}
    full = None
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("all columns", "without the table"):
            options = {}
            if variant == "without the table":
                if text is None:
                    continue
                assert full is not None
                kinds = ("number", "date", "category")
                options = {column.name: "ignore" for column in full.plan.columns if column.role in kinds}
            began = time.process_time()
            result = fit(
                table, targets, Path(folder, variant), text=text, preset=preset, report=False, columns=options,
                training={"report_to": "none", "disable_tqdm": True, "seed": seed}, say=str,
            )  # fmt: skip
            seconds = time.process_time() - began
            measured = result.metrics["test"]
            for task in result.plan.targets:
                column = task.task.get("column", task.task["name"])
                own = {key.removeprefix(f"test_{task.task['name']}_"): value for key, value in measured.items()
                       if key.startswith(f"test_{task.task['name']}_")}  # fmt: skip
                found[column][f"fit, {variant}"] = {**own, "cpu_seconds": seconds}
            if variant == "all columns":
                full = result
                recipe = full.plan.recipe
                splits = load_data(recipe, training_arguments(recipe)).splits
        parts = {split: rows.to_pandas() for split, rows in splits.items()}
    embedded = dict.fromkeys(parts)
    if text is not None:
        texts = [column.name for column in full.plan.columns if column.role == "text"]
        for split, rows in parts.items():
            joined = rows[texts].fillna("").astype(str).agg(" ".join, axis=1).tolist()
            embedded[split] = text_features(text, joined)
    for task in full.plan.targets:
        column, is_number = task.task.get("column", task.task["name"]), task.task["kind"] == "regression"
        labelled = {split: rows[column].notna().to_numpy() for split, rows in parts.items()}
        frames = {split: columns_of(rows, full.plan, embedded[split])[labelled[split]] for split, rows in parts.items()}
        truth = {split: rows[column][labelled[split]].to_numpy() for split, rows in parts.items()}
        if not is_number:
            truth = {split: values.astype(str) for split, values in truth.items()}
        best, headline = None, "r2" if is_number else "accuracy"
        for method, model in baselines(is_number, frames["train"]).items():
            model.fit(frames["train"], truth["train"])
            chosen = scores(is_number, truth["validation"], model.predict(frames["validation"]))[headline]
            tested = scores(is_number, truth["test"], model.predict(frames["test"]))
            found[column][method] = tested
            if best is None or chosen > best[0]:
                best = (chosen, method)
        found[column]["chosen baseline"] = {**found[column][best[1]], "method": best[1]}
        constant = pd.Series(truth["train"]).mean() if is_number else pd.Series(truth["train"]).mode()[0]
        found[column]["constant"] = scores(is_number, truth["test"], np.full(len(truth["test"]), constant))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", help="movies, breast_cancer, wine, diabetes, digits")
    parser.add_argument("--movies", type=Path, help="movies.json of vega-datasets")
    parser.add_argument("--text", help="text encoder, by Hub id or folder, for tables with texts")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    for name in args.tables:
        table, targets = read_movies(args.movies) if name == "movies" else read_scikit_learn(name)
        for seed in args.seeds:
            found = compare(name, table, targets, args.text if name == "movies" else None, seed, args.preset)
            results = json.loads(args.output.read_text()) if args.output.exists() else {}
            results.setdefault(name, {})[str(seed)] = found
            args.output.write_text(json.dumps(results, indent=1) + "\n")
            print(name, seed, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
