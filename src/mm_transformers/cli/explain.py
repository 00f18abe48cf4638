"""`mm-transformers explain`: explanations of the answers of a saved model."""

import json
from pathlib import Path
from typing import Any

from ..analysis import ablate, explain
from ..analysis.explaining.methods import check_method
from ..analysis.report import write_report
from ..data.files import check_writable
from ..model.answers import check_tasks
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.safe_writing import write_atomically
from .metrics_table import print_ablation
from .predict import Reading, load_with_rows
from .processes import say


_PICTURES = (".png", ".svg", ".pdf")


def explain_rows(
    model_name: str,
    file: Path,
    output: Path,
    tasks: list[str] | None,
    method: str,
    num_examples: int,
    with_ablation: bool,
    batch_size: int,
    reading: Reading,
) -> None:
    """
    Writes the page of explanations for a file of rows.

    Raises:
        ValueError, OSError: one sentence.
    """
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"For a file of rows, --output must end in .html, but is {output}.")
    check_writable(output)
    check_method(method)
    model, collator, rows = load_with_rows(model_name, file, reading)
    check_tasks(model, tasks)
    ablation = None
    if with_ablation:
        ablation = ablate(model, collator.processor, rows, tasks, collator, batch_size=batch_size)
        print_ablation(ablation)
    title = f"{Path(model_name).name} on {file.name}"
    write_report(
        output, model, collator.processor, rows, tasks, method, num_examples, title, ablation, collator, batch_size
    )
    say(f"Wrote {output}.")


def explain_one(
    model_name: str,
    row: dict[str, Any],
    output: Path,
    tasks: list[str] | None,
    method: str,
    answer: str | None,
    word: int | None,
) -> None:
    """
    Draws the explanation of one row.

    Raises:
        ValueError, OSError: one sentence.
    """
    if output.suffix not in (*_PICTURES, ".json"):
        raise ValueError(f"For one row, --output must end in {', '.join(_PICTURES)} or .json, but is {output}.")
    check_writable(output)
    model = MMTransformerForMultiTask.from_pretrained(model_name).eval()
    processor = MMTransformerProcessor.from_pretrained(model_name)
    names = check_tasks(model, tasks)
    if len(names) > 1:
        raise ValueError(f"Choose the task to explain by --task, one of {', '.join(names)}.")
    told = None if answer is None else model.tasks[names[0]].read_answer(answer)
    explanation = explain(model, processor, row, names[0], method, told, word)
    with write_atomically(output) as file:
        if output.suffix == ".json":
            file.write((json.dumps(explanation.to_dict(), indent=2) + "\n").encode())
        else:
            explanation.plot().savefig(file, format=output.suffix[1:], dpi=120)
    say(f"{explanation.task}: {explanation.answer}. It depends on: {explanation.rests_on}. Wrote {output}.")
