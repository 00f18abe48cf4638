"""
Ludwig in the race; `race.py --ludwig PYTHON` calls it, in an environment of its own:

    python3.12 -m venv ludwig && ludwig/bin/pip install ludwig==0.17.10

It trains the same text encoder. It cannot load the vision encoder, so a picture is the vector of its mean outputs, as
the cheap methods get it, standardised: zeros where there is none.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas
from ludwig.api import LudwigModel


def read(file: Path, label: str) -> pandas.DataFrame:
    frame = pandas.read_parquet(file)
    frame["text"] = frame["text"].fillna("")
    return frame[["text", "image_means", label]]


def standardise(frames: dict[str, pandas.DataFrame]) -> None:
    """Adds `picture`: the vectors with mean 0 and deviation 1 in the training rows; a missing picture stays zeros."""
    known = np.stack([vector for vector in frames["train"].image_means if np.any(vector)])
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    for frame in frames.values():
        vectors = [(vector - mean) / deviation if np.any(vector) else vector for vector in frame["image_means"]]
        frame["picture"] = [" ".join(f"{value:.6g}" for value in vector) for vector in vectors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="train.parquet, ...; answers.json is written here")
    parser.add_argument("--label", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vision", type=Path, help="not used")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    frames = {file.stem: read(file, args.label) for file in sorted(args.folder.glob("*.parquet"))}
    standardise(frames)
    text = str(args.text.resolve())
    config = {
        "input_features": [
            {
                "name": "text",
                "type": "text",
                "encoder": {
                    "type": "auto_transformer",
                    "pretrained_model_name_or_path": text,
                    "reduce_output": "mean",
                    "trainable": True,
                },
                "preprocessing": {"tokenizer": "hf_tokenizer", "pretrained_model_name_or_path": text},
            },
            {
                "name": "picture",
                "type": "vector",
                "encoder": {"type": "dense", "num_layers": 1, "output_size": 384},  # passthrough counts one column
                "preprocessing": {"vector_size": len(frames["train"]["picture"][0].split())},
            },
        ],
        "combiner": {"type": "concat"},
        "output_features": [{"name": args.label, "type": "category"}],
        "trainer": {
            "epochs": 10,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "optimizer": {"type": "adamw"},
            "early_stop": 3,
            "validation_field": args.label,
            "validation_metric": "loss",
            "evaluate_training_set": False,
        },
        "backend": {"type": "local"},
    }
    began, cpu = time.perf_counter(), time.process_time()
    model = LudwigModel(config)
    model.train(
        training_set=frames["train"],
        validation_set=frames["validation"],
        output_directory=str(args.folder / "model"),
        skip_save_processed_input=True,
        skip_save_log=True,
        random_seed=args.seed,
    )
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    answers = {}
    for name, frame in frames.items():
        if name != "train":
            predictions, _ = model.predict(dataset=frame, skip_save_predictions=True)
            answers[name] = predictions[f"{args.label}_predictions"].tolist()
    found = {"answers": answers, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "chosen": {}}
    (args.folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
