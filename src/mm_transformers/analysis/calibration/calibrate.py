"""`calibrate`: fits how far to trust answers on labelled rows, and writes it into the config of the model."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.sources import DataSource, rows_of
from ...model.answers import unwrapped
from ...model.availability import OTHER
from ...model.calibration import Calibration, check_calibration
from ...model.conformal import level_of
from ...model.embeddings import FUSED
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.processing_mm_transformer import MMTransformerProcessor
from .cells import MIN_ROWS, TaskRows, advice_tables
from .hidden_parts import GroupRows, rows_by_group
from .labelled_rows import distinct_rows
from .odd_rows import fit_oddness
from .results import CalibrationResult, GroupMeasures, measures_of


logger = logging.get_logger(__name__)
# Training rows from which the statistics for odd rows are taken, at most.
_MOST_TRAINING_ROWS = 5_000


def calibrate(
    model: MMTransformerForMultiTask,
    processor: MMDataCollator | MMTransformerProcessor,
    rows: Any,
    *,
    training_rows: Any = None,
    min_rows: int = MIN_ROWS,
    hide: bool = True,
    batch_size: int = 32,
) -> CalibrationResult:
    """
    Fits how far to trust the answers, for each task and availability group (text alone, image alone, both, ...).

    It writes the result into `model.config.calibration`. Save the model afterwards.

    Answers then have calibrated probabilities: temperatures divide the logits. They change no answer. `coverage=0.9` of
    the pipeline and of [`Predictor`] gives sets and intervals that hold the truth in 90% of rows. A warning names rows
    unlike those seen here, and `advise=True` tells what a missing part would help.

    Take labelled rows on which the model was not trained, and which are like the rows to answer: promises hold for such
    rows only. Few rows are enough for a temperature, some hundred in each group for sets.

    Args:
        model ([`MMTransformerForMultiTask`]): Its config is changed.
        processor ([`MMTransformerProcessor`] or [`MMDataCollator`]): The processor of the model, or a collator if the
            columns have other names.
        rows: a data set, a list of dicts, a table of pandas, or a [`DataSource`].
        training_rows (*optional*): The rows of the training, with which odd rows are compared. Without them half of
            `rows` stands for them, chosen at random.
        min_rows (`int`, *optional*, defaults to 50): Groups with fewer labelled rows are calibrated together, as
            `"other"`.
        hide (`bool`, *optional*, defaults to `True`): Whether a group with fewer than `min_rows` rows also gets other
            rows, with parts hidden. This assumes that parts are missing by chance. Advice needs it.
        batch_size (`int`, *optional*, defaults to 32): Rows per batch.

    Returns:
        [`CalibrationResult`]: calibration errors before and after, for each task and group.

    Raises:
        ValueError: one sentence, if there are no rows, too few rows have a label, or a row cannot be read.

    Example:

    ```python
    >>> from mm_transformers.analysis import calibrate

    >>> result = calibrate(model, processor, rows)
    >>> list(result.groups["sentiment"])  # rows with a text alone
    ['text']
    >>> model.save_pretrained("my-model")
    ```
    """
    if min_rows < 2:
        raise ValueError(f"min_rows must be at least 2, but is {min_rows}.")
    model = unwrapped(model)
    collator = MMDataCollator(processor, model.config) if isinstance(processor, MMTransformerProcessor) else processor
    dataset = _read(rows, "rows", collator)
    if len(dataset) == 0:
        raise ValueError("There are no rows to calibrate on.")
    groups = rows_by_group(model, collator, dataset, hide, batch_size)
    too_few: list[str] = []
    values: dict[str, Any] = {"tasks": {}, "adapters": sorted(getattr(model, "peft_config", None) or ())}
    before = Calibration(model.config.calibration).tasks
    result = CalibrationResult({})
    for name, task in model.tasks.items():
        of_task = TaskRows(task, groups, min_rows)
        cells = of_task.cells()
        if not any("temperatures" in cell or "thresholds" in cell for cell in cells.values()):
            too_few += _too_few(of_task)
            continue
        values["tasks"][name] = {"cells": cells, "advice": advice_tables(task, groups, cells, min_rows)}
        result.groups[name] = measures_of(task, of_task.groups, cells)
        result.notes += _notes(name, result.groups[name], cells, min_rows)
    if not values["tasks"]:
        reason = "no row has a label of a task that chooses labels or predicts a number."
        raise ValueError(f"No task can be calibrated: {' '.join(too_few) or reason}")
    result.notes += too_few
    result.notes += [
        f"Task {name!r} has no rows here to calibrate it on, so its earlier calibration is removed."
        for name in before
        if name not in values["tasks"]
    ]
    training = None if training_rows is None else _training_groups(model, training_rows, collator, batch_size)
    if training is not None and _are_same(groups, training):
        result.notes.append(
            "The training rows are the calibration rows, so too many rows count as odd: give the rows that the model "
            "was trained on, or none."
        )
    _set_oddness(model, values, groups, training)
    check_calibration(values, model.tasks)
    model.config.calibration = values
    for note in result.notes:
        logger.warning(note)
    return result


def _read(rows: Any, argument: str, collator: MMDataCollator) -> Any:
    """The rows, with numbers."""
    source = rows.dataset if isinstance(rows, DataSource) else rows
    if not hasattr(source, "__len__"):
        raise ValueError(
            f"{argument} must be a data set, a list of dicts or a table of pandas, which have a length, but is of type "
            f"{type(source).__name__}: pass list(...) of it."
        )
    return rows_of(rows, collator)[0]


def _too_few(of_task: TaskRows) -> list[str]:
    """The sentence about a task with labels whose probabilities need more of them; empty for other tasks."""
    task, found = of_task.task, list(of_task.groups.values())
    if not found or task.log_likelihood(found[0].logits[:1], found[0].labels[:1]) is None:
        return []
    count = len(distinct_rows(found)[0].labels)
    return [f"Task {task.name!r} has {count} labelled rows, but a temperature needs {of_task.min_rows} (`min_rows`)."]


def _training_groups(
    model: MMTransformerForMultiTask, training_rows: Any, collator: MMDataCollator, batch_size: int
) -> dict[str, GroupRows]:
    known = _read(training_rows, "training_rows", collator)
    # A random choice: rows may be sorted, such as by class.
    chosen = np.sort(np.random.default_rng(0).permutation(len(known))[:_MOST_TRAINING_ROWS])
    return rows_by_group(model, collator, Subset(known, chosen.tolist()), False, batch_size)


def _are_same(groups: dict[str, GroupRows], training: dict[str, GroupRows]) -> bool:
    """Whether the rows as they are have equal vectors."""
    own = {group: rows.vectors[FUSED][rows.natural] for group, rows in groups.items() if bool(rows.natural.any())}
    others = {group: rows.vectors[FUSED] for group, rows in training.items()}
    return own.keys() == others.keys() and all(
        len(own[group]) == len(others[group]) and torch.allclose(own[group], others[group], atol=1e-4) for group in own
    )


def _set_oddness(
    model: MMTransformerForMultiTask,
    values: dict[str, Any],
    groups: dict[str, GroupRows],
    training: dict[str, GroupRows] | None,
) -> None:
    oddness = fit_oddness(groups, training)
    if oddness is not None:
        values["oddness"] = {"parts": oddness.parts, "thresholds": oddness.thresholds}
        oddness.to(model.device)
    model.oddness = oddness


def _notes(task: str, found: dict[str, GroupMeasures], cells: dict[str, Any], min_rows: int) -> list[str]:
    notes = []
    small = [group for group in found if group not in cells and group != "all"]
    if small:
        thresholds = cells[OTHER].get("thresholds")
        can = thresholds is not None and thresholds[level_of(0.9)] is not None
        sets = "" if can or thresholds is None else ", too few for sets of coverage 90%, which hold every label"
        notes.append(
            f"Task {task!r}: {', '.join(map(repr, small))} had fewer than {min_rows} labelled rows, so these groups "
            f"are calibrated together ({cells[OTHER]['rows']} rows{sets})."
        )
        unpromised = [group for group in small if group not in cells[OTHER]["groups"]]
        if unpromised and thresholds is not None:
            notes.append(
                f"Task {task!r}: rows with {', '.join(map(repr, unpromised))} get no promise: the only such rows are "
                "copies, with parts hidden, of rows that are already counted."
            )
    return notes
