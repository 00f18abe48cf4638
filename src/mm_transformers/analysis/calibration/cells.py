"""Calibrates one task: its groups of rows become cells with temperatures and thresholds."""

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch

from ...model.availability import OTHER, group_name, modalities_in
from ...model.conformal import stored
from ...model.task_base import Task
from .hidden_parts import GroupRows
from .labelled_rows import LabelledRows, distinct_rows, has_outcome
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
        self.groups: dict[str, LabelledRows] = {}
        for group, rows in groups.items():
            if task.name not in rows.logits:  # no words to label
                continue
            labelled = has_outcome(rows.labels[task.name])
            own = labelled & rows.natural
            kept = own if int(own.sum()) >= min_rows else labelled
            found = LabelledRows(rows.logits[task.name], rows.labels[task.name], rows.numbers, rows.natural)
            self.groups[group] = found.chosen(kept)
        self.groups = {group: found for group, found in self.groups.items() if len(found.labels)}

    def cells(self) -> dict[str, Any]:
        """The `"cells"` of the task; see [`Calibration`]. Groups with too few rows are in the cell `"other"`."""
        if not self.groups:
            return {}
        large = {group: found for group, found in self.groups.items() if len(found.labels) >= self.min_rows}
        small = {group: found for group, found in self.groups.items() if group not in large}
        cells = {group: _cell(self.task, found) for group, found in large.items()}
        cells[OTHER] = {"rows": 0, "groups": []}
        if small:
            together, places = distinct_rows(small.values())
            sources = [group for group, found in small.items() for _ in range(len(found.labels))]
            used = {sources[place] for place in places}
            cells[OTHER] = _region(self.task, together) | {"groups": [group for group in small if group in used]}
        everything, _ = distinct_rows(self.groups.values())
        if len(everything.labels) >= self.min_rows:
            cells[OTHER] |= _temperatures(self.task, everything)
        return cells


def _cell(task: Task, rows: LabelledRows) -> dict[str, Any]:
    return {**_region(task, rows), **_temperatures(task, rows)}


def _temperatures(task: Task, rows: LabelledRows) -> dict[str, Any]:
    found = fit_temperatures(task, rows.logits, rows.labels)
    return {} if found is None else {"temperatures": found}


def _region(task: Task, rows: LabelledRows) -> dict[str, Any]:
    # By the logits of the model: with temperatures of the same rows the promise would be slightly too high.
    found, count = task.conformal_thresholds(rows.logits, rows.labels), len(rows.labels)
    return {"rows": count} if found is None else {"rows": count, "thresholds": stored(found[0])}


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
    labelled = has_outcome(without.labels[task.name])
    shared = np.intersect1d(without.numbers[labelled].numpy(), whole.numbers.numpy())
    if len(shared) < min_rows:
        return None
    before, after = (part.chosen(torch.isin(part.numbers, torch.as_tensor(shared))) for part in (without, whole))
    # The answers are those to the logits of the model; temperatures change their confidence only.
    logits = before.logits[task.name]
    now = task.outcomes(logits, before.labels[task.name])
    then = task.outcomes(after.logits[task.name], after.labels[task.name])
    if now is None or then is None:
        return None
    edges: list[float] = []
    bins = np.zeros(len(shared), int)
    confidences = task.answer_confidences(logits, tempered(task, logits, cell.get("temperatures")))
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
