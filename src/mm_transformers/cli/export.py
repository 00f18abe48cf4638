"""`mm-transformers export`: a model as ONNX or torch.export graphs, compared with the model itself."""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..sharing.export import export_model, sample_inputs
from ..sharing.exported_model import ExportedModel
from .processes import say


TOLERANCE = 1e-4


def run_export(model_name: str, output: Path, kind: str, dtype: str) -> None:
    """
    Exports a model and compares the export with it. An export that differs too much is removed.

    Raises:
        ValueError, OSError, ImportError: one sentence.
    """
    if dtype not in ("float32", "int8"):
        raise ValueError(f"--dtype must be float32 or int8, but is {dtype!r}.")
    model = MMTransformerForMultiTask.from_pretrained(model_name, dtype=torch.float32)
    processor = MMTransformerProcessor.from_pretrained(model_name)
    say(f"Exporting {model_name}; this can take minutes.")
    export_model(model, processor, output, kind, int8=dtype == "int8")
    differences = compare(model, processor, output)
    try:
        _check(differences, is_exact=dtype == "float32")
    except ValueError:
        shutil.rmtree(output, ignore_errors=True)  # it would be used otherwise
        raise
    table = Table("task", "largest difference")
    for name, difference in differences.items():
        table.add_row(name, f"{difference:.1e}")
    Console(markup=False).print(table)  # names are no styles
    size = sum(path.stat().st_size for path in output.iterdir() if path.suffix in (".onnx", ".data", ".pt2"))
    say(f"The graphs in {output} have {size / 1e6:,.1f} MB; the weights of the model {_size(model) / 1e6:,.1f} MB.")


def _check(differences: dict[str, float], is_exact: bool) -> None:
    name = max(differences, key=lambda task: differences[task])
    if differences[name] > (TOLERANCE if is_exact else sys.float_info.max):
        limit = f"more than the allowed {TOLERANCE:.0e}" if is_exact else "some of its logits are not finite"
        raise ValueError(
            f"The exported model differs from the model by {differences[name]:.1e} in task {name!r}, {limit}. It was "
            "removed: do not use copies of it."
        )


@torch.no_grad()
def compare(
    model: MMTransformerForMultiTask, processor: MMTransformerProcessor, folder: str | os.PathLike[str]
) -> dict[str, float]:
    """
    Task -> the largest difference between the logits of a model and those of its export; infinite for NaN.

    It is relative to the largest logit, but at least to 1 or the scale of the task. The rows differ from the traced
    ones in number and length, and come with and without images and sound. For a task that writes, the value is the
    share of answers that differ.
    """
    # Created by this process.
    exported, differences = ExportedModel(folder, trust_pickle=True), dict.fromkeys(model.tasks, 0.0)
    full: dict[str, Any] = sample_inputs(model, processor, 4)
    text: dict[str, Any] = {
        name: value for name, value in full.items() if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    alone: dict[str, Any] = {name: value[:1] for name, value in text.items()}
    for inputs in (full, text, alone):
        expected, found = model(**inputs).logits, exported(**inputs).logits
        for name, task in model.tasks.items():
            if task.needs_decoder:
                wanted, written = model.generate(name, **inputs), exported.generate(name, **inputs)
                same = [list(a) == list(b) for a, b in zip(wanted.tolist(), written.tolist(), strict=True)]
                difference = 1 - sum(same) / len(same)
            else:
                difference = _difference(expected[name].float().cpu(), found[name].float(), task.logit_unit)
            differences[name] = max(differences[name], difference)
    return differences


def _difference(expected: torch.Tensor, found: torch.Tensor, unit: float) -> float:
    """The largest difference, over the largest logit or `unit`; infinite if NaN and infinity are at other places."""
    known = expected.isfinite()
    if expected.shape != found.shape or not torch.allclose(found[~known], expected[~known], equal_nan=True):
        return math.inf
    if not known.any():
        return 0.0
    difference = float((expected - found)[known].abs().max())
    return math.inf if math.isnan(difference) else difference / max(unit, float(expected[known].abs().max()))


def _size(model: MMTransformerForMultiTask) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())
