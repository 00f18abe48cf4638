"""Calibrates one task: its groups of rows become cells with temperatures and thresholds."""

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch

from ...model.availability import OTHER, group_name, modalities_in
from ...model.conformal import stored
from ...model.task_base import Task
from .hidden_parts import GroupRows, stacked_labels, stacked_logits
from .temperatures import fit_temperatures, tempered


MIN_ROWS = 50
_BINS = 5
# Rows of a bin of advice, at least.
_BIN_ROWS = 20


class TaskRows:
    """
    The labelled rows of one task, by availability group.

    A group with fewer than `min_rows` labelled rows of its own also has other rows, with parts hidden.

    Args:
        task: what was asked.
        groups: availability group -> its rows.
        min_rows: the fewest rows of a cell.
    """

    def __init__(self, task: Task, groups: Mapping[str, GroupRows], min_rows: int = MIN_ROWS) -> None:
        self.task, self.min_rows = task, min_rows
        self.groups: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for group, rows in groups.items():
            if task.name not in rows.logits:  # no words to label
                continue
            labelled = _has_whole_label(rows.labels[task.name])
            own = labelled & rows.natural
            kept = own if int(own.sum()) >= min_rows else labelled
            self.groups[group] = (rows.logits[task.name][kept], rows.labels[task.name][kept])
        self.groups = {group: found for group, found in self.groups.items() if len(found[1])}

    def cells(self) -> dict[str, Any]:
        """The `"cells"` of the task; see [`Calibration`]. Groups with too few rows are in the cell `"other"`."""
        large = {group: found for group, found in self.groups.items() if len(found[1]) >= self.min_rows}
        small = [found for group, found in self.groups.items() if group not in large]
        cells = {group: _cell(self.task, *found) for group, found in large.items()}
        if not self.groups:
            return {}
        everything = _together(list(self.groups.values()))
        cells[OTHER] = _region(self.task, *_together(small)) if small else {"rows": 0}
        if len(everything[1]) >= self.min_rows:
            cells[OTHER] |= _temperatures(self.task, *everything)
        return cells


def _has_whole_label(labels: torch.Tensor) -> torch.Tensor:
    """(rows,) bool. Rows with only some values of a vector have no outcome; rows with some labelled words have one."""
    if labels.is_floating_point():
        return ~labels.isnan().flatten(1).any(1) if labels.ndim > 1 else ~labels.isnan()
    return (labels != -100).flatten(1).any(1) if labels.ndim > 1 else labels != -100


def _together(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return stacked_logits([logits for logits, _ in parts]), stacked_labels([labels for _, labels in parts])


def _cell(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    return {**_region(task, logits, labels), **_temperatures(task, logits, labels)}


def _temperatures(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    found = fit_temperatures(task, logits, labels)
    return {} if found is None else {"temperatures": found}


def _region(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    # By the logits of the model: with temperatures of the same rows the promise would be slightly too high.
    found = task.conformal_thresholds(logits, labels)
    return {"rows": len(labels)} if found is None else {"rows": len(labels), "thresholds": stored(found[0])}


def advice_tables(
    task: Task, groups: Mapping[str, GroupRows], cells: Mapping[str, Any], min_rows: int = MIN_ROWS
) -> dict[str, Any]:
    """
    The `"advice"` of a task: group -> missing modality -> its table; see [`advice_for`].

    Rows that have the modality are compared with themselves without it.
    """
    found: dict[str, Any] = {}
    names = list(dict.fromkeys(name for group in groups for name in modalities_in(group)))
    for group, rows in groups.items():
        for name in names:
            had = modalities_in(group)
            whole = group_name(one for one in names if one in had or one == name)
            if name in had or whole not in groups or task.name not in rows.logits:
                continue
            table = _table(task, rows, groups[whole], cells.get(group, {}), min_rows)
            if table is not None:
                found.setdefault(group, {})[name] = table
    return found


def _table(
    task: Task, without: GroupRows, whole: GroupRows, cell: Mapping[str, Any], min_rows: int
) -> Optional[dict[str, Any]]:
    labelled = _has_whole_label(without.labels[task.name])
    shared = np.intersect1d(without.numbers[labelled].numpy(), whole.numbers.numpy())
    if len(shared) < min_rows:
        return None
    before, after = (part.chosen(torch.isin(part.numbers, torch.as_tensor(shared))) for part in (without, whole))
    logits = tempered(task, before.logits[task.name], cell.get("temperatures"))
    now = task.outcomes(logits, before.labels[task.name])
    then = task.outcomes(after.logits[task.name], after.labels[task.name])
    if now is None or then is None:
        return None
    edges: list[float] = []
    bins = np.zeros(len(shared), int)
    confidences = task.answer_confidences(logits)
    if confidences is not None:
        count = min(_BINS, len(shared) // _BIN_ROWS)
        values = confidences.double().numpy()
        quantiles = np.quantile(values, np.arange(1, count) / count) if count > 1 else np.empty(0)
        edges = sorted({float(f"{value:.4g}") for value in quantiles})
        used = sorted(set(np.searchsorted(edges, values, side="right").tolist()))
        edges = [edges[number - 1] for number in used[1:]]  # without empty bins
        bins = np.searchsorted(edges, values, side="right")
    columns: dict[str, list[float]] = {"now": [], "then": [], "rows": []}
    for number in range(len(edges) + 1):
        chosen = torch.as_tensor(bins == number)
        columns["now"].append(float(f"{float(now[1][chosen].mean()):.4g}"))
        columns["then"].append(float(f"{float(then[1][chosen].mean()):.4g}"))
        columns["rows"].append(int(chosen.sum()))
    return {"measure": now[0], "edges": edges, **columns}
