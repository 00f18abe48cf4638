"""
Writes the data set that comes with the package as Parquet files, with two small encoders and a recipe, to try the
commands on:

    python demo_recipe.py --output_dir demo_recipe
    mm-transformers train demo_recipe/recipe.yaml
    mm-transformers predict demo_recipe/out demo_recipe/test.parquet --output answers.csv
    mm-transformers compare-tasks demo_recipe/recipe.yaml --seeds 3 --output_dir comparison
"""

import argparse
from pathlib import Path

import torch
import yaml
from transformers import AutoModel

from mm_transformers.cli.demo_model import make_config, make_processor
from mm_transformers.data.embedded import TASK_LABELS, load_demo_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_recipe"), help="where to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of a training, of 64 rows each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of rows and weights (%(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = load_demo_dataset(seed=args.seed)
    processor = make_processor(data["train"]["text"])
    config = make_config(processor.tokenizer, "cross_attention", with_images=True)
    parts = {
        "text": (config.text_config, processor.tokenizer),
        "vision": (config.vision_config, processor.image_processor),
    }
    for name, (encoder_config, preprocessor) in parts.items():
        AutoModel.from_config(encoder_config).save_pretrained(args.output_dir / name)
        preprocessor.save_pretrained(args.output_dir / name)
    for split, rows in data.items():
        rows.select_columns(["text", "image", *TASK_LABELS]).to_parquet(args.output_dir / f"{split}.parquet")
    recipe = {
        "data": {split: f"{split}.parquet" for split in data},
        "model": {
            "text": "text", "vision": "vision", "num_fusion_layers": config.num_fusion_layers,
            "freeze": [],  # the encoders have new weights
            "initializer_range": config.initializer_range,
        },
        "tasks": [
            {"name": name, "kind": "classification", "labels": list(labels)} for name, labels in TASK_LABELS.items()
        ],
        "training": {
            "output_dir": "out", "max_steps": args.steps, "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 128, "learning_rate": 4e-3, "lr_scheduler_type": "cosine",
            "warmup_steps": min(20, args.steps // 2), "weight_decay": 0.01, "eval_strategy": "steps", "eval_steps": 100,
            "save_strategy": "steps", "save_steps": 100, "save_total_limit": 1, "logging_steps": 20, "seed": args.seed,
        },
    }  # fmt: skip
    (args.output_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    print(f"Wrote rows, encoders and recipe.yaml to {args.output_dir}.")


if __name__ == "__main__":
    main()
