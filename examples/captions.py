"""
Captions by a language model: where do pictures enter best? Behind its layers, inside, or as a prefix.

A language model writes the captions of each picture after a prompt, and answers questions about it by heads. Printed
are loss, BLEU and chrF of test rows with their own picture, without any, and with the picture of another row; how often
the right caption has a lower perplexity than a wrong one, and is likelier with its own picture than with another; and
the accuracy of the heads beside that of a linear model.

    python captions.py --text HuggingFaceTB/SmolLM2-135M --vision google/vit-base-patch16-224-in21k \\
        --data stamps --captions text german --labels category --fusion inside

The data are train.parquet and test.parquet with columns of pictures, captions and labels, such as those of
stamps/build_dataset.py. Each call adds one line to results.jsonl and prints the means over the seeds so far.
"""

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging

from mm_transformers import (
    Classification,
    FeatureCache,
    Generation,
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.analysis.contrastive import contrastive_accuracy, log_perplexities
from mm_transformers.training.linear_start.study import Study


FUSIONS = {
    "behind": lambda args: {"num_fusion_layers": 2},
    "inside": lambda args: {"num_fusion_layers": 1, "fusion_layers_every": args.every},
    "prefix": lambda args: {"fusion_type": "prefix"},
}
METRICS = ("loss", "bleu", "chrf")


def read_rows(args: argparse.Namespace, split: str, most: int | None) -> datasets.Dataset:
    """Rows with a prompt as text, a picture, captions and labels."""
    rows = datasets.Dataset.from_parquet(str(args.data / f"{split}.parquet"))
    columns = [*args.captions, *args.labels]
    for column in columns:
        if column not in rows.column_names:
            raise SystemExit(f"{split}.parquet has no column {column!r}; choose by --captions and --labels.")
    kept = [
        {"prompt": args.prompt, "image": row["image"], **{column: row[column] for column in columns}}
        for row in rows
        if row["image"] is not None and row[args.captions[0]]
    ]
    return datasets.Dataset.from_list(kept[:most], features=features_of(rows, columns))


def features_of(rows: datasets.Dataset, columns: Sequence[str]) -> datasets.Features:
    text = datasets.Value("string")
    return datasets.Features({"prompt": text, "image": rows.features["image"], **dict.fromkeys(columns, text)})


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
    return datasets.Dataset.from_list(made, features=rows.features)


def in_pairs(rows: datasets.Dataset, column: str, seed: int) -> tuple[datasets.Dataset, list[str]]:
    """
    Rows in pairs of different captions, and for each row the caption of the other.

    A model that ignores the pictures prefers the same caption twice, so it is right in half of the rows.
    """
    captions, left = rows[column], np.random.default_rng(seed).permutation(len(rows)).tolist()
    numbers: list[int] = []
    while left:
        first = left.pop()
        if not captions[first]:
            continue
        second = next((i for i in left if captions[i] and captions[i] != captions[first]), None)
        if second is not None:
            left.remove(second)
            numbers += [first, second]
    wrong = [captions[numbers[place ^ 1]] for place in range(len(numbers))]
    return rows.select(numbers), wrong


def own_picture_preferred(trainer: MMTrainer, pairs: datasets.Dataset, column: str) -> float:
    """
    The share of captions that are likelier with their own picture than with that of the other row of the pair.

    Likely captions have no advantage here, since each is compared with itself.
    """
    cells = list(pairs["image"])
    others = [{**row, "image": cells[place ^ 1]} for place, row in enumerate(pairs)]
    swapped = datasets.Dataset.from_list(others, features=pairs.features)
    own, other = (caption_losses(trainer, rows, column) for rows in (pairs, swapped))
    return float(((own < other) + 0.5 * (own == other)).mean())


def caption_losses(trainer: MMTrainer, rows: datasets.Dataset, column: str) -> np.ndarray:
    """(rows,): the mean loss of the tokens of each caption."""
    collator = trainer.collator_for(rows)
    batches = (rows.select(range(i, min(i + 32, len(rows)))) for i in range(0, len(rows), 32))
    found = [log_perplexities(trainer.fused_model, collator(list(batch)), column) for batch in batches]
    return torch.cat(found).cpu().numpy()


def make_tasks(args: argparse.Namespace, processor: MMTransformerProcessor, train: datasets.Dataset) -> list:
    """One task that writes per column of captions, one head per column of labels."""
    tasks: list = []
    for column in args.captions:
        # Tokens before the answer tell the languages apart.
        start = processor.tokenizer(f" ({column}):", add_special_tokens=False)["input_ids"]
        ids = start if len(args.captions) > 1 else None
        tasks.append(Generation(column, max_length=args.max_length, decoder_start_ids=ids))
    for column in args.labels:
        tasks.append(Classification(column, labels=sorted({label for label in train[column] if label})))
    return tasks


def with_adapters(model: MMTransformerForMultiTask, args: argparse.Namespace):
    from peft import LoraConfig, get_peft_model

    pattern = rf".*text_model.*({'|'.join(args.lora_modules)})"
    return get_peft_model(model, LoraConfig(r=16, target_modules=pattern, modules_to_save=model.new_modules))


def train_model(args: argparse.Namespace, train: datasets.Dataset, test: datasets.Dataset) -> tuple[MMTrainer, float]:
    """The trainer of a trained model, and the seconds of its steps alone."""
    processor = MMTransformerProcessor.from_encoders(text=args.text, vision=args.vision)
    model = MMTransformerForMultiTask.from_encoders(
        text=args.text,
        vision=args.vision,
        tasks=make_tasks(args, processor, train),
        freeze=["vision", "text"] if args.language_model == "frozen" else ["vision"],
        # Rows of this data all have a picture, and the loss without one is measured, not trained.
        modality_dropout=args.modality_dropout,
        dtype={"text": "bfloat16" if args.bf16 and args.language_model == "frozen" else "float32"},
        **FUSIONS[args.fusion](args),
    )
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
            bf16=args.bf16 and args.language_model != "frozen",
            # The test rows are read once, at the end.
            eval_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=MMDataCollator(processor, model.config, text_column="prompt"),
        processing_class=processor,
        train_dataset=train,
        eval_dataset=test,
        feature_cache=FeatureCache(args.output_dir / "features"),
    )
    trainer.study = Study(test)
    return trainer, trainer.train().metrics["train_runtime"]


def measure(args: argparse.Namespace, trainer: MMTrainer, test: datasets.Dataset) -> dict[str, float]:
    """Name -> figure: "text bleu, no picture", "category accuracy", ..."""
    scores = {}
    for kind in ("right", "no", "shuffled"):
        rows = with_pictures(test, kind, args.seed)
        metrics = trainer.evaluate(rows)
        for column in args.captions:
            scores |= {f"{column} {name}, {kind} picture": metrics[f"eval_{column}_{name}"] for name in METRICS}
            pairs, wrong = in_pairs(rows, column, args.seed)
            accuracy = contrastive_accuracy(trainer.fused_model, trainer.collator_for(pairs), pairs, column, wrong)
            scores[f"{column} contrastive accuracy, {kind} picture"] = accuracy
            if kind == "right":
                scores[f"{column} accuracy, own picture or another"] = own_picture_preferred(trainer, pairs, column)
        for column in args.labels:
            scores[f"{column} accuracy, {kind} picture"] = metrics[f"eval_{column}_accuracy"]
    for column in args.labels:
        scores[f"{column} accuracy, linear model"] = trainer.study.verdicts[column].linear
    return scores


def alike(results: Sequence[dict]) -> list[dict]:
    """The results with the settings of the last one, but for the fusion and the seed; the newest of equal runs."""

    def others(result: dict) -> dict:
        return {name: value for name, value in result["settings"].items() if name not in ("fusion", "seed")}

    found = {
        (result["settings"]["fusion"], result["settings"]["seed"]): result
        for result in results
        if others(result) == others(results[-1])
    }
    return list(found.values())


def summary(results: Sequence[dict]) -> Table:
    """Means and standard deviations over the seeds, one column per way of the fusion."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for result in results:
        fusion = result["settings"]["fusion"]
        way = f"{fusion} ({sum(other['settings']['fusion'] == fusion for other in results)} seeds)"
        for name, value in {**result["scores"], **result["costs"]}.items():
            found[name][way].append(value)
    ways = list(dict.fromkeys(way for by_way in found.values() for way in by_way))
    table = Table(title=f"Captions, language model {results[-1]['settings']['language_model']}")
    table.add_column("score")
    for way in ways:
        table.add_column(way, justify="right")
    for name, by_way in found.items():
        scale, digits = (100, 1) if "accuracy" in name else (1, 2 if "loss" in name else 1)
        cells = [scale * np.array(by_way.get(way, [])) for way in ways]
        table.add_row(name, *(f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" if len(x) else "" for x in cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a decoder-only language model: Hub id or folder")
    parser.add_argument("--vision", required=True, help="a vision encoder: Hub id or folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of train.parquet and test.parquet")
    parser.add_argument("--fusion", choices=list(FUSIONS), default="inside", help="where pictures enter (%(default)s)")
    parser.add_argument("--every", type=int, default=4, help="inside: before every n-th layer (%(default)s)")
    parser.add_argument("--language_model", choices=["frozen", "lora", "trained"], default="frozen")
    parser.add_argument("--bf16", action="store_true", help="a frozen language model in bfloat16, or autocast")
    parser.add_argument("--lora_modules", nargs="+", default=["q_proj", "v_proj"], help="of the language model")
    parser.add_argument("--captions", nargs="+", default=["text"], help="the columns to write (%(default)s)")
    parser.add_argument("--labels", nargs="*", default=[], help="columns that heads answer (none by default)")
    parser.add_argument("--prompt", default="A drawing of", help="the text before the captions (%(default)r)")
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
    start = time.perf_counter()
    set_seed(args.seed)
    train, test = read_rows(args, "train", args.train_rows), read_rows(args, "test", args.test_rows)
    trainer, seconds = train_model(args, train, test)
    scores = measure(args, trainer, test)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"text": Path(args.text).name, "vision": Path(args.vision).name}
    result = {
        "settings": {name: value for name, value in settings.items() if name not in ("data", "output_dir")},
        "scores": scores,
        "costs": {
            "seconds per step": seconds / trainer.state.global_step,
            "peak memory (GB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # kB on Linux
            "trained parameters (million)": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) / 1e6,
        },
        "rows": {"train": len(train), "test": len(test)},
        "steps": trainer.state.global_step,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "results.jsonl"
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
    Console(width=160).print(summary(alike([json.loads(line) for line in file.read_text().splitlines()])))
    print(f"Wrote {file}, in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
