"""
Does the picture help to translate? Keyword and picture of an emoji -> its German, French and Chinese name.

"face" is "grinsendes Gesicht", "Affengesicht" or "Vollmond mit Gesicht": the keyword leaves open which, the picture
does not. One decoder writes all three languages. Two questions are asked, each with the right picture, without one and
with that of another row, and of models that only ever saw keywords or only pictures:

- *new keyword*: of emoji that training shows, with keywords that it does not show with them;
- *new emoji*: of emoji (and their variants in skin tone, gender or direction) that training never shows. Their names
  mostly hold words that training never shows either, so few can be right to the letter.

And, in the style of CoMMuTE (https://arxiv.org/abs/2212.10140): is the right name likelier than that of another emoji
with the same keyword? Every pair is asked both ways, so that keywords alone have 50 %.

    python build_dataset.py --npm_dir node_modules --output_dir emoji_data
    python translate.py --data_dir emoji_data --output_dir emoji_translation
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from train import augmented, load_data, only, shuffle_pictures
from transformers import (
    BertConfig,
    ResNetConfig,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from mm_transformers import (
    Generation,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MultiTaskMetrics,
)
from mm_transformers.analysis.contrastive import contrastive_accuracy
from mm_transformers.cli.demo_model import make_processor
from mm_transformers.training.metrics.text_metrics import Bleu


LANGUAGES = ("german", "french", "chinese")
MODALITIES = {"fused": "keyword and picture", "text": "keyword alone", "image": "picture alone"}
NONE, SHUFFLED = "fused, no picture", "fused, pictures shuffled"
SPLITS = {"new_keyword": "new keyword of a known emoji", "new_emoji": "emoji never seen"}
MEASURES = {"exact_match": 100.0, "bleu": 1.0, "chrf": 1.0, "contrastive": 100.0}  # and by how much to multiply
# The usual 0.02 is made for widths of 768; in so narrow a layer the pictures would be whispered.
INITIALIZER_RANGE, WIDTH = 0.06, 128
MAX_LENGTH = 32


def make_model(modality: str, tokenizer) -> MMTransformerForMultiTask:
    text = dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_attention_heads=4, intermediate_size=2 * WIDTH,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, initializer_range=INITIALIZER_RANGE,
    )  # fmt: skip
    ends = dict(bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)
    vision = ResNetConfig(embedding_size=24, hidden_sizes=[48, 96, 128], depths=[1, 1, 1], layer_type="basic")
    starts = {language: [tokenizer.convert_tokens_to_ids(f"[{language}]")] for language in LANGUAGES}
    return MMTransformerForMultiTask(
        MMTransformerConfig(
            text_config=BertConfig(**text, num_hidden_layers=1),
            decoder_config=BertConfig(**text, **ends, num_hidden_layers=1, is_decoder=True),
            vision_config=None if modality == "text" else vision,
            num_fusion_layers=1,
            modality_dropout={"vision": 0.15} if modality == "fused" else 0.0,
            initializer_range=INITIALIZER_RANGE,
            tasks=[Generation(name, max_length=MAX_LENGTH, decoder_start_ids=start) for name, start in starts.items()],
        )
    )


def split_rows(data: datasets.DatasetDict) -> datasets.DatasetDict:
    """Holds out one keyword of every emoji that has three or more in the training split."""
    keywords = defaultdict(list)
    for i, emoji in enumerate(data["train"]["emoji"]):
        keywords[emoji].append(i)
    rng = random.Random(0)
    held_out = sorted(rng.choice(rows) for rows in keywords.values() if len(rows) >= 3)
    left = sorted(set(range(len(data["train"]))) - set(held_out))
    return datasets.DatasetDict(
        train=data["train"].select(left), new_keyword=data["train"].select(held_out), new_emoji=data["test"]
    )


def contrast_pairs(rows: datasets.Dataset) -> list[tuple[int, int]]:
    """Pairs of rows with one keyword and different names in all languages; no row is in two of them."""
    by_keyword = defaultdict(list)
    for i, text in enumerate(rows["text"]):
        by_keyword[text].append(i)
    names = list(zip(*(rows[language] for language in LANGUAGES), strict=True))
    pairs = []
    for numbers in by_keyword.values():
        while numbers:
            first = numbers.pop()
            partner = next(
                (j for j in numbers if all(a != b for a, b in zip(names[first], names[j], strict=True))), None
            )
            if partner is not None:
                numbers.remove(partner)
                pairs.append((first, partner))
    return pairs


def train(args, modality: str, seed: int, rows: datasets.Dataset, processor) -> MMTrainer:
    set_seed(seed)
    model = make_model(modality, processor.tokenizer)
    arguments = TrainingArguments(
        str(args.output_dir / "training"),
        max_steps=args.steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        weight_decay=0.05,
        dataloader_num_workers=args.workers,
        logging_steps=max(1, args.steps // 4),
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    # The commas between the words of Chinese are not to count.
    chinese = [Bleu(tokenize="zh", keep_in_memory=True), "chrf", "exact_match"]
    metrics = MultiTaskMetrics(model.config, processor, metrics={"chinese": chinese})
    trainer = MMTrainer(
        model,
        arguments,
        processing_class=processor,
        train_dataset=augmented(rows, drop_text=modality == "fused"),
        compute_metrics=metrics,
    )
    trainer.train()
    return trainer


def evaluate(trainer: MMTrainer, rows: datasets.Dataset) -> dict[str, dict[str, float]]:
    """Language -> measure -> value."""
    metrics = trainer.evaluate(rows)
    values = {
        language: {measure: metrics[f"eval_{language}_{measure}"] for measure in ("exact_match", "bleu", "chrf")}
        for language in LANGUAGES
    }
    pairs = contrast_pairs(rows)
    there, other = [i for pair in pairs for i in pair], [i for a, b in pairs for i in (b, a)]
    chosen = rows.select(there)
    for language in LANGUAGES:
        wrong = list(rows.select(other)[language])
        values[language]["contrastive"] = contrastive_accuracy(
            trainer.model, trainer.data_collator, chosen, language, wrong, batch_size=128
        )
    return values


def make_table(results: dict, split: str, language: str, num_rows: int, num_pairs: int) -> Table:
    title = f"{language.title()}, {SPLITS[split]}: {num_rows:,} rows, {num_pairs:,} pairs"
    table = Table(title=title, caption="mean ± standard deviation over seeds")
    table.add_column("what the model sees", style="bold", no_wrap=True)
    for measure in MEASURES:
        table.add_column(measure.replace("_", " "), justify="right")
    for name, row in results.items():
        cells = []
        for measure, factor in MEASURES.items():
            values = [factor * seed[language][measure] for seed in row[split]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        table.add_row(name, *cells)
    return table


def draw_results(path: Path, results: dict) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    panels = [(split, measure) for split in SPLITS for measure in ("chrf", "contrastive")]
    for axis, (split, measure) in zip(axes, panels, strict=True):
        width = 0.8 / len(results)
        for i, (name, row) in enumerate(results.items()):
            values = [[MEASURES[measure] * seed[language][measure] for seed in row[split]] for language in LANGUAGES]
            places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(LANGUAGES))]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            axis.bar(places, [statistics.mean(v) for v in values], width, yerr=spread, label=name, capsize=2)
        axis.set_xticks(range(len(LANGUAGES)), LANGUAGES)
        axis.set_ylim(0, 100)
        label = "chrF" if measure == "chrf" else "right name likelier (%)"
        axis.set_title(f"{SPLITS[split]}: {label}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if measure == "contrastive":
            axis.axhline(50, color="black", linestyle=":", linewidth=1)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("emoji_data"), help="what build_dataset.py wrote")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("emoji_translation"), help="where to write (%(default)s)"
    )
    parser.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="what to train on"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps, of 64 rows each (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(%(default)s)")
    parser.add_argument("--image_size", type=int, default=32, help="in pixels (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures (%(default)s)")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.steps < 1:
        parser.error("--seeds and --steps must be at least 1.")
    if not (args.data_dir / "train.parquet").is_file():
        parser.error(
            f"{args.data_dir} has no train.parquet; build it by: python build_dataset.py --output_dir {args.data_dir}"
        )
    return args


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start, console = time.perf_counter(), Console()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = split_rows(load_data(args.data_dir, args.image_size))
    texts = [text for column in ("text", *LANGUAGES) for text in data["train"][column]]
    processor = make_processor(texts, LANGUAGES, args.image_size)

    results: dict[str, dict[str, list]] = {}
    counts = {split: (len(data[split]), 2 * len(contrast_pairs(data[split]))) for split in SPLITS}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for modality in args.modalities:
        title, seen = MODALITIES[modality], only(modality, data)
        for seed in range(args.seeds):
            began = time.perf_counter()
            trainer = train(args, modality, seed, seen["train"], processor)
            for split in SPLITS:
                rows = seen[split]
                views = {title: rows}
                if modality == "fused":
                    views |= {NONE: rows.remove_columns("image"), SHUFFLED: shuffle_pictures(rows, seed)}
                    if seed == 0:
                        trainer.save_model(str(args.output_dir / "model"))
                for name, view in views.items():
                    results.setdefault(name, {}).setdefault(split, []).append(evaluate(trainer, view))
            german = {split: results[title][split][-1]["german"] for split in SPLITS}
            console.print(
                f"{title}, seed {seed}: German right to the letter "
                + ", ".join(
                    f"{100 * values['exact_match']:.1f} % ({SPLITS[split]})" for split, values in german.items()
                )
                + f", in {time.perf_counter() - began:.0f} s"
            )
            report = {"settings": settings, "rows": counts, "results": results, "seconds": time.perf_counter() - start}
            (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    for split, (num_rows, num_pairs) in counts.items():
        for language in LANGUAGES:
            console.print(make_table(results, split, language, num_rows, num_pairs))
    draw_results(args.output_dir / "results.png", results)
    console.print(f"Wrote {args.output_dir}, in {report['seconds']:.0f} s.")


if __name__ == "__main__":
    main()
