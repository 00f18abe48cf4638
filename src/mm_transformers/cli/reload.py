"""Answers of a saved model in a process of its own: `python -m mm_transformers.cli.reload MODEL ROWS OUTPUT`."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

import mm_transformers  # noqa: F401 (registers the auto classes)


def main(model_dir: str, rows_file: str, output_file: str) -> None:
    """
    Args:
        model_dir: folder with a model and its processor.
        rows_file: JSON lines with "text" and "image", a path relative to the file.
        output_file: where the logits go, as safetensors.
    """
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    processor, model = AutoProcessor.from_pretrained(model_dir), AutoModel.from_pretrained(model_dir).eval()
    images = [str(Path(rows_file).parent / row["image"]) for row in rows]
    inputs = processor(text=[row["text"] for row in rows], images=images)
    save_file({name: logits.contiguous() for name, logits in model(**inputs).logits.items()}, output_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
