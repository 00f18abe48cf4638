"""`calibrate`: fits how far to trust answers on labelled rows, and writes it into the config of the model."""

from typing import Any

import numpy as np
from torch.utils.data import Subset
from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.sources import rows_of
from ...model.answers import unwrapped
from ...model.availability import OTHER
from ...model.calibration import Calibration, check_calibration
from ...model.conformal import level_of
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.processing_mm_transformer import MMTransformerProcessor
from .cells import MIN_ROWS, TaskRows, advice_tables
from .hidden_parts import GroupRows, rows_by_group
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
        ValueError: one sentence, if there are no rows, no row has a label, or a row cannot be read.

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
    dataset, _ = rows_of(rows, collator)
    if len(dataset) == 0:
        raise ValueError("There are no rows to calibrate on.")
    groups = rows_by_group(model, collator, dataset, hide, batch_size)
    values: dict[str, Any] = {"tasks": {}, "adapters": sorted(getattr(model, "peft_config", None) or ())}
    before = Calibration(model.config.calibration).tasks
    result = CalibrationResult({})
    for name, task in model.tasks.items():
        of_task = TaskRows(task, groups, min_rows)
        cells = of_task.cells()
        if not any("temperatures" in cell or "thresholds" in cell for cell in cells.values()):
            continue
        values["tasks"][name] = {"cells": cells, "advice": advice_tables(task, groups, cells, min_rows)}
        result.groups[name] = measures_of(task, of_task.groups, cells)
        result.notes += _notes(name, result.groups[name], cells, min_rows)
    if not values["tasks"]:
        raise ValueError(
            "No task can be calibrated: no row has a label of a task that chooses labels or predicts a number."
        )
    result.notes += [
        f"Task {name!r} has no rows here to calibrate it on, so its earlier calibration is removed."
        for name in before
        if name not in values["tasks"]
    ]
    _set_oddness(model, values, groups, training_rows, collator, batch_size)
    check_calibration(values, model.tasks)
    model.config.calibration = values
    for note in result.notes:
        logger.warning(note)
    return result


def _set_oddness(
    model: MMTransformerForMultiTask,
    values: dict[str, Any],
    groups: dict[str, GroupRows],
    training_rows: Any,
    collator: MMDataCollator,
    batch_size: int,
) -> None:
    training = None
    if training_rows is not None:
        known, _ = rows_of(training_rows, collator)
        # A random choice: rows may be sorted, such as by class.
        chosen = np.sort(np.random.default_rng(0).permutation(len(known))[:_MOST_TRAINING_ROWS])
        training = rows_by_group(model, collator, Subset(known, chosen.tolist()), False, batch_size)
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
