"""
Trains the models of `measure.py`, and stores their logits and vectors for held-out rows, so that figures need no model.

    python examples/trust/answers.py --stamps stamps_data --emoji emoji_data --styles emoji_style_data \
        --text encoders/minilm --vision encoders/lite0 --output trust

The folders are those of examples/stamps, examples/emoji (`build_dataset.py` and `build_styles.py`) and
examples/pretrained. Each held-out row is answered three times: whole, without its picture, and without its text. What
is stored is not computed again.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from real_data import import_script

from mm_transformers import (
    Classification,
    FeatureCache,
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    Task,
)
from mm_transformers.analysis.calibration.hidden_parts import rows_by_group


EXAMPLES = Path(__file__).resolve().parents[1]
WHOLE = {"missing_images": 0.0, "missing_texts": 0.0}


@dataclass
class Experiment:
    """
    Args:
        train, validation: rows of which some lack a part or a label.
        held_out: name -> whole rows. Those of equal length, in the same order, differ in style only.
        tasks: what is learned.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    held_out: dict[str, datasets.Dataset]
    tasks: list[Task]


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.cast_column("image", datasets.Image(decode=False))


def labels_of(rows: datasets.Dataset, column: str) -> list[str]:
    return sorted({label for label in rows[column] if label is not None})


def stamps(folder: Path, seed: int) -> Experiment:
    builder = import_script(EXAMPLES / "stamps/build_dataset.py")
    data, whole = (builder.load_split(folder / "all.parquet", seed, **kw) for kw in ({}, WHOLE))
    held_out = datasets.concatenate_datasets([whole["validation"], whole["test"]])
    train, validation = _split(data["train"], seed)
    labels = labels_of(held_out, "category")
    return Experiment(train, validation, {"stamps": held_out}, [Classification("category", labels=labels)])


def styles(folder: Path, seed: int) -> Experiment:
    """Models that have seen Google's drawings only; the held-out rows have those of another artist, too."""
    builder = import_script(EXAMPLES / "emoji/build_styles.py")
    data, whole = (builder.load_split(folder / "all.parquet", seed, rows=1000, **kw) for kw in ({}, WHOLE))
    labels = labels_of(whole["test"], "group")
    held_out = {"noto": whole["same_style"], "other artist": whole["test"]}
    train, validation = _split(data["train"], seed)
    return Experiment(train, validation, held_out, [Classification("group", labels=labels)])


def emoji(folder: Path, seed: int, unrated: int = 500) -> Experiment:
    """The group of an emoji, and how positive it is, a number that one row in eight has."""
    split = {name: undecoded(datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"))) for name in
             ("train", "validation", "test")}  # fmt: skip
    train = _sample(split["train"], unrated, seed)
    held_out = _sample(datasets.concatenate_datasets([split["validation"], split["test"]]), 500, seed)
    builder = import_script(EXAMPLES / "real_data.py")
    parts = builder.remove_cells(datasets.DatasetDict(train=train), seed, 0.1, 0.05, 0.0, "group")
    train, validation = _split(parts["train"], seed)
    tasks = [Classification("group", labels=labels_of(held_out, "group")), Regression("polarity", scale=2.0)]
    return Experiment(train, validation, {"emoji": held_out}, tasks)


def _sample(rows: datasets.Dataset, unrated: int, seed: int) -> datasets.Dataset:
    """All rows with a polarity, and some of the others."""
    rows = rows.shuffle(seed=seed)
    rated = [i for i, cell in enumerate(rows["polarity"]) if cell is not None]
    others = [i for i, cell in enumerate(rows["polarity"]) if cell is None][:unrated]
    return rows.select(sorted(rated + others))


def _split(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A tenth of the families for the choice of the weights; the rest trains."""
    families = sorted(set(rows["family"]))
    order = torch.randperm(len(families), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {families[i] for i in order[: len(families) // 10]}
    places: list[list[int]] = [[], []]
    for i, family in enumerate(rows["family"]):
        places[family in chosen].append(i)
    return rows.select(places[0]), rows.select(places[1])


def train(experiment: Experiment, encoders: dict[str, str], seed: int, folder: Path, cache: Path) -> MMTrainer:
    transformers.set_seed(seed)
    model = MMTransformerForMultiTask.from_encoders(
        **encoders,
        tasks=experiment.tasks,
        freeze=["text", "vision"],
        modality_dropout={"text": 0.15, "vision": 0.15},
    )
    options: dict[str, Any] = {"num_train_epochs": 6, "per_device_train_batch_size": 32, "seed": seed}
    trainer = MMTrainer(
        model,
        MMTrainingArguments(str(folder), report_to=[], disable_tqdm=True, save_total_limit=1, **options),
        processing_class=MMTransformerProcessor.from_encoders(**encoders),
        train_dataset=experiment.train,
        eval_dataset=experiment.validation,
        feature_cache=FeatureCache(cache),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def run(name: str, experiment: Experiment, foreign: datasets.Dataset, args: argparse.Namespace, seed: int) -> None:
    file = args.output / f"{name}-{seed}.pt"
    if file.is_file():
        return
    began, encoders = time.process_time(), {"text": str(args.text), "vision": str(args.vision)}
    folder = args.output / f"{name}-{seed}"
    if not (folder / "model.safetensors").is_file():
        train(experiment, encoders, seed, folder, args.output / "features")
    trained = time.process_time() - began
    model = MMTransformerForMultiTask.from_pretrained(folder).eval()
    collator = MMDataCollator(MMTransformerProcessor.from_pretrained(folder), model.config)
    strangers = foreign.select_columns(["text", "image"])
    grouped = partial(_grouped, model, collator, FeatureCache(args.output / "features"))
    found: dict[str, Any] = {
        "tasks": [task.to_dict() for task in experiment.tasks],
        "train": grouped(experiment.train.select(range(min(500, len(experiment.train)))), hide=False),
        "held_out": {split: grouped(rows) for split, rows in experiment.held_out.items()},
        "foreign": grouped(strangers),
    }
    torch.save(found, file)
    held_out = {split: len(rows) for split, rows in experiment.held_out.items()}
    print(f"{file}: {len(experiment.train)} training rows, {held_out}, {trained:.0f} CPU seconds of training, "
          f"{time.process_time() - began:.0f} in all.", flush=True)  # fmt: skip


def _grouped(
    model: Any, collator: MMDataCollator, cache: FeatureCache, rows: datasets.Dataset, hide: bool = True
) -> dict[str, Any]:
    """The rows of each group, whole ones also with hidden parts, as tensors only."""
    cached = cache.prepare(model, collator, rows, 64)
    return {group: part._asdict() for group, part in rows_by_group(model, cached, rows, hide, 64).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("stamps", "emoji", "styles", "text", "vision"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="a folder; see above")
    parser.add_argument("--output", type=Path, default=Path("trust"), help="folder for all results (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (%(default)s)")
    parser.add_argument("--only", nargs="*", default=["stamps", "emoji", "styles"], help="which data sets")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        data = {"stamps": stamps(args.stamps, seed), "emoji": emoji(args.emoji, seed),
                "styles": styles(args.styles, seed)}  # fmt: skip
        foreign = {"stamps": data["styles"].held_out["noto"], "emoji": data["stamps"].held_out["stamps"],
                   "styles": data["stamps"].held_out["stamps"]}  # fmt: skip
        for name in args.only:
            run(name, data[name], foreign[name].select(range(min(200, len(foreign[name])))), args, seed)


if __name__ == "__main__":
    main()
