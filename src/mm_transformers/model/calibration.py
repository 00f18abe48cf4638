"""How far to trust the answers of a model: what `config.calibration` stores, and how it changes answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from .availability import OTHER
from .conformal import LEVELS, level_of
from .label_cells import is_finite_number
from .messages import shortened
from .oddness import check_oddness
from .task_base import Task


class Calibration:
    """
    The calibration of a model, by task and availability group.

    `config.calibration` is a dict. Under `"tasks"` each task has its `"cells"`: one for each availability group, and
    `"other"` for rows of other groups. A cell has three entries. `"rows"` is the number of calibration rows.
    `"temperatures"` divide the logits: one, or one for each label. `"thresholds"` are those of sets and intervals, one
    for each of `LEVELS`, `None` if there are too few rows. They hold for the groups of the rows; those of `"other"` are
    listed in its `"groups"`. `"advice"` and `"oddness"` are explained in their modules. `"adapters"` are the names of
    the adapters of PEFT that the model had.

    Args:
        values (`dict`, *optional*): `config.calibration`; `None` changes no answer.
    """

    def __init__(self, values: Optional[Mapping[str, Any]]) -> None:
        self.tasks: Mapping[str, Any] = (values or {}).get("tasks", {})
        self.adapters: Sequence[str] = (values or {}).get("adapters", [])

    def cell(self, task: str, group: str) -> Optional[Mapping[str, Any]]:
        """The calibration of a group; `None` if the task has none."""
        if task not in self.tasks:
            return None
        cells = self.tasks[task]["cells"]
        if group in cells:
            return cells[group]
        other = cells.get(OTHER)
        # Older checkpoints lack this key.
        if other is None or group in other.get("groups", [group]):
            return other
        return {key: value for key, value in other.items() if key != "thresholds"}

    def tempered(self, task: Task, logits: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
        """The logits divided by the temperatures of the group of each row; the same object without a calibration."""
        cells = [self.cell(task.name, group) for group in groups]
        found = [(cell or {}).get("temperatures") or [1.0] for cell in cells]
        if all(temperatures == [1.0] for temperatures in found):
            return logits
        width = max(map(len, found))
        rows = [temperatures * width if len(temperatures) == 1 else temperatures for temperatures in found]
        return task.temper(logits, torch.tensor(rows, dtype=torch.float32, device=logits.device))

    def thresholds(self, task: str, groups: Sequence[str], coverage: float) -> list[float]:
        """
        The threshold of each row for a coverage; infinite if its group has too few calibration rows.

        Raises:
            ValueError: if the task is not calibrated, or `coverage` is not between 0 and 1.
        """
        place = level_of(coverage)
        if not self.can_cover(task):
            raise ValueError(
                f"Task {task!r} has no calibrated sets or intervals, which `coverage` needs: run `calibrate(model, "
                "processor, rows)` on rows with labels of this task."
            )
        cells = [self.cell(task, group) or {} for group in groups]
        found = [(cell.get("thresholds") or [None] * len(LEVELS))[place] for cell in cells]
        return [math.inf if value is None else float(value) for value in found]

    def can_cover(self, task: str) -> bool:
        """Whether the task has sets or intervals."""
        cells = self.tasks.get(task, {}).get("cells", {})
        return any(cell.get("thresholds") is not None for cell in cells.values())

    def can_advise(self, task: str) -> bool:
        """Whether it is known what missing parts would help."""
        return bool(self.tasks.get(task, {}).get("advice"))

    def advice(self, task: str, group: str) -> Mapping[str, Any]:
        """Missing modality -> what is known about rows that got it; see [`advice_for`]."""
        return self.tasks.get(task, {}).get("advice", {}).get(group, {})


def for_tasks(values: Optional[dict[str, Any]], names: Sequence[str]) -> Optional[dict[str, Any]]:
    """
    The calibration of a model that is loaded with other tasks.

    Args:
        values: the calibration of the checkpoint.
        names: the tasks that keep their heads.
    """
    if values is None:
        return None
    return {**values, "tasks": {name: found for name, found in values["tasks"].items() if name in names}}


def check_calibration(values: Any, tasks: Mapping[str, Task]) -> None:
    """
    Checks `config.calibration`, which may come from a stranger.

    Raises:
        ValueError: one sentence, if something in it has another form than [`Calibration`] describes.
    """
    if values is None:
        return
    _check(isinstance(values, dict) and isinstance(values.get("tasks"), dict), "calibration", values)
    if values.get("oddness") is not None and (problem := check_oddness(values["oddness"])):
        raise ValueError(f"calibration['oddness'] is not as `calibrate` writes it: {problem}.")
    adapters = values.get("adapters", [])
    _check(_are_names(adapters), "calibration['adapters']", adapters)
    for name, found in values["tasks"].items():
        where = f"calibration.tasks[{name!r}]"
        _check(name in tasks, f"{where}, of a task that the model does not have,", found)
        _check(isinstance(found, dict) and isinstance(found.get("cells"), dict), where, found)
        widths = {1, max(len(tasks[name].label_names), 1)}
        for group, cell in found["cells"].items():
            place = f"{where}.cells[{group!r}]"
            _check(isinstance(cell, dict), place, cell)
            temperatures, thresholds = cell.get("temperatures"), cell.get("thresholds")
            positive = _numbers(temperatures) and len(temperatures) in widths and min(temperatures) > 0
            _check(temperatures is None or positive, f"{place}.temperatures", temperatures)
            covers = isinstance(thresholds, (list, tuple)) and len(thresholds) == len(LEVELS)
            right = covers and _numbers([value for value in thresholds if value is not None])
            _check(thresholds is None or right, f"{place}.thresholds", thresholds)
            names = cell.get("groups", [])
            _check(_are_names(names), f"{place}.groups", names)
        advice = found.get("advice", {})
        _check(isinstance(advice, dict) and all(isinstance(part, dict) for part in advice.values()), where, advice)
        for group, parts in advice.items():
            for modality, table in parts.items():
                place = f"{where}.advice[{group!r}][{modality!r}]"
                keys = ("edges", "now", "then", "rows")
                columns: list[Any] = [table.get(key) if isinstance(table, dict) else None for key in keys]
                _check(all(map(_numbers, columns)), place, table)
                sizes = {len(column) for column in columns[1:]}
                _check(sizes == {len(columns[0]) + 1} and isinstance(table.get("measure"), str), place, table)


def _numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(map(is_finite_number, values))


def _are_names(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _check(is_right: bool, where: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"{where} is not as `calibrate` writes it: {shortened(value)}.")
