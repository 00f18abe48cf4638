"""
Which task weights and learning rates are best? A search by Optuna through `Trainer.hyperparameter_search`, on the data
set that comes with the package; what it finds is measured on the test rows beside equal weights, over several seeds.

    pip install optuna
    python hyperparameter_search.py --output_dir search
"""

import argparse
import json
import statistics
from pathlib import Path

import datasets
import optuna
import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging

from mm_transformers import MMTrainer, MMTrainingArguments, MMTransformerForMultiTask
from mm_transformers.cli.demo_model import make_config, make_processor
from mm_transformers.data.embedded import TASK_LABELS, TRANSLATIONS, load_demo_dataset


# What is tried: rates between the first and the second, weights likewise, all on a logarithmic scale.
RATES = {
    "encoder_learning_rate": (1e-3, 1e-2),
    "fusion_learning_rate": (1e-3, 1e-2),
    "head_learning_rate": (1e-3, 1e-2),
}
WEIGHTS = (0.25, 4.0)
DEFAULT_RATE = 4e-3


class Search:
    """
    Args:
        data: the splits.
        output_dir, steps: of the trainings.
    """

    def __init__(self, data: datasets.DatasetDict, output_dir: Path, steps: int):
        self.data, self.output_dir, self.steps = data, output_dir, steps
        self.processor = make_processor([text for column in ("text", *TRANSLATIONS) for text in data["train"][column]])

    def make_model(self, weights: dict[str, float]) -> MMTransformerForMultiTask:
        config = make_config(self.processor.tokenizer, "cross_attention", with_images=True)
        # Choices only: without a decoder a trial takes seconds.
        config.tasks = [
            {**task, "loss_weight": weights.get(task["name"], 1.0)}
            for task in config.tasks
            if task["name"] in TASK_LABELS
        ]
        config.decoder_config = None
        return MMTransformerForMultiTask(config)

    def make_trainer(self, seed: int, **kwargs) -> MMTrainer:
        arguments = MMTrainingArguments(
            str(self.output_dir / "training"), max_steps=self.steps, per_device_train_batch_size=64,
            per_device_eval_batch_size=128, learning_rate=DEFAULT_RATE, lr_scheduler_type="cosine",
            warmup_steps=min(20, self.steps // 2), weight_decay=0.01, save_strategy="no", eval_strategy="steps",
            eval_steps=self.steps, logging_strategy="no", report_to=[], disable_tqdm=True, seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        return MMTrainer(
            args=arguments, processing_class=self.processor, train_dataset=self.data["train"],
            eval_dataset=self.data["validation"], **kwargs,
        )  # fmt: skip

    def run(self, trials: int, seed: int) -> tuple[dict[str, float], float]:
        """The best weights and rates, and the mean validation accuracy that they gave."""

        def model_init(trial: optuna.Trial | None) -> MMTransformerForMultiTask:
            # Of the weights only their ratios matter to Adam, so the first stays as it is.
            free = list(TASK_LABELS)[1:] if trial is not None else []
            return self.make_model({task: trial.suggest_float(f"{task}_weight", *WEIGHTS, log=True) for task in free})

        best = self.make_trainer(seed, model_init=model_init).hyperparameter_search(
            hp_space=lambda trial: {
                name: trial.suggest_float(name, *bounds, log=True) for name, bounds in RATES.items()
            },
            compute_objective=mean_accuracy,
            direction="maximize",
            n_trials=trials,
            backend="optuna",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        return best.hyperparameters, best.objective

    def measure(self, found: dict[str, float], seed: int) -> dict[str, float]:
        """Accuracy on the test rows of each task."""
        set_seed(seed)
        model = self.make_model({name.removesuffix("_weight"): value for name, value in found.items()})
        trainer = self.make_trainer(seed, model=model)
        for name in RATES:
            setattr(trainer.args, name, found.get(name))
        trainer.train()
        metrics = trainer.evaluate(self.data["test"])
        return {task: metrics[f"eval_{task}_accuracy"] for task in TASK_LABELS}


def mean_accuracy(metrics: dict[str, float]) -> float:
    return statistics.mean(metrics[f"eval_{task}_accuracy"] for task in TASK_LABELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("search"), help="where to write (%(default)s)")
    parser.add_argument("--trials", type=int, default=20, help="how many settings are tried (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of each training, of 64 rows each (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how often the result is measured (%(default)s)")
    args = parser.parse_args()
    if args.trials < 1 or args.steps < 1 or args.seeds < 1:
        parser.error("--trials, --steps and --seeds must be at least 1.")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    search, console = Search(load_demo_dataset(seed=0), args.output_dir, args.steps), Console()
    found, objective = search.run(args.trials, seed=0)
    console.print(f"Best of {args.trials} trials, with {100 * objective:.1f}% on the validation rows: {found}")
    # Other seeds than that of the search, which has seen what is good for that one.
    scores = {
        name: [search.measure(settings, seed) for seed in range(1, args.seeds + 1)]
        for name, settings in {"equal weights": {}, "found": found}.items()
    }
    table = Table(title=f"Test accuracy in %, mean ± standard deviation over {args.seeds} seeds")
    table.add_column("")
    for task in TASK_LABELS:
        table.add_column(task, justify="right")
    for name, runs in scores.items():
        cells = []
        for task in TASK_LABELS:
            values = [100 * run[task] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}")
        table.add_row(name, *cells)
    console.print(table)
    report = {"found": found, "validation": objective, "test": scores}
    (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
