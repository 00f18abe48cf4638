"""Writes the page."""

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Optional

import numpy as np
from transformers.utils import logging

from ...data.collator import MMDataCollator
from ...data.pages import rendered
from ...data.sources import rows_of
from ...model.answers import unwrapped
from ...model.modalities import MODALITIES
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.safe_writing import write_atomically
from ...model.task_base import Task
from ...training.linear_start.study import DoubtfulLabel
from ...training.linear_start.verdict import Verdict
from ..ablation.results import Ablation
from ..ablation.tables import Table
from ..calibration.measures import accuracy_at, risk_coverage
from ..explaining.colors import text_color
from ..explaining.explain import explain
from ..explaining.explanation import Explanation
from ..explaining.html import colored_words, heat_map_url, picture_url, sound_colors
from ..reliability import reliability
from .answered_rows import Answered, answers_to, confusion, most_confident_errors, worst


# Doubtful labels of a task on the page.
MOST_DOUBTFUL = 30


def write_report(
    path: str | os.PathLike[str],
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    rows: Sequence[Mapping[str, Any]],
    tasks: Optional[Sequence[str]] = None,
    method: str = "chefer",
    num_examples: int = 6,
    title: str = "",
    ablation: Optional[Ablation] = None,
    collator: Optional[MMDataCollator] = None,
    batch_size: int = 32,
    seed: int = 0,
    verdicts: Sequence[Verdict] = (),
    doubtful: Optional[Mapping[str, Sequence[tuple[DoubtfulLabel, str]]]] = None,
    folds: Optional[Table] = None,
) -> None:
    """
    Writes one HTML page, pictures included, about the answers and errors of a model.

    Per task the page shows the confusion matrix, the worst and the most confident errors, and some random rows with
    their explanations. If an [`Ablation`] is given, it also shows the contribution of each modality. The page suits
    phones and wide screens.

    Args:
        path: the file to write; it appears when it is finished.
        model ([`MMTransformerForMultiTask`]), processor ([`MMTransformerProcessor`]): The model and its processor.
        rows: with the columns that the collator reads; labels may be missing.
        tasks (`list[str]`, *optional*): The tasks to show; all by default.
        method (`str`, *optional*, defaults to `"chefer"`): See [`explain`].
        num_examples (`int`, *optional*, defaults to 6): Rows of each kind, at most.
        title (`str`, *optional*): The title of the page.
        ablation ([`Ablation`], *optional*): Of the same rows.
        collator ([`MMDataCollator`], *optional*): Needed if the columns have other names; one with cached features
            saves a pass of the encoders.
        verdicts (`list[Verdict]`, *optional*): The scores of the model beside those of simple models.
        doubtful (`dict[str, list]`, *optional*): Task -> labels of training rows that may be wrong, each with a
            description of its row.
        folds (`Table`, *optional*): The scores on each fold of a cross-validation, then their means.

    Raises:
        ValueError: if there are no rows, or one cannot be read.
    """
    if len(rows) == 0:
        raise ValueError("The report needs at least one row, but there are none.")
    collator = collator or MMDataCollator(processor, model.config)
    rows, _ = rows_of(rows, collator)
    model = unwrapped(model)
    answers: dict[str, list[Answered]] = {name: [] for name in tasks or model.tasks}
    batches = answers_to(model, collator, rows, batch_size)
    for batch in logging.tqdm(
        batches, desc="answering", total=-(-len(rows) // batch_size), disable=len(rows) <= 4 * batch_size
    ):
        for answered in batch:
            if answered.task in answers:
                answers[answered.task].append(answered)
    # Stored outputs of encoders suffice for answers, but explanations need pictures and words.
    draw = partial(_Drawn, model, processor, collator.uncached, rows, method)
    sections = [_section(model.tasks[name], found, draw, num_examples, seed) for name, found in answers.items()]
    page = rendered(
        __package__,
        "report.html.jinja",
        title=title or "Answers of the model, and their reasons",
        num_rows=len(rows),
        method=method,
        sections=sections,
        ablation=_of_ablation(ablation),
        verdicts=verdicts,
        folds=folds,
        doubtful={name: labels[:MOST_DOUBTFUL] for name, labels in (doubtful or {}).items() if labels},
        num_doubtful={name: len(labels) for name, labels in (doubtful or {}).items()},
    )
    with write_atomically(path) as file:
        file.write(page.encode())


def _section(
    task: Task, answers: list[Answered], draw: Callable[[Answered], "_Drawn"], num_examples: int, seed: int
) -> dict[str, Any]:
    labelled = [answered for answered in answers if answered.truth is not None]
    judged = [answered for answered in labelled if answered.is_right is not None]
    losses = [answered.loss for answered in labelled if answered.loss is not None]
    chosen = np.random.default_rng(seed).permutation(len(answers))[:num_examples]
    groups = {
        "Most confident errors": most_confident_errors(answers, num_examples),
        "Highest loss": worst(answers, num_examples),
        "Random rows": [answers[i] for i in sorted(chosen)],
    }
    names, found = task.label_names, {label for answered in judged for pair in answered.label_pairs for label in pair}
    if not found <= set(names):  # a kind of one's own may judge by other names
        names = sorted(found)
    matrix = [(label, _shaded(row)) for label, row in zip(names, confusion(judged, names), strict=True)]
    return {
        "name": task.name,
        "kind": task.kind.replace("_", " "),
        "num_labelled": len(labelled),
        "accuracy": sum(bool(a.is_right) for a in judged) / len(judged) if judged else None,
        "loss": float(np.mean(losses)) if losses else None,
        "surest": _surest(judged),
        "trust": _trust(judged),
        "labels": names,
        "confusion": matrix if found else None,
        "groups": [(name, [draw(answered) for answered in group]) for name, group in groups.items() if group],
    }


def _surest(judged: list[Answered]) -> list[tuple[int, float]]:
    """The shares of right answers if only so many percent of the rows are answered, the surest first."""
    sure = [(a.confidence, bool(a.is_right)) for a in judged if a.confidence is not None]
    if len(sure) < 10:
        return []
    curve = risk_coverage(np.array([confidence for confidence, _ in sure]), np.array([right for _, right in sure]))
    return [(percent, accuracy_at(curve, percent / 100)) for percent in (50, 70, 90)]


def _trust(judged: list[Answered]) -> list[tuple[str, int, float, float, float]]:
    """Per availability group: rows, share of right answers, mean confidence, and calibration error."""
    found = []
    for group in dict.fromkeys(answered.group for answered in judged):
        pairs = [(a.confidence, bool(a.is_right)) for a in judged if a.group == group and a.confidence is not None]
        if pairs:
            confidences, right = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
            error = reliability(confidences, right).ece
            found.append((group, len(pairs), float(right.mean()), float(confidences.mean()), error))
    return found


def _shaded(counts: list[int]) -> list[tuple[int, str, str]]:
    return [(count, *text_color(count / max(sum(counts), 1))) for count in counts]


class _Drawn:
    """An answered row on the page."""

    def __init__(
        self,
        model: MMTransformerForMultiTask,
        processor: MMTransformerProcessor,
        collator: MMDataCollator,
        rows: Sequence[Mapping[str, Any]],
        method: str,
        answered: Answered,
    ):
        self.answered = answered
        row, where = rows[answered.number], f"row {answered.number}"
        parts: dict[str, Any] = {"text": collator.text_of(row, True, where)}
        # The inputs of the model: unreadable items may have been dropped.
        for argument, column in collator.media.items():
            items, modality = column.read([row], [where])[0][0], MODALITIES[argument]
            if items:
                parts[modality.name] = items[0] if modality.is_sequence else items
        for table in collator.tables.values():
            parts |= {name: row[name] for name in table.columns if name in row}
        # Rows that cannot be explained are shown too.
        self.problem, self.rests_on, explanation = "", "", None
        self.pictures: list[tuple[str, Optional[str]]] = []
        self.sounds: list[tuple[float, list[str]]] = []
        try:
            explanation = explain(model, processor, parts, answered.task, method)
        except ValueError as error:
            self.problem = str(error)
        if explanation is None:
            self.pictures = [(picture_url(image), None) for image in parts.get("image", [])]
        self.words = [(word, *text_color(0)) for word in parts["text"].split()]
        self.answer, self.truth = shown(answered.answer), shown(answered.truth)
        if explanation is not None:
            self._draw(explanation)

    def _draw(self, explanation: Explanation) -> None:
        if self.answered.answer is None or self.answered.answer == []:
            self.answer = shown(explanation.answer)
        self.rests_on, self.words = explanation.rests_on, colored_words(explanation)
        self.pictures = [(picture_url(image.image), heat_map_url(explanation, image)) for image in explanation.images]
        self.sounds = [(sound.seconds, sound_colors(explanation, sound)) for sound in explanation.sounds]


def shown(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _of_ablation(ablation: Optional[Ablation]) -> Optional[dict[str, Any]]:
    if ablation is None:
        return None
    buffer = io.BytesIO()
    ablation.plot().savefig(buffer, format="png", dpi=110)
    figure = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"figure": figure, "tables": ablation.tables(), "note": ablation.note}
