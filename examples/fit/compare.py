"""
Compares `fit` with strong models on tables: the same columns, the same features of texts and pictures, the same rows.

    pip install lightgbm==4.7.0
    python examples/fit/compare.py breast_cancer wine diabetes
    npm pack vega-datasets@3.2.1 && tar xzf vega-datasets-3.2.1.tgz
    python examples/fit/compare.py movies --data package/data/movies.json --text my-text-encoder
    python examples/fit/compare.py stamps --data stamps_data/all.parquet --text my-text-encoder --vision my-vision

Each seed shuffles the rows first, so the held-out rows differ. Of LightGBM and the linear models the better one on the
validation rows counts, and is scored on the test rows once. Results go to `results.json` beside the script.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import lightgbm
import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, OneHotEncoder, StandardScaler
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mm_transformers import fit
from mm_transformers.training.recipe.builders import load_data, training_arguments


def read_movies(path: Path) -> tuple[datasets.Dataset, list[str]]:
    frame = pd.DataFrame(json.loads(path.read_text())).astype({"Title": "string"})
    for name in frame.select_dtypes(exclude="number"):  # some hold numbers beside texts
        frame[name] = frame[name].map(lambda cell: None if pd.isna(cell) else str(cell))
    return datasets.Dataset.from_pandas(frame), ["Major Genre", "IMDB Rating"]


def read_stamps(path: Path) -> tuple[datasets.Dataset, list[str]]:
    return datasets.Dataset.from_parquet(str(path)).select_columns(["text", "image", "category"]), ["category"]


def read_emoji(path: Path) -> tuple[datasets.Dataset, list[str]]:
    """Keyword and picture; rows of one family of emoji stay on one side."""
    rows = datasets.concatenate_datasets([datasets.Dataset.from_parquet(str(file)) for file in sorted(path.glob("*"))])
    return rows.select_columns(["text", "image", "group", "family"]), ["group"]


def read_awkward(path: Path) -> tuple[datasets.Dataset, list[str]]:
    """
    Stamps as a table that nobody has tidied: 40 columns, among them three of texts, with umlauts and spaces in names.

    There are an identifier, a constant, an empty column, days, numbers written as texts with gaps, and 28 numbers of
    which only the histograms of the pictures tell something.
    """
    rows, random = datasets.Dataset.from_parquet(str(path)), np.random.default_rng(0)
    names = ["text", "german", "french", "image", "category"]
    table = rows.select_columns(names).rename_columns({"text": "Überschrift", "german": "deutsche Überschrift"})
    count = len(rows)
    days = pd.Timestamp("2001-03-01") + pd.to_timedelta(random.integers(0, 8000, count), "D")
    table = table.add_column("Nr.", [f"ST-{number:05d}" for number in random.permutation(count)])
    table = table.add_column("source", ["stamps"] * count)
    table = table.add_column("leer", [None] * count)
    table = table.add_column("added on", days.strftime("%d.%m.%Y").tolist())
    table = table.add_column("Größe (kB)", [str(x) if x < 90 else "n/a" for x in random.integers(1, 100, count)])
    table = table.add_column("rating", [["1", "2.5", "unknown", None][x] for x in random.integers(0, 4, count)])
    table = table.add_column("artist", [f"artist {x}" for x in random.integers(0, 30, count)])
    histograms = [None if image is None else np.asarray(image.convert("RGB")) for image in rows["image"]]
    for channel, color in enumerate(("red", "green", "blue")):
        for part in range(4):
            shares = [
                None if pixels is None else float((pixels[..., channel] // 64 == part).mean()) for pixels in histograms
            ]
            table = table.add_column(f"{color} {part}", shares)
    for number in range(16):
        table = table.add_column(f"messwert {number}", random.normal(size=count).round(3))
    return table, ["category"]


def read_scikit_learn(name: str) -> tuple[datasets.Dataset, list[str]]:
    from sklearn import datasets as tables

    frame = getattr(tables, f"load_{name}")(as_frame=True).frame
    return datasets.Dataset.from_pandas(frame), ["target" if name == "diabetes" else "target:classification"]


READERS: dict[str, Callable] = {
    "movies": read_movies, "stamps": read_stamps, "emoji": read_emoji, "awkward": read_awkward,
}  # fmt: skip


@torch.no_grad()
def text_features(encoder: str, texts: list[str]) -> np.ndarray:
    """The mean of the states of an encoder; zeros without a text."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    found = []
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        inputs = tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        has_text = torch.tensor([[bool(text.strip())] for text in part])
        found.append((((states * mask).sum(1) / mask.sum(1)) * has_text).numpy())
    return np.concatenate(found)


@torch.no_grad()
def image_features(encoder: str, cells: list[dict | None]) -> np.ndarray:
    """The mean of the states of an encoder; zeros without a picture."""
    processor, model = AutoImageProcessor.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    found: dict[bytes, np.ndarray] = {}
    width, keys = 0, [None if cell is None else cell["bytes"] for cell in cells]
    for key in keys:
        if key is not None and key not in found:
            image = Image.open(io.BytesIO(key)).convert("RGB")
            states = model(processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state
            found[key] = (states.flatten(2).mean(-1) if states.ndim == 4 else states.mean(1))[0].numpy()
            width = len(found[key])
    return np.stack([np.zeros(width, "f4") if key is None else found[key] for key in keys])


def columns_of(rows: pd.DataFrame, plan) -> pd.DataFrame:
    """The columns of numbers, days and categories that `fit` reads."""
    parts = {}
    for column in plan.columns:
        if column.role not in ("number", "date", "category"):
            continue
        cells = rows[column.name]
        if column.role == "number":
            parts[column.name] = pd.to_numeric(cells, errors="coerce").astype(float)
        elif column.role == "date":
            days = pd.to_datetime(cells, errors="coerce", dayfirst=column.name == "added on")
            parts[column.name] = (days - pd.Timestamp(0)).dt.days.astype(float)
        else:
            parts[column.name] = cells.astype("string").fillna("").astype(str)
    return pd.DataFrame(parts, index=rows.index)


def baselines(is_number: bool, frame: pd.DataFrame, features: list[str]) -> dict:
    categories = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    numbers = [name for name in frame if name not in categories and name not in features]
    of_text, of_picture = ([name for name in features if name.startswith(kind)] for kind in ("text", "image"))

    def prepared(*, scaled: bool):
        one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=5, sparse_output=False)
        gaps = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()) if scaled else "passthrough"
        return make_column_transformer(
            (gaps, numbers), (one_hot, categories),
            *[(Normalizer() if scaled else "passthrough", some) for some in (of_text, of_picture) if some],
        )  # fmt: skip

    kind = lightgbm.LGBMRegressor if is_number else lightgbm.LGBMClassifier
    linear = RidgeCV(np.logspace(-3, 5, 17)) if is_number else LogisticRegressionCV(Cs=10, max_iter=500, cv=3)
    boosted = {
        f"lightgbm {rate}": (
            prepared(scaled=False),
            kind(n_estimators=1000, learning_rate=rate, n_jobs=1, verbose=-1, random_state=0, colsample_bytree=0.5),
        )
        for rate in (0.03, 0.1)
    }
    return {**boosted, "linear": (prepared(scaled=True), linear)}


def scores(is_number: bool, truth: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    if is_number:
        return {"mae": mean_absolute_error(truth, answers), "r2": r2_score(truth, answers)}
    return {"accuracy": accuracy_score(truth, answers), "f1": f1_score(truth, answers, average="macro")}


def fit_both(
    table: datasets.Dataset, targets: list[str], options: dict, seed: int, folder: Path, variants: list[str]
) -> tuple:
    """Target -> variant -> scores of `fit`; the plan of all columns; split -> rows of the training on all columns."""
    found: dict = {target.split(":")[0]: {} for target in targets}
    full, splits = None, None
    for variant in variants:
        ignored = {}
        if full is not None:
            kinds = ("number", "date", "category")
            ignored = {column.name: "ignore" for column in full.plan.columns if column.role in kinds}
        began, wall = time.process_time(), time.monotonic()
        result = fit(
            table, targets, folder / variant, report=False, columns=ignored, say=str,
            training={"report_to": "none", "disable_tqdm": True, "seed": seed}, **options,
        )  # fmt: skip
        seconds = {"cpu_seconds": time.process_time() - began, "seconds": time.monotonic() - wall}
        for task in result.plan.targets:
            start = f"test_{task.task['name']}_"
            own = {key.removeprefix(start): x for key, x in result.metrics["test"].items() if key.startswith(start)}
            found[task.task.get("column", task.task["name"])][f"fit, {variant}"] = {**own, **seconds}
        if full is None:
            full, recipe = result, result.plan.recipe
            splits = load_data(recipe, training_arguments(recipe)).splits
    return found, full.plan, splits


def compare(
    name: str, table: datasets.Dataset, targets: list[str], options: dict, seed: int, rows: int | None = None
) -> dict:
    """Target -> method -> scores on the test rows."""
    table = table.shuffle(seed=seed)
    table = table.select(range(min(rows or len(table), len(table))))
    # What the numbers and categories add, where there are other inputs too.
    variants = ["all columns", "without the table"] if name == "movies" else ["all columns"]
    with tempfile.TemporaryDirectory() as folder:
        found, plan, splits = fit_both(table, targets, options, seed, Path(folder), variants)
        parts = {split: rows.to_pandas() for split, rows in splits.items()}
        by_role = {role: [c.name for c in plan.columns if c.role == role] for role in ("text", "image")}
        features = {split: columns_of(rows, plan) for split, rows in parts.items()}
        names: list[str] = []
        for split, rows in parts.items():
            made = {}
            if by_role["text"]:
                joined = rows[by_role["text"]].fillna("").astype(str).agg(" ".join, axis=1).tolist()
                made["text"] = text_features(options["text"], joined)
            for column in by_role["image"]:
                made[f"image {column}"] = image_features(options["vision"], splits[split][column])
            frames = [pd.DataFrame(x, index=rows.index).add_prefix(f"{kind} feature ") for kind, x in made.items()]
            names = [column for frame in frames for column in frame]
            features[split] = pd.concat([features[split], *frames], axis=1)
    for task in plan.targets:
        column, is_number = task.task.get("column", task.task["name"]), task.task["kind"] == "regression"
        labelled = {split: rows[column].notna().to_numpy() for split, rows in parts.items()}
        frames = {split: features[split][labelled[split]] for split in parts}
        truth = {split: rows[column][labelled[split]].to_numpy() for split, rows in parts.items()}
        if not is_number:
            truth = {split: values.astype(str) for split, values in truth.items()}
        best, headline = None, "r2" if is_number else "accuracy"
        for method, (prepare, model) in baselines(is_number, frames["train"], names).items():
            inputs = {"train": prepare.fit_transform(frames["train"])}
            inputs |= {split: prepare.transform(frames[split]) for split in ("validation", "test")}
            more = {}
            if method.startswith("lightgbm"):
                stop = lightgbm.early_stopping(50, verbose=False)
                more = {"eval_set": [(inputs["validation"], truth["validation"])], "callbacks": [stop]}
            began = time.process_time()
            model.fit(inputs["train"], truth["train"], **more)
            chosen = scores(is_number, truth["validation"], model.predict(inputs["validation"]))[headline]
            tested = scores(is_number, truth["test"], model.predict(inputs["test"]))
            found[column][method] = {**tested, "cpu_seconds": time.process_time() - began}
            if best is None or chosen > best[0]:
                best = (chosen, method)
        found[column]["chosen baseline"] = {**found[column][best[1]], "method": best[1]}
        constant = pd.Series(truth["train"]).mean() if is_number else pd.Series(truth["train"]).mode()[0]
        found[column]["constant"] = scores(is_number, truth["test"], np.full(len(truth["test"]), constant))
    return found


def markdown(results: dict) -> str:
    """The mean and the standard deviation over the seeds, as a table."""
    methods = ["fit, all columns", "fit, without the table", "lightgbm 0.03", "lightgbm 0.1", "linear", "constant"]
    lines = ["| table, target | score | " + " | ".join(methods) + " |", "|---|---|" + "--:|" * len(methods)]
    for name, by_seed in results.items():
        for target in next(iter(by_seed.values())):
            score = "mae" if "mae" in by_seed["0"][target]["constant"] else "accuracy"
            cells = []
            for method in methods:
                found = [seed[target][method][score] for seed in by_seed.values() if method in seed[target]]
                found = [100 * value for value in found] if score == "accuracy" else found
                digits = 1 if not found or np.mean(found) > 10 else 3
                cells.append(f"{np.mean(found):.{digits}f} ± {np.std(found):.{digits}f}" if found else "")
            lines.append(f"| {name}, {target} | {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"{', '.join(READERS)}, breast_cancer, wine, diabetes, digits")
    parser.add_argument("--data", type=Path, help="the file or folder of the table, if it is not in scikit-learn")
    parser.add_argument("--text", help="text encoder, by Hub id or folder, for tables with texts")
    parser.add_argument("--vision", help="vision encoder, by Hub id or folder, for tables with pictures")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--rows", type=int, help="so many of the shuffled rows; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    for name in args.tables:
        table, targets = READERS[name](args.data) if name in READERS else read_scikit_learn(name)
        options = {"preset": args.preset, "text": args.text, "vision": args.vision}
        options |= {"group": "family"} if name == "emoji" else {}
        for seed in args.seeds:
            found = compare(name, table, targets, options, seed, args.rows)
            results = json.loads(args.output.read_text()) if args.output.exists() else {}
            results.setdefault(name, {})[str(seed)] = found
            args.output.write_text(json.dumps(results, indent=1) + "\n")
            print(name, seed, json.dumps(found, indent=1), flush=True)
    print(markdown(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
