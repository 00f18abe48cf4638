"""The answers of a saved model in a fresh process: `python -m mm_transformers.cli.reload MODEL ROWS OUTPUT`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, BatchFeature

import mm_transformers  # noqa: F401 (registers the auto classes)
from mm_transformers.model.answers import evaluation_mode
from mm_transformers.model.modeling_mm_transformer import MMTransformerForMultiTask


def answers_of(model: MMTransformerForMultiTask, inputs: BatchFeature) -> dict[str, torch.Tensor]:
    """For each task the logits, or the written token ids."""
    inputs = inputs.to(model.device)
    with evaluation_mode(model), torch.no_grad():
        answers = dict(model(**inputs).logits or {})
        answers |= {name: model.generate(name, **inputs) for name, task in model.tasks.items() if task.needs_decoder}
    return {name: value.cpu().contiguous() for name, value in answers.items()}


def main(model_dir: str, rows_file: str, output_file: str) -> None:
    """
    Writes the answers of a saved model to a file.

    Args:
        model_dir: folder with a model and its processor.
        rows_file: JSON lines with "text" and "image", a path relative to the file.
        output_file: the file of the answers, as safetensors.
    """
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    processor, model = AutoProcessor.from_pretrained(model_dir), AutoModel.from_pretrained(model_dir)
    images = [str(Path(rows_file).parent / row["image"]) for row in rows]
    save_file(answers_of(model, processor(text=[row["text"] for row in rows], images=images)), output_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
