"""
Does it help to weigh tasks cleverly? Every way of weighting, on the data set that comes with the package, or on the
emoji of examples/emoji, with the same steps, seeds and rates.

    python task_weighting.py --output_dir task_weighting
    python task_weighting.py --emoji_data_dir emoji_data --output_dir task_weighting_emoji

Results are kept after each model; started again, the script goes on with those that are missing.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import datasets
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from mm_transformers.cli import demo_model
from mm_transformers.data.embedded import TASK_LABELS, TRANSLATIONS, load_demo_dataset
from mm_transformers.training.weighting import WEIGHTINGS


MEASURES = {**dict.fromkeys(TASK_LABELS, "accuracy"), **dict.fromkeys(TRANSLATIONS, "exact_match")}


class Embedded:
    """Three choices and two translations of the data set that comes with the package."""

    def __init__(self, args):
        self.args = args

    def scores(self, kind: str, seed: int) -> dict[str, float]:
        data = load_demo_dataset(seed=seed)
        texts = [text for column in ("text", *TRANSLATIONS) for text in data["train"][column]]
        processor = demo_model.make_processor(texts)
        config = demo_model.make_config(processor.tokenizer, "cross_attention", with_images=True)
        config.task_weighting = kind
        folder = self.args.output_dir / "training"
        trainer = demo_model.train(kind, data, processor, config, self.args.steps or 400, seed, folder)
        metrics = trainer.evaluate(data["test"])
        return {task: metrics[f"eval_{task}_{measure}"] for task, measure in MEASURES.items()}


class Emoji:
    """Group and polarity of emoji, from a keyword and a picture."""

    def __init__(self, args):
        sys.path.insert(0, str(Path(__file__).parent / "emoji"))
        import train as emoji

        options = ["--data_dir", str(args.emoji_data_dir), "--output_dir", str(args.output_dir)]
        self.emoji = emoji
        self.args = emoji.parse_arguments(options + (["--steps", str(args.steps)] if args.steps else []))
        self.data = emoji.load_data(self.args.data_dir, self.args.image_size)
        self.processor = emoji.make_processor(list(self.data["train"]["text"]), self.args.image_size)
        self.tasks = emoji.make_tasks(self.data["train"])

    def scores(self, kind: str, seed: int) -> dict[str, float]:
        self.args.task_weighting = kind
        trainer = self.emoji.train(self.args, "fused", seed, self.data, self.processor, self.tasks)
        return self.emoji.evaluate(trainer, self.data["test"])


def make_table(runs: dict[str, dict[str, dict[str, float]]]) -> Table:
    """
    Args:
        runs: weighting -> seed -> task -> score.
    """
    table = Table(title="Test score in %, mean ± standard deviation over seeds; seconds of training and measuring")
    table.add_column("weighting", style="bold", no_wrap=True)
    columns = list(next(iter(next(iter(runs.values())).values())))
    for column in columns:
        table.add_column(column, justify="right")
    for kind, seeds in runs.items():
        cells = []
        for column in columns:
            values = [run[column] * (1 if column == "seconds" else 100) for run in seeds.values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        table.add_row(kind, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("task_weighting"), help="where to write (%(default)s)")
    parser.add_argument(
        "--emoji_data_dir", type=Path, help="what emoji/build_dataset.py wrote; otherwise embedded data"
    )
    parser.add_argument("--weightings", nargs="+", choices=sorted(WEIGHTINGS), default=sorted(WEIGHTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps, of 64 rows each (400; of emoji 1200)")
    args = parser.parse_args()
    if args.seeds < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--seeds and --steps must be at least 1.")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    console = Console()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.json"
    settings = {"data": "emoji" if args.emoji_data_dir else "embedded", "steps": args.steps}
    report = json.loads(path.read_text()) if path.exists() else {"settings": settings, "scores": {}}
    if report["settings"] != settings:
        parser.error(f"{path} was made with {report['settings']}; choose another --output_dir.")
    problem = Emoji(args) if args.emoji_data_dir else Embedded(args)
    for seed in range(args.seeds):
        for kind in args.weightings:
            runs = report["scores"].setdefault(kind, {})
            if str(seed) in runs:
                continue
            start = time.perf_counter()
            scores = problem.scores(kind, seed)
            runs[str(seed)] = {**scores, "seconds": time.perf_counter() - start}
            path.write_text(json.dumps(report, indent=2) + "\n")
            shown = ", ".join(f"{task} {100 * score:.1f}" for task, score in scores.items())
            console.print(f"{kind}, seed {seed}: {shown}")
    console.print(make_table({kind: report["scores"][kind] for kind in args.weightings}))


if __name__ == "__main__":
    main()
