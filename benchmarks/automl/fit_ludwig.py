"""Ludwig on the emoji data; see fit_mm_transformers.py, which says how to run it."""

import argparse
import io
import json
import math
import time
from pathlib import Path

import pandas
from ludwig.api import LudwigModel
from ludwig.callbacks import Callback
from PIL import Image


class Curve(Callback):
    """Seconds since the start, and accuracy, after each epoch."""

    def __init__(self):
        self.start, self.points = 0.0, []

    def on_trainer_train_setup(self, trainer, save_path, is_coordinator):
        self.start = time.perf_counter()

    def on_eval_end(self, trainer, progress_tracker, save_path):
        accuracy = progress_tracker.validation_metrics["group"]["accuracy"][-1].value
        self.points.append([round(time.perf_counter() - self.start, 1), accuracy])


def read(data_dir: Path, split: str, pictures: Path, image_size: int) -> pandas.DataFrame:
    """A split with its pictures as files of the size that the encoder takes."""
    frame = pandas.concat(pandas.read_parquet(file) for file in sorted(data_dir.rglob(f"*{split}*.parquet")))
    pictures.mkdir(parents=True, exist_ok=True)
    paths: dict[bytes, str] = {}
    for cell in frame["image"]:
        if cell["bytes"] not in paths:
            paths[cell["bytes"]] = str(pictures / f"{split}_{len(paths)}.png")
            picture = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
            picture.resize((image_size, image_size), Image.Resampling.BICUBIC).save(paths[cell["bytes"]])
    frame["image"] = [paths[cell["bytes"]] for cell in frame["image"]]
    return frame[["text", "image", "group"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--encoders", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    folder = args.output.with_suffix("")
    frames = {split: read(args.data_dir, split, folder / "pictures", 64) for split in ("train", "validation")}
    steps = math.ceil(len(frames["train"]) / args.batch_size)
    text, vision = (str(args.encoders / "bert-vit" / name) for name in ("text", "vision"))
    # Ludwig makes pictures 224 pixels large for weights from a folder, so its ViT starts from new ones of its own.
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    tower = json.loads((Path(vision) / "config.json").read_text())
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
                "preprocessing": {
                    "tokenizer": "hf_tokenizer",
                    "pretrained_model_name_or_path": text,
                    "max_sequence_length": 32,
                },
            },
            {
                "name": "image",
                "type": "image",
                "encoder": {"type": "vit", "use_pretrained": False, "trainable": True, **{f: tower[f] for f in fields}},
                "preprocessing": {"height": 64, "width": 64, "num_channels": 3},
            },
        ],
        "combiner": {"type": "concat"},
        "output_features": [{"name": "group", "type": "category"}],
        "trainer": {
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "eval_batch_size": 128,
            "learning_rate": args.learning_rate,
            # One cosine over the whole training; by default it begins anew in each epoch.
            "learning_rate_scheduler": {"decay": "cosine", "warmup_fraction": 0.1, "t_0": steps * args.epochs},
            "optimizer": {"type": "adamw"},
            "early_stop": -1,
            "evaluate_training_set": False,
        },
        "backend": {"type": "local"},
    }
    curve = Curve()
    model = LudwigModel(config, callbacks=[curve])
    model.train(
        training_set=frames["train"],
        validation_set=frames["validation"],
        output_directory=str(folder),
        skip_save_processed_input=True,
        skip_save_log=True,
        random_seed=0,
    )
    args.output.write_text(json.dumps({"curve": curve.points}))
    print(curve.points)


if __name__ == "__main__":
    main()
