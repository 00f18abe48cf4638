"""`mm-transformers export`: a model as ONNX or torch.export graphs, compared with the model itself."""

import os
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
    Exports a model and compares the export with it.

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
    table = Table("task", "largest difference")
    for name, difference in differences.items():
        table.add_row(name, f"{difference:.1e}")
    Console(markup=False).print(table)  # names are no styles
    size = sum(path.stat().st_size for path in output.iterdir() if path.suffix in (".onnx", ".data", ".pt2"))
    say(f"The graphs in {output} have {size / 1e6:,.1f} MB; the weights of the model {_size(model) / 1e6:,.1f} MB.")
    worst = max(differences.values())
    if dtype == "float32" and not worst <= TOLERANCE:
        raise ValueError(
            f"The exported model differs from the model by {worst:.1e}, more than the allowed {TOLERANCE:.0e}: "
            "do not use it."
        )


@torch.no_grad()
def compare(
    model: MMTransformerForMultiTask, processor: MMTransformerProcessor, folder: str | os.PathLike[str]
) -> dict[str, float]:
    """
    Task -> the largest difference between the logits of a model and those of its export.

    The rows differ from the traced ones in number and length, and come with and without images and sound. For a task
    that writes, the value is the share of answers that differ.
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
                difference = (expected[name].cpu() - found[name]).abs().max().item()
            differences[name] = max(differences[name], difference)
    return differences


def _size(model: MMTransformerForMultiTask) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())
