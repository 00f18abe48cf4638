"""Prints metrics for reading; the files have all of them."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ..analysis import Ablation
from ..training.metrics import is_measured, task_of_metric


def print_metrics(
    metrics: Mapping[str, Mapping[str, float]], prefixes: Mapping[str, str], tasks: Sequence[str]
) -> None:
    """
    Prints a table with one row per task and metric, and one column per split.

    Args:
        metrics: split -> the result of `Trainer.evaluate`.
        prefixes: split -> the prefix of its metrics.
        tasks: the names of the tasks. Other metrics are left out, except the loss, and so are values that are no
            numbers.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for split, values in metrics.items():
        for name, value in values.items():
            if not is_measured(value):
                continue
            name = name.removeprefix(f"{prefixes[split]}_")
            task = task_of_metric(name, tasks)
            if task is not None:
                rows.setdefault((task, name.removeprefix(f"{task}_")), {})[split] = value
            elif name == "loss":
                rows.setdefault(("", "loss"), {})[split] = value
    if not rows:
        return
    table = Table("task", "metric")
    for split in metrics:
        table.add_column(split, justify="right")
    order = {task: i for i, task in enumerate([*tasks, ""])}
    previous = None
    for task, metric in sorted(rows, key=lambda row: order[row[0]]):
        if previous not in (None, task):
            table.add_section()
        values = rows[task, metric]
        shown = [f"{values[split]:.4g}" if split in values else "" for split in metrics]
        table.add_row(task if task != previous else "", metric, *shown)
        previous = task
    Console(markup=False).print(table)  # names are no styles


def print_ablation(ablation: Ablation) -> None:
    """Prints the tables of an ablation, uncut on a terminal and in a file."""
    Console().print(ablation.to_markdown(), markup=False, highlight=False, soft_wrap=True)
