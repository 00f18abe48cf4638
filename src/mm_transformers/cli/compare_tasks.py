"""`mm-transformers compare-tasks`: did the tasks of a recipe gain by being trained together?"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..analysis.task_comparison import as_cells, compare, draw_comparison, run_comparison, to_markdown
from ..data.labels import has_labels
from ..model.safe_writing import write_text_atomically
from ..training.checkpoints.lock import locked
from ..training.recipe import read_recipe
from ..training.recipe.builders import build_trainer, load_data, training_arguments
from .processes import say


def run_compare_tasks(
    path: Path, overrides: list[str], output_dir: Path, num_seeds: int, allow_urls: bool | list[str] = False
) -> None:
    """
    Compares joint training with each task alone.

    Args:
        allow_urls: as in [`MMDataCollator`].

    Raises:
        ValueError, OSError: one sentence.
    """
    recipe = read_recipe(path, overrides)
    args = training_arguments(recipe)
    data = load_data(recipe, args)
    split = next((name for name in ("test", "validation") if name in data.splits), None)
    if split is None:
        raise ValueError("Comparing tasks needs rows to measure on: set data.validation or data.test in the recipe.")
    for task in data.tasks:
        for name in ("train", split):
            about = (task, recipe.columns.text, recipe.data.label_separator)
            if task.default_cell is None and not has_labels(data.splits[name], *about):
                raise ValueError(f"The {name} rows have no label of task {task.name!r}, so it cannot be compared.")
    names = [task.name for task in data.tasks]

    def train_and_measure(tasks: list[str], seed: int) -> dict[str, dict[str, float]]:
        alone = len(tasks) == 1
        say(f"Seed {seed}: {tasks[0] if alone else 'all tasks jointly'}")
        training = {
            # These models are not saved, and all train for the same number of steps.
            **recipe.training, "seed": seed, "output_dir": str(output_dir / "training"), "save_strategy": "no",
            "eval_strategy": "no", "load_best_model_at_end": False, "resume_from_checkpoint": None,
            "push_to_hub": False,
        }  # fmt: skip
        model = dict(recipe.model)
        if alone:
            model["task_weighting"] = "static"  # one task needs no weighting
            if model.get("regularization"):
                of_tasks = model["regularization"].get("tasks") or {}
                of_this = {name: part for name, part in of_tasks.items() if name in tasks}
                model["regularization"] = {**model["regularization"], "tasks": of_this}
        one = dataclasses.replace(recipe, training=training, model=model)
        chosen = data._replace(tasks=[task for task in data.tasks if task.name in tasks])
        trainer = build_trainer(one, training_arguments(one), chosen, allow_urls=allow_urls)
        trainer.train()
        metrics = trainer.evaluate(data.splits[split])
        found: dict[str, dict[str, float]] = {task: {} for task in tasks}
        for name, value in metrics.items():
            name = name.removeprefix("eval_")
            task = max((task for task in tasks if name.startswith(f"{task}_")), key=len, default=None)
            if task is not None:
                found[task][name.removeprefix(f"{task}_")] = value
        return found

    if args.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + num_seeds)
    settings = {"recipe": recipe.to_dict(), "split": split}
    path = output_dir / "comparison.json"
    with locked(output_dir) if args.process_index == 0 else nullcontext():
        runs = run_comparison(train_and_measure, names, seeds, path, settings, args.should_save)
    comparisons = compare(runs, seeds)
    if args.should_save:
        table = Table(title=f"Same steps, {num_seeds} seed(s), measured on the {split} rows; mean ± standard deviation")
        for column in ("task", "metric", "alone", "jointly", "gain ± standard error", ""):
            table.add_column(column, justify="left" if column in ("task", "metric", "") else "right")
        for comparison in comparisons:
            table.add_row(*as_cells(comparison))
        Console(markup=False).print(table)  # names are no styles
        write_text_atomically(output_dir / "comparison.md", to_markdown(comparisons))
        draw_comparison(output_dir / "comparison.png", comparisons)
        say(f"Wrote comparison.json, comparison.md and comparison.png to {output_dir}.")
