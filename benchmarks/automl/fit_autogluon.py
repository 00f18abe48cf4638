"""AutoGluon on the emoji data; see fit_mm_transformers.py, which says how to run it."""

import argparse
import json
import time
from pathlib import Path

import pandas
from autogluon.multimodal import MultiModalPredictor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--encoders", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    frames = {}
    for split in ("train", "validation"):
        files = sorted(args.data_dir.rglob(f"*{split}*.parquet"))
        frame = pandas.concat(pandas.read_parquet(file) for file in files)
        frame["image"] = frame["image"].map(lambda cell: cell["bytes"])
        frames[split] = frame[["text", "image", "group"]]
    start = time.time()
    folder = str(args.output.with_suffix(""))
    predictor = MultiModalPredictor(label="group", problem_type="multiclass", eval_metric="accuracy", path=folder)
    predictor.fit(
        frames["train"],
        tuning_data=frames["validation"],
        column_types={"text": "text", "image": "image_bytearray"},
        hyperparameters={
            "model.names": ["clip"],
            "model.clip.checkpoint_name": str(args.encoders / "clip"),
            "model.clip.train_transforms": ["resize_shorter_side", "center_crop"],
            "model.clip.max_text_len": 32,
            "optim.max_epochs": args.epochs,
            "optim.lr": args.learning_rate,
            "optim.lr_choice": "single_stage",
            "optim.val_check_interval": 1.0,
            "optim.patience": 1000,
            "optim.top_k": 1,
            "env.batch_size": args.batch_size,
            "env.per_gpu_batch_size": args.batch_size,
            "env.accelerator": "cpu",
            "env.precision": 32,
            "env.num_workers": 0,
        },
        seed=0,
    )
    events = EventAccumulator(str(predictor.path))
    events.Reload()
    name = next(tag for tag in events.Tags()["scalars"] if tag.startswith("val_accuracy"))
    points = [[round(event.wall_time - start, 1), event.value] for event in events.Scalars(name)]
    args.output.write_text(json.dumps({"curve": points}))
    print(points)


if __name__ == "__main__":
    main()
