"""
What if pictures are missing? Every task's score with none, some and all of the pictures of the test split missing, of
models trained with and without modality dropout, on the data set that comes with the package.

    python missing_pictures.py --output_dir missing_pictures
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from mm_transformers.cli.demo_model import make_config, make_processor, train
from mm_transformers.data.embedded import TASK_LABELS, TRANSLATIONS, best_possible_accuracy, load_demo_dataset


SHARES = (0.0, 0.3, 0.7, 1.0)
DROPOUT = {"no dropout": 0.0, "dropout 0.15": 0.15}
MEASURES = {**dict.fromkeys(TASK_LABELS, "accuracy"), **dict.fromkeys(TRANSLATIONS, "exact_match")}


def without_pictures(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """The rows, of which this share, drawn at random, have lost their pictures."""
    lost = set(np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))].tolist())
    raw = rows.cast_column("image", datasets.Image(decode=False))
    cells = [None if i in lost else cell for i, cell in enumerate(raw["image"])]
    return rows.remove_columns("image").add_column("image", cells, feature=datasets.Image())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("missing_pictures"), help="where to write (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="training steps, of 64 rows each (%(default)s)")
    args = parser.parse_args()
    if args.seeds < 1 or args.steps < 1:
        parser.error("--seeds and --steps must be at least 1.")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start, console = time.perf_counter(), Console()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in DROPOUT}
    for seed in range(args.seeds):
        data = load_demo_dataset(seed=seed)
        processor = make_processor([text for column in ("text", *TRANSLATIONS) for text in data["train"][column]])
        for name, dropout in DROPOUT.items():
            config = make_config(processor.tokenizer, "cross_attention", with_images=True, dropout=0.0)
            config.modality_dropout = {"vision": dropout}
            trainer = train(name, data, processor, config, args.steps, seed, args.output_dir / "training", console)
            for share in SHARES:
                metrics = trainer.evaluate(without_pictures(data["test"], share, seed))
                for task, measure in MEASURES.items():
                    scores = results[name].setdefault(task, {}).setdefault(f"{share:.0%}", [])
                    scores.append(metrics[f"eval_{task}_{measure}"])

    limits = best_possible_accuracy()
    table = Table(
        title="Test accuracy in % (of translations: right to the letter), mean ± standard deviation over seeds"
    )
    table.add_column("missing", style="bold", no_wrap=True)
    for task in MEASURES:
        table.add_column(task, justify="right")
    for name in DROPOUT:
        table.add_section()
        table.add_row(name, style="italic")
        for share in SHARES:
            cells = []
            for task in MEASURES:
                values = [100 * value for value in results[name][task][f"{share:.0%}"]]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
            table.add_row(f"{share:.0%}", *cells)
    table.add_section()
    # What is there is answered as well as from both, what is not as well as from the text.
    for share in SHARES:
        best = [(1 - share) * limits[task]["both"] + share * limits[task]["text"] for task in MEASURES]
        table.add_row(f"best, {share:.0%}", *(f"{100 * value:.1f}" for value in best), style="dim")
    console.print(table)

    figure, axes = plt.subplots(1, len(MEASURES), figsize=(3 * len(MEASURES), 3), layout="constrained", sharey=True)
    for axis, task in zip(axes, MEASURES, strict=True):
        for name in DROPOUT:
            means = [100 * statistics.mean(results[name][task][f"{share:.0%}"]) for share in SHARES]
            axis.plot([100 * share for share in SHARES], means, marker="o", label=name)
        best = [(1 - share) * limits[task]["both"] + share * limits[task]["text"] for share in SHARES]
        axis.plot(
            [100 * s for s in SHARES], [100 * b for b in best], color="#777777", linestyle=":", label="best possible"
        )
        axis.set(title=task, xlabel="pictures missing (%)", ylim=(0, 103))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(args.output_dir / "results.png", dpi=130)
    report = {"settings": {"seeds": args.seeds, "steps": args.steps}, "scores": results}
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Wrote results.json and results.png to {args.output_dir}, in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
