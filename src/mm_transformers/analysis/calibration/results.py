"""The measures of a calibration, by task and availability group."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...model.availability import OTHER
from ...model.task_base import Task
from ..ablation.tables import Table, as_markdown
from ..reliability import Reliability, chance_error, draw_reliability, reliability
from .hidden_parts import stacked_labels, stacked_logits
from .labelled_rows import LabelledRows, distinct_rows
from .measures import RiskCoverage, accuracy_at, class_wise_error, risk_coverage
from .temperatures import cross_tempered


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARES = (0.5, 0.7, 0.9)
_COVERAGES = (0.8, 0.9, 0.95)


@dataclass
class GroupMeasures:
    """
    One task on the rows of one availability group.

    Args:
        rows: the number of labelled rows.
        temperatures: those of the group; `None` for tasks without probabilities.
        before, after: the reliability of answers without and with temperatures; each row is measured with temperatures
            that were fitted without it. `None` for tasks that choose no label.
        chance: the error that perfect probabilities would have, by chance, with as many rows as `after`.
        class_wise_before, class_wise_after: the mean calibration error of the probability of each label.
        curve_before, curve_after: accuracy by the share of answered rows.
        sizes: coverage -> the mean number of labels in the sets, or the mean length of the intervals.
    """

    rows: int
    temperatures: list[float] | None = None
    before: Reliability | None = None
    after: Reliability | None = None
    chance: float | None = None
    class_wise_before: float | None = None
    class_wise_after: float | None = None
    curve_before: RiskCoverage | None = None
    curve_after: RiskCoverage | None = None
    sizes: dict[str, float] = field(default_factory=dict)


@dataclass
class CalibrationResult:
    """
    What [`calibrate`] has measured.

    Args:
        groups (`dict[str, dict[str, GroupMeasures]]`): Task -> availability group -> its measures; the group `"all"`
            has the rows of all groups as they are.
        notes (`list[str]`): Sentences about groups with too few rows.

    Example:

    ```python
    >>> from mm_transformers.analysis import calibrate

    >>> result = calibrate(model, processor, rows)
    >>> print(result)
    >>> error = result.groups["sentiment"]["text"].after.ece  # the calibration error
    >>> result.plot().savefig("calibration.png")
    ```
    """

    groups: dict[str, dict[str, GroupMeasures]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All measures, for JSON."""
        return _without_nan(asdict(self))

    def tables(self) -> list[Table]:
        """The calibration errors, and the accuracy of the surest answers."""
        errors, curves = [], []
        for task, groups in self.groups.items():
            for group, found in groups.items():
                if found.before is not None and found.after is not None:
                    measured = (found.before.ece, found.after.ece, found.chance)
                    cells = map(_percent, (*measured, found.class_wise_before, found.class_wise_after))
                    errors.append([task, group, f"{found.rows:,}", *cells])
                sizes = [f"{found.sizes[str(c)]:.3g}" if str(c) in found.sizes else "–" for c in _COVERAGES]
                shares = [_percent(accuracy_at(found.curve_after, share)) if found.curve_after else "–"
                          for share in _SHARES]  # fmt: skip
                if group != "all" or found.curve_after:
                    curves.append([task, group, *shares, *sizes])
        header = ["task", "rows with", "rows", "error before, %", "after", "by chance", "by label before", "after"]
        surest = [*(f"right, surest {share:.0%}" for share in _SHARES), *(f"size at {c:.0%}" for c in _COVERAGES)]
        both = [Table(header, errors, 2), Table(["task", "rows with", *surest], curves, 2)]
        return [table for table in both if table.rows]

    def __str__(self) -> str:
        return "\n\n".join([*(as_markdown(table, 120) for table in self.tables()), *self.notes])

    def plot(self) -> "Figure":
        """A reliability diagram for each task and group, and the accuracy by the share of answered rows."""
        from matplotlib.figure import Figure

        shown = [(task, group, found) for task, groups in self.groups.items() for group, found in groups.items()
                 if found.before is not None]  # fmt: skip
        columns = max(len({group for _, group, _ in shown}), 1)
        tasks = list(dict.fromkeys(task for task, _, _ in shown))
        figure = Figure(figsize=(2.8 * columns, 2.8 * max(len(tasks), 1) * 2), layout="constrained")
        grid = figure.subplots(2 * max(len(tasks), 1), columns, squeeze=False)
        for axes in grid.flatten():
            axes.set_visible(False)
        for number, task in enumerate(tasks):
            of_task = [(group, found) for name, group, found in shown if name == task]
            for column, (group, found) in enumerate(of_task):
                curves = {n: one for n, one in (("after", found.after), ("before", found.before)) if one is not None}
                draw_reliability(grid[2 * number, column], curves, f"{task}: {group} ({found.rows:,} rows)")
                _draw_curve(grid[2 * number + 1, column], found)
        return figure


def measures_of(task: Task, groups: dict[str, LabelledRows], cells: dict[str, Any]) -> dict[str, GroupMeasures]:
    """
    The measures of a task.

    Args:
        groups: availability group -> its labelled rows.
        cells: what was fitted.
    """
    found, together = {}, []
    everything, _ = distinct_rows(groups.values())
    for group, rows in groups.items():
        cell = cells.get(group, cells.get(OTHER, {}))
        # A group without a cell has the temperatures of all rows.
        fitted_on = rows if group in cells else everything
        after = cross_tempered(task, rows, fitted_on) if cell.get("temperatures") else rows.logits
        one = _measure(task, rows.logits, after, rows.labels)
        one.temperatures = cell.get("temperatures")
        one.sizes = _sizes(task, rows.logits, cell, group)
        found[group] = one
        if bool(rows.natural.any()):
            together.append((rows.logits[rows.natural], after[rows.natural], rows.labels[rows.natural]))
    if len(together) > 1:
        raw, tempered, of_rows = zip(*together, strict=True)
        found["all"] = _measure(task, stacked_logits(raw), stacked_logits(tempered), stacked_labels(of_rows))
    return found


def _measure(task: Task, before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> GroupMeasures:
    one = GroupMeasures(len(labels))
    pair = [task.confidences(logits, labels) for logits in (before, after)]
    if pair[0] is None or pair[1] is None:
        return one
    first, right = pair[0]
    second, right_after = pair[1]
    one.before = reliability(first.double().numpy(), right.numpy())
    one.after = reliability(second.double().numpy(), right_after.numpy())
    one.chance = chance_error(second.double().numpy())
    one.curve_before = risk_coverage(first.double().numpy(), right.numpy())
    one.curve_after = risk_coverage(second.double().numpy(), right_after.numpy())
    if labels.ndim == 1:
        probabilities = [task.probabilities(logits) for logits in (before, after)]
        one.class_wise_before, one.class_wise_after = (
            class_wise_error(p, labels) for p in probabilities if p is not None
        )
    return one


def _sizes(task: Task, logits: torch.Tensor, cell: dict[str, Any], group: str) -> dict[str, float]:
    from ...model.calibration import Calibration

    if cell.get("thresholds") is None:
        return {}
    reader, sizes = Calibration({"tasks": {task.name: {"cells": {OTHER: cell}}}}), {}
    for coverage in _COVERAGES:
        answers = task.decode(logits)
        task.add_region(answers, logits, reader.thresholds(task.name, [group] * len(logits), coverage))
        found = [_size(answer) for answer in answers]
        if all(size is not None for size in found):
            sizes[str(coverage)] = float(np.mean([size for size in found if size is not None]))
    return sizes


def _size(answer: dict[str, Any]) -> float | None:
    if "set" in answer:
        return float(len(answer["set"]))
    interval = answer.get("interval")
    return None if interval is None else interval[1] - interval[0]


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def _draw_curve(axes: Any, found: GroupMeasures) -> None:
    axes.set_visible(True)
    for curve, color in ((found.curve_before, "#d62728"), (found.curve_after, "#1f77b4")):
        assert curve is not None
        axes.plot(curve.coverages, curve.accuracies, color=color, linewidth=1)
    axes.set(xlim=(0, 1), ylim=(min(0.5, *found.curve_after.accuracies), 1.01) if found.curve_after else (0, 1))
    axes.set_xlabel("share of rows that are answered", fontsize=8)
    axes.set_ylabel("share of right answers", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
