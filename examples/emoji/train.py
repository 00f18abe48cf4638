"""
Does the picture help? Trains a fused model, one of text alone and one of pictures alone on the emoji data set.

The keyword says something about an emoji, its picture says something else; the group that the emoji belongs to, and
its polarity where that is known, are to be told. No picture of the test split, nor one that differs from it in skin
tone, gender or direction only, is seen in training. The encoders are small and start from random weights, so this
needs neither a GPU nor the network; `--text` and `--vision` take pretrained ones instead.

    python build_dataset.py --npm_dir node_modules --output_dir emoji_data
    python train.py --data_dir emoji_data --output_dir emoji_results
"""

import argparse
import io
import json
import math
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.utils import logging

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


MODALITIES = {"fused": "keyword and picture", "text": "keyword alone", "image": "picture alone"}
SHUFFLED, MAJORITY = "fused, pictures shuffled", "always the commonest class"
COLUMNS = {"group": "group", "group_ambiguous": "group, ambiguous keywords", "polarity": "polarity"}

# Probability with which a keyword is left out in training: its rows would otherwise be known by heart.
TEXT_DROPOUT = 0.2
# The usual 0.02 is made for widths of 768; in so narrow a layer the pictures would be whispered.
INITIALIZER_RANGE = 0.1
# Largest turn (in radians), change of size and shift (as parts of the width) of a picture in training.
MAX_TURN, MAX_ZOOM, MAX_SHIFT = 0.25, 0.15, 0.06


def make_tasks(train: datasets.Dataset) -> list[Classification]:
    return [
        Classification("group", labels=sorted(set(train["group"]))),
        Classification("polarity", labels=["negative", "neutral", "positive"], column="polarity_class"),
    ]


def make_processor(texts: list[str], image_size: int) -> MMTransformerProcessor:
    """A WordPiece tokenizer trained on the texts, and an image processor that scales pixels to -1..1."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    image_processor = ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    return MMTransformerProcessor(image_processor=image_processor, tokenizer=tokenizer)


def make_model(args, modality: str, processor, tasks: list[Classification]) -> MMTransformerForMultiTask:
    """A new model; that of text alone has no vision encoder."""
    if args.text:
        vision = None if modality == "text" else args.vision
        return MMTransformerForMultiTask.from_encoders(
            text=args.text, vision=vision, tasks=tasks, fusion_type=args.fusion_type, task_weighting=args.task_weighting
        )
    text = BertConfig(
        vocab_size=len(processor.tokenizer), hidden_size=96, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=192, max_position_embeddings=32, initializer_range=INITIALIZER_RANGE,
    )  # fmt: skip
    vision = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    return MMTransformerForMultiTask(
        MMTransformerConfig(
            text_config=text,
            vision_config=None if modality == "text" else vision,
            tasks=tasks,
            task_weighting=args.task_weighting,
            fusion_type=args.fusion_type,
            num_fusion_layers=1,
            initializer_range=INITIALIZER_RANGE,
        )
    )


def load_data(path: Path, image_size: int | None) -> datasets.DatasetDict:
    """The splits, with pictures of `image_size` pixels, so that they are not made smaller anew in every epoch."""
    data = datasets.load_dataset(str(path))
    if image_size is None:
        return data
    resized: dict[bytes, bytes] = {}

    def resize(cell: dict) -> dict:
        if cell["bytes"] not in resized:
            picture = Image.open(io.BytesIO(cell["bytes"])).resize((image_size, image_size), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            resized[cell["bytes"]] = buffer.getvalue()
        return {"image": {"bytes": resized[cell["bytes"]], "path": None}}

    raw = data.cast_column("image", datasets.Image(decode=False))
    raw = raw.map(resize, input_columns="image", keep_in_memory=True, desc="Resizing pictures")
    return raw.cast_column("image", datasets.Image())


def only(modality: str, data: datasets.DatasetDict) -> datasets.DatasetDict:
    """The data as the models of a modality see them: without pictures, or with empty keywords."""
    if modality == "text":
        return data.remove_columns("image")
    if modality == "image":
        return data.map(lambda text: {"text": ""}, input_columns="text", keep_in_memory=True)
    return data


def augmented(rows: datasets.Dataset, drop_text: bool) -> datasets.Dataset:
    """Rows whose pictures are turned, zoomed and shifted at random, and whose keywords are now and then left out."""

    def augment(batch: dict[str, list]) -> dict[str, list]:
        if "image" in batch:
            batch["image"] = [move_at_random(picture) for picture in batch["image"]]
        if drop_text:
            batch["text"] = ["" if random.random() < TEXT_DROPOUT else text for text in batch["text"]]
        return batch

    return rows.with_transform(augment)


def move_at_random(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    angle = random.uniform(-MAX_TURN, MAX_TURN)
    scale = 1 / random.uniform(1 - MAX_ZOOM, 1 + MAX_ZOOM)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    x, y = (0.5 + random.uniform(-MAX_SHIFT, MAX_SHIFT)) * width, (0.5 + random.uniform(-MAX_SHIFT, MAX_SHIFT)) * height
    # From the middle of the new picture to (x, y) in the old one.
    matrix = (cos, -sin, x - cos * width / 2 + sin * height / 2, sin, cos, y - sin * width / 2 - cos * height / 2)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor="white"
    )


def train(args, modality: str, seed: int, data: datasets.DatasetDict, processor, tasks) -> MMTrainer:
    set_seed(seed)
    model = make_model(args, modality, processor, tasks)
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
    # Rows of text alone would have nothing left, and those of pictures alone have no keyword to lose.
    rows = augmented(data["train"], drop_text=modality == "fused")
    trainer = MMTrainer(model, arguments, processing_class=processor, train_dataset=rows)
    trainer.train()
    return trainer


def accuracies(predicted: dict[str, list[str]], rows: datasets.Dataset) -> dict[str, float]:
    """Column of the table -> accuracy; `predicted` gives the label of each row for each task."""
    is_right = {
        "group": np.array(predicted["group"]) == np.array(rows["group"]),
        "polarity": np.array(predicted["polarity"]) == np.array(rows["polarity_class"]),
    }
    return {
        "group": float(is_right["group"].mean()),
        "group_ambiguous": float(is_right["group"][np.array(rows["ambiguous"])].mean()),
        "polarity": float(is_right["polarity"][[label is not None for label in rows["polarity_class"]]].mean()),
    }


def evaluate(trainer: MMTrainer, rows: datasets.Dataset) -> dict[str, float]:
    logits = trainer.predict(rows).predictions
    tasks = trainer.model.config.get_tasks()
    return accuracies({name: [task.labels[i] for i in logits[name].argmax(-1)] for name, task in tasks.items()}, rows)


def shuffle_pictures(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """Every keyword with the picture of another row."""
    order = np.random.default_rng(seed).permutation(len(rows))
    donor = np.empty_like(order)
    donor[order] = np.roll(order, 1)  # one long cycle: no row keeps its own
    pictures = rows.select_columns("image").select(donor)
    return datasets.concatenate_datasets([rows.remove_columns("image"), pictures], axis=1)


def commonest(train: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
    """The accuracies of always giving the commonest label of the training split."""
    predicted = {}
    for task, column in {"group": "group", "polarity": "polarity_class"}.items():
        label = Counter(value for value in train[column] if value is not None).most_common(1)[0][0]
        predicted[task] = [label] * len(rows)
    return accuracies(predicted, rows)


def mean_and_std(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def make_table(results: dict[str, dict[str, list[float]]], counts: dict[str, int], split: str) -> Table:
    table = Table(title=f"Accuracy on the {split} split in %, mean ± standard deviation over seeds")
    table.add_column("what the model sees", style="bold", no_wrap=True)
    for column, title in COLUMNS.items():
        table.add_column(f"{title}\n({counts[column]:,} rows)", justify="right")
    for name, row in results.items():
        shown = [(100 * mean, 100 * std) for mean, std in map(mean_and_std, row.values())]
        table.add_row(name, *(f"{mean:.1f} ± {std:.1f}" if name != MAJORITY else f"{mean:.1f}" for mean, std in shown))
    return table


def draw_results(path: Path, results: dict[str, dict[str, list[float]]], split: str) -> None:
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.8 / len(results)
    for i, (name, row) in enumerate(results.items()):
        positions = [column + (i - (len(results) - 1) / 2) * width for column in range(len(row))]
        means, stds = zip(*map(mean_and_std, row.values()), strict=True)
        bars = axes.bar(positions, [100 * m for m in means], width, yerr=[100 * s for s in stds], label=name, capsize=2)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS.values())
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"Emoji never seen in training ({split} split); bars: standard deviation over seeds", fontsize=10)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("emoji_data"), help="what build_dataset.py wrote")
    parser.add_argument("--output_dir", type=Path, default=Path("emoji_results"), help="where to write (%(default)s)")
    parser.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="what to train on"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps, of 64 rows each (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(%(default)s; pretrained: try 5e-5)")
    parser.add_argument("--fusion_type", default="cross_attention", help="how keyword and picture meet (%(default)s)")
    parser.add_argument("--task_weighting", default="static", help="how tasks are weighed (%(default)s)")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="test", help="where to measure (%(default)s)"
    )
    parser.add_argument("--image_size", type=int, default=32, help="of the small encoders, in pixels (%(default)s)")
    parser.add_argument("--text", help="Hub id or folder of a pretrained text encoder; needs --vision")
    parser.add_argument("--vision", help="Hub id or folder of a pretrained vision encoder; needs --text")
    parser.add_argument("--workers", type=int, default=1, help="processes that read pictures (%(default)s)")
    args = parser.parse_args(arguments)
    if bool(args.text) != bool(args.vision):
        parser.error("--text and --vision must be given together.")
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

    data = load_data(args.data_dir, None if args.text else args.image_size)
    rows = data[args.split]
    if args.text:
        processor = MMTransformerProcessor.from_encoders(text=args.text, vision=args.vision)
    else:
        processor = make_processor(list(data["train"]["text"]), args.image_size)
    tasks = make_tasks(data["train"])

    results: dict[str, dict[str, list[float]]] = {}

    def add(name: str, values: dict[str, float]) -> None:
        for column in COLUMNS:
            results.setdefault(name, {}).setdefault(column, []).append(values[column])

    for modality in args.modalities:
        seen = only(modality, data)
        for seed in range(args.seeds):
            began = time.perf_counter()
            trainer = train(args, modality, seed, seen, processor, tasks)
            values = evaluate(trainer, seen[args.split])
            add(MODALITIES[modality], values)
            console.print(
                f"{MODALITIES[modality]}, seed {seed}: group {100 * values['group']:.1f} %, polarity "
                f"{100 * values['polarity']:.1f} %, in {time.perf_counter() - began:.0f} s"
            )
            if modality == "fused":
                add(SHUFFLED, evaluate(trainer, shuffle_pictures(rows, seed)))
                if seed == 0:
                    trainer.save_model(str(args.output_dir / "model"))
    add(MAJORITY, commonest(data["train"], rows))

    counts = {
        "group": len(rows),
        "group_ambiguous": sum(rows["ambiguous"]),
        "polarity": sum(label is not None for label in rows["polarity_class"]),
    }
    console.print(make_table(results, counts, args.split))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"settings": settings, "rows": counts, "accuracy": results, "seconds": time.perf_counter() - start}
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_results(args.output_dir / "results.png", results, args.split)
    console.print(f"Wrote results.json, results.png and model/ to {args.output_dir}, in {report['seconds']:.0f} s.")


if __name__ == "__main__":
    main()
