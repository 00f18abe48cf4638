"""What `fit` says and writes about a trained model: verdicts, doubtful labels, `report.html`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from ..analysis.ablation.ablate import ablate
from ..analysis.ablation.tables import Table, as_markdown
from ..analysis.report import write_report
from ..training.linear_start.study import DoubtfulLabel, Study
from ..training.linear_start.verdict import Verdict
from ..training.recipe.builders import RecipeData
from ..training.trainer import MMTrainer


REPORT_NAME = "report.html"
# Rows in the report's ablation; more hardly change it.
_MOST_ABLATED = 2_000
# The fusion runs this number squared times.
_ADDITIVE_ROWS = 64
# Characters of a line.
_SCREEN = 120


def with_test_scores(verdicts: Mapping[str, Verdict], metrics: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on the test rows, with the scores of the trained model there."""
    return [
        replace(verdict, model=metrics.get(f"test_{name}_{verdict.metric}"), rows="test")
        for name, verdict in verdicts.items()
    ]


def score_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The scores as a table, and a sentence for each task that training did not improve."""
    if not verdicts:
        return
    columns = {
        "predicted": [verdict.task for verdict in verdicts],
        "score": [verdict.metric for verdict in verdicts],
        "model": [verdict.shown(verdict.model) for verdict in verdicts],
        "linear model": [verdict.shown(verdict.linear) for verdict in verdicts],
        "text alone": [verdict.shown(verdict.text_alone) for verdict in verdicts],
        "constant answer": [verdict.shown(verdict.majority) for verdict in verdicts],
        "labels": [f"{verdict.num_rows:,}" for verdict in verdicts],
    }
    if all(verdict.text_alone is None for verdict in verdicts):
        del columns["text alone"]
    table = Table(list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)], num_keys=2)
    yield f"Scores on the {verdicts[0].rows} rows, beside simple models of the same inputs:"
    yield from as_markdown(table, _SCREEN).splitlines()
    for verdict in verdicts:
        if verdict.note:
            yield f"{verdict.task}: {verdict.note}."


def tell_doubtful(doubtful: Mapping[str, Sequence[DoubtfulLabel]], say: Callable[[str], None]) -> None:
    for name, labels in doubtful.items():
        if labels:
            say(f"{name}: {len(labels):,} labels of training rows may be wrong; {REPORT_NAME} lists the first.")


def in_table(label: DoubtfulLabel, data: RecipeData) -> DoubtfulLabel:
    """A label with the number of its row in the table, instead of that among the training rows."""
    return label._replace(row=int(data.train_numbers[label.row]))


def write_fit_report(
    trainer: MMTrainer,
    data: RecipeData,
    rows: datasets.Dataset,
    verdicts: list[Verdict],
    study: Study,
    path: Path,
    folds: Table | None = None,
) -> None:
    """
    Writes the report of a trained model.

    Args:
        rows: held-out rows to answer.
        folds: the scores on folds, if there are any.
    """
    model, collator = trainer.fused_model.eval(), trainer.collator_for(rows)
    ablation = None
    if len(model.config.read_modalities) > 1:
        some = rows.select(range(min(len(rows), _MOST_ABLATED)))
        ablation = ablate(
            model, collator.processor, some, collator=collator, batch_size=trainer.args.eval_batch_size,
            compute_metrics=trainer.compute_metrics, num_additive_rows=_ADDITIVE_ROWS,
        )  # fmt: skip
    doubtful = _with_texts(study.doubtful, data, collator.uncached)
    write_report(
        path, model, collator.processor, rows, ablation=ablation, collator=collator, title=path.parent.name,
        batch_size=trainer.args.eval_batch_size, verdicts=verdicts, doubtful=doubtful, folds=folds,
    )  # fmt: skip


def _with_texts(
    doubtful: Mapping[str, Sequence[DoubtfulLabel]], data: RecipeData, collator: Any
) -> dict[str, list[Any]]:
    """Task -> doubtful labels, each with the cells of its row in short."""
    rows = data.splits["train"]
    inputs = [name for name in collator.input_columns if name in rows.column_names]
    plain = rows.select_columns(inputs)
    return {
        name: [(in_table(label, data), _shown(plain, label.row)) for label in labels]
        for name, labels in doubtful.items()
    }


def _shown(rows: datasets.Dataset, number: int) -> str:
    row = rows.with_format("arrow")[number].to_pylist()[0]
    cells = ((name, cell.get("path") if isinstance(cell, dict) else cell) for name, cell in row.items())
    return "; ".join(f"{name}: {cell}" for name, cell in cells if isinstance(cell, (str, int, float)))[:200]
