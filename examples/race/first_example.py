"""
The first example of README.md on the stamps, beside a logistic regression on the outputs of both encoders:

    python examples/race/first_example.py --stamps stamps_data --text encoders/minilm --vision encoders/lite0 \
        --output first_example.json --splits 5
    python docs/render.py --take first_example=first_example.json

Both get the training rows only. Three-fold cross-validation chooses strength and class weights of the logistic
regression by macro F1; then it is fitted on all training rows. A feature cache saves time and changes no weight. What
has been measured is not measured again.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from baselines import FeatureStore
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


sys.path.insert(0, str(Path(__file__).parent.parent / "stamps"))
from build_dataset import load_split


GRID = {"C": [0.1, 1, 10, 100, 1000], "class_weight": [None, "balanced"]}


def logistic_regression(data: datasets.DatasetDict, labels: list[str], store: FeatureStore) -> dict[str, float]:
    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = data[split].cast_column("image", datasets.Image(decode=False))
        rows = rows.filter(lambda row: row["category"] is not None)
        found, _ = store.features(rows)
        return found.matrix(("text", "image")), np.array([labels.index(label) for label in rows["category"]])

    began = time.process_time()
    model = GridSearchCV(LogisticRegression(max_iter=2000), GRID, cv=3, scoring="f1_macro").fit(*features("train"))
    seconds = time.process_time() - began
    rows, expected = features("test")
    answers = model.predict(rows)
    f1 = f1_score(expected, answers, average="macro")
    return {"accuracy": float(accuracy_score(expected, answers)), "macro_f1": float(f1), "cpu_seconds": seconds}


def ours(
    data: datasets.DatasetDict, labels: list[str], text: Path, vision: Path, cache: Path, **options: Any
) -> dict[str, float]:
    tasks = [Classification("category", labels=labels)]
    encoders = {"text": str(text), "vision": str(vision)}
    processor = MMTransformerProcessor.from_encoders(**encoders)
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks, **options)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        args = MMTrainingArguments(folder)
        trainer = MMTrainer(
            model, args, processing_class=processor, train_dataset=data["train"], feature_cache=cache / "features"
        )
        trainer.train()
        seconds = time.process_time() - began
        found = trainer.evaluate(data["test"])
    return {
        "accuracy": found["eval_category_accuracy"], "macro_f1": found["eval_category_f1"], "cpu_seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, required=True, help="folder of examples/stamps/build_dataset.py")
    parser.add_argument("--text", type=Path, required=True, help="folder of the text encoder")
    parser.add_argument("--vision", type=Path, required=True, help="folder of the vision encoder")
    parser.add_argument("--output", type=Path, default=Path("first_example.json"))
    parser.add_argument("--cache", type=Path, default=Path("race_cache"), help="folder for features (race_cache)")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--freeze", nargs="+", help="encoders that are not trained; by default as from_encoders does")
    args = parser.parse_args()
    options = {} if args.freeze is None else {"freeze": args.freeze}
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    store = FeatureStore(args.cache / "means", args.text, args.vision)
    for seed in range(args.splits):
        if str(seed) in results:
            continue
        data = load_split(args.stamps / "all.parquet", seed=seed)
        labels = sorted({label for label in data["train"]["category"] if label})
        results[str(seed)] = {
            "logistic regression": logistic_regression(data, labels, store),
            "README's first example": ours(data, labels, args.text, args.vision, args.cache, **options),
        }
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"split {seed}: {results[str(seed)]}", flush=True)


if __name__ == "__main__":
    main()
