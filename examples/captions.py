"""
Captions by a language model: where do pictures enter best? Behind its layers, inside, or as a prefix.

A language model writes the caption of each picture after a prompt. Printed are loss, BLEU and chrF of test rows with
their own picture, without any, and with the picture of another row.

    python captions.py --text HuggingFaceTB/SmolLM2-135M --vision google/vit-base-patch16-224-in21k \\
        --data stamps --fusion inside

The data are train.parquet and test.parquet with a column of pictures and one of captions, such as those of
stamps/build_dataset.py.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging

from mm_transformers import (
    FeatureCache,
    Generation,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


FUSIONS = {
    "behind": lambda args: {"num_fusion_layers": 2},
    "inside": lambda args: {"num_fusion_layers": 1, "fusion_layers_every": args.every},
    "prefix": lambda args: {"fusion_type": "prefix"},
}
METRICS = ("loss", "bleu", "chrf")


def read_rows(args: argparse.Namespace, split: str, most: int | None) -> datasets.Dataset:
    """Rows with a prompt as text, a picture, and the caption that is to be written."""
    rows = datasets.Dataset.from_parquet(str(args.data / f"{split}.parquet"))
    if args.caption_column not in rows.column_names:
        raise SystemExit(f"{split}.parquet has no column {args.caption_column!r}; choose one by --caption_column.")
    made = [
        {"text": args.prompt, "image": row["image"], "caption": row[args.caption_column]}
        for row in rows
        if row["image"] is not None and row[args.caption_column]
    ]
    return datasets.Dataset.from_list(made[:most], features=features_of(rows))


def features_of(rows: datasets.Dataset) -> datasets.Features:
    text = datasets.Value("string")
    return datasets.Features({"text": text, "image": rows.features["image"], "caption": text})


def with_pictures(rows: datasets.Dataset, kind: str, seed: int) -> datasets.Dataset:
    """The rows with their "right" pictures, with "no" pictures, or with "shuffled" ones, none of which stays."""
    if kind == "right":
        return rows
    cells = list(rows["image"])
    if kind == "no":
        cells = [None] * len(cells)
    else:
        order = np.random.default_rng(seed).permutation(len(cells))
        moved = dict(zip(order, np.roll(order, 1), strict=True))
        cells = [cells[moved[i]] for i in range(len(cells))]
    made = [{**row, "image": cell} for row, cell in zip(rows, cells, strict=True)]
    return datasets.Dataset.from_list(made, features=features_of(rows))


def make_model(args: argparse.Namespace) -> MMTransformerForMultiTask:
    return MMTransformerForMultiTask.from_encoders(
        text=args.text,
        vision=args.vision,
        tasks=[Generation("caption", max_length=args.max_length)],
        freeze=["vision", "text"] if args.language_model == "frozen" else ["vision"],
        # Rows of this data all have a picture, and the loss without one is measured, not trained.
        modality_dropout=args.modality_dropout,
        **FUSIONS[args.fusion](args),
    )


def with_adapters(model: MMTransformerForMultiTask, args: argparse.Namespace):
    from peft import LoraConfig, get_peft_model

    pattern = rf".*text_model.*({'|'.join(args.lora_modules)})"
    return get_peft_model(model, LoraConfig(r=16, target_modules=pattern, modules_to_save=model.new_modules))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a decoder-only language model: Hub id or folder")
    parser.add_argument("--vision", required=True, help="a vision encoder: Hub id or folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of train.parquet and test.parquet")
    parser.add_argument("--fusion", choices=list(FUSIONS), default="inside", help="where pictures enter (%(default)s)")
    parser.add_argument("--every", type=int, default=4, help="inside: before every n-th layer (%(default)s)")
    parser.add_argument("--language_model", choices=["frozen", "lora", "trained"], default="frozen")
    parser.add_argument("--lora_modules", nargs="+", default=["q_proj", "v_proj"], help="of the language model")
    parser.add_argument("--caption_column", default="text", help="the column to write (%(default)s)")
    parser.add_argument("--prompt", default="A drawing of", help="the text before the caption (%(default)r)")
    parser.add_argument("--max_length", type=int, default=32, help="tokens of the longest caption (%(default)s)")
    parser.add_argument("--modality_dropout", type=float, default=0.1, help="share of pictures lost (%(default)s)")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps (%(default)s: never)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--train_rows", type=int, help="use the first rows only")
    parser.add_argument("--test_rows", type=int, help="use the first rows only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("captions"), help="where to write (%(default)s)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start, console = time.perf_counter(), Console()
    set_seed(args.seed)
    train, test = read_rows(args, "train", args.train_rows), read_rows(args, "test", args.test_rows)
    processor = MMTransformerProcessor.from_encoders(text=args.text, vision=args.vision)
    model = make_model(args)
    trained = with_adapters(model, args) if args.language_model == "lora" else model
    trainer = MMTrainer(
        trained,
        MMTrainingArguments(
            str(args.output_dir / "training"),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=0.05,
            seed=args.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=processor,
        train_dataset=train,
        eval_dataset=test,
        feature_cache=FeatureCache(args.output_dir / "features"),
    )
    trainer.train()
    scores = {}
    for kind in ("right", "no", "shuffled"):
        metrics = trainer.evaluate(with_pictures(test, kind, args.seed))
        scores[kind] = {name: metrics[f"eval_caption_{name}"] for name in METRICS}
    table = Table(title=f"{args.fusion}, language model {args.language_model}: {len(test)} test rows")
    for name in ("picture", *METRICS):
        table.add_column(name, justify="left" if name == "picture" else "right")
    for kind, found in scores.items():
        table.add_row(kind, f"{found['loss']:.3f}", f"{found['bleu']:.1f}", f"{found['chrf']:.1f}")
    console.print(table)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"settings": settings, "scores": scores, "seconds": round(time.perf_counter() - start)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Wrote results.json to {args.output_dir}, in {report['seconds']} s.")


if __name__ == "__main__":
    main()
