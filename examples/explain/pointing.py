"""
Do explanations point at what decides? On data where it is known: the picture is one quarter of a larger one of
blotches, and one word of the message, with the picture, decides the topic, another the sentiment.

    python examples/explain/pointing.py --output pointing.json
    python examples/explain/pointing.py --fusion_types cross_attention --vision resnet --steps 600

For each kind of fusion a small model is trained; then, for each method and on the test rows that it gets right:

- image hit: the most relevant pixel is in the right quarter (chance: 25%);
- image share: the share of the relevance that is in it (chance: 25%);
- word hit: the most relevant word is the one that decides (chance: one over the number of words);
- AUC: the probability of the answer while 0 to 90% of words and patches go, the most relevant first (less is better),
  or the least relevant first (more is better).

With --figure, the first test rows are drawn too.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, ResNetConfig, TrainingArguments, ViTConfig, set_seed
from transformers.utils import logging

from mm_transformers import Classification, MMTrainer, MMTransformerConfig, MMTransformerForMultiTask
from mm_transformers.analysis import explain, faithfulness
from mm_transformers.cli.demo_model import make_processor
from mm_transformers.data.embedded import TASK_LABELS, load_pointing_dataset


TASKS = ("topic", "sentiment")
METHODS = ("chefer", "gradient_attention", "rollout", "attention", "integrated_gradients", "random")


def train(data, processor, fusion_type: str, vision: str, steps: int, seed: int):
    set_seed(seed)
    width = dict(hidden_size=64, num_attention_heads=4, intermediate_size=128, initializer_range=0.1)
    tokenizer = processor.tokenizer
    config = MMTransformerConfig(
        text_config=BertConfig(
            **width, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=ViTConfig(**width, num_hidden_layers=2, image_size=64, patch_size=8)
        if vision == "vit"
        else ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"),
        fusion_type=fusion_type,
        num_fusion_layers=2,
        initializer_range=0.1,
        tasks=[Classification(task, labels=TASK_LABELS[task]) for task in TASKS],
    )  # fmt: skip
    arguments = TrainingArguments(
        "pointing-training",
        max_steps=steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 2),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=steps,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = MMTrainer(
        MMTransformerForMultiTask(config), arguments, processing_class=processor, train_dataset=data["train"]
    )
    trainer.train()
    metrics = trainer.evaluate(data["test"])
    return trainer.model.eval(), {task: metrics[f"eval_{task}_accuracy"] for task in TASKS}


def measure(model, processor, rows: list[dict], task: str, method: str, seed: int) -> dict[str, float]:
    inputs = [{"text": row["text"], "image": row["image"]} for row in rows]
    found = explain(model, processor, inputs, task, method, seed=seed)
    hits, shares, words, chances = [], [], [], []
    for row, explanation in zip(rows, found, strict=True):
        (image,) = explanation.images
        left, top, right, bottom = row["box"]
        x, y = image.peak()
        hits.append(left <= x < right and top <= y < bottom)
        shares.append(image.box_share(row["box"]))
        if row[f"{task}_word"]:
            start, end = row[f"{task}_word"]
            best = max(explanation.words, key=lambda word: word.relevance)
            words.append(best.start < end and best.end > start)
            chances.append(1 / len(explanation.words))
    curves = faithfulness(model, processor, inputs, task, method, seed=seed)
    return {
        "image hit": float(np.mean(hits)),
        "image share": float(np.mean(shares)),
        "word hit": float(np.mean(words)),
        "word chance": float(np.mean(chances)),
        "positive AUC": curves.positive_auc,
        "negative AUC": curves.negative_auc,
    }


def right_rows(model, processor, rows, task: str, num_rows: int) -> list[dict]:
    kept = []
    for row in rows:
        answer = explain(model, processor, {"text": row["text"], "image": row["image"]}, task, "random").answer
        if answer == row[task]:
            kept.append(row)
        if len(kept) == num_rows:
            break
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["cross_attention", "co_attention", "bottleneck", "merged", "late"]
    parser.add_argument("--fusion_types", nargs="+", default=kinds)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--vision", choices=["vit", "resnet"], default="vit")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--num_rows", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data, weights and order")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path, help="folder for pictures of explanations")
    args = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    console = Console(width=120)
    results: dict = {}
    for kind in args.fusion_types:
        accuracies, measured = [], {(task, method): [] for task in TASKS for method in args.methods}
        for seed in args.seeds:
            data = load_pointing_dataset(seed=seed)
            processor = make_processor(list(data["train"]["text"]), languages=())
            model, accuracy = train(data, processor, kind, args.vision, args.steps, seed)
            accuracies.append(accuracy)
            for task in TASKS:
                rows = right_rows(model, processor, data["test"], task, args.num_rows)
                for method in args.methods:
                    measured[task, method].append(measure(model, processor, rows, task, method, seed))
                if args.figure and seed == args.seeds[0]:
                    args.figure.mkdir(parents=True, exist_ok=True)
                    for number, row in enumerate(rows[:4]):
                        picture = explain(model, processor, {"text": row["text"], "image": row["image"]}, task).plot()
                        picture.savefig(args.figure / f"{kind}_{task}_{number}.png", dpi=120)
        told = ", ".join(f"{task} {100 * np.mean([one[task] for one in accuracies]):.1f}%" for task in TASKS)
        table = Table("task", "method", title=f"{kind}, {args.vision}: test accuracy {told}")
        for (task, method), runs in measured.items():
            if len(table.columns) == 2:
                for name in runs[0]:
                    table.add_column(name, justify="right")
            values = {name: [run[name] for run in runs] for name in runs[0]}
            spread = [f" ± {np.std(value):.2f}" if len(runs) > 1 else "" for value in values.values()]
            means = [f"{np.mean(value):.2f}" for value in values.values()]
            table.add_row(task, method, *(mean + sd for mean, sd in zip(means, spread, strict=True)))
        console.print(table)
        results[kind] = {
            "accuracies": accuracies,
            "methods": [{"task": task, "method": method, "runs": runs} for (task, method), runs in measured.items()],
        }
        if args.output:
            settings = {name: value for name, value in vars(args).items() if name not in ("output", "figure")}
            args.output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
