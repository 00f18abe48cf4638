"""`mm-transformers embed`: the vectors of rows, in a file."""

from functools import partial
from pathlib import Path

import pyarrow
from safetensors.numpy import save

from ..data.tables import check_suffix, plain_cells
from ..model.safe_writing import write_atomically
from ..training.predictor import Predictor
from .predict import Reading, open_rows, write_rows
from .processes import say, this_process


_TENSORS = ".safetensors"


def run_embedding(
    model_name: str,
    file: Path,
    output: Path,
    task: str | None,
    normalize: bool,
    batch_size: int,
    num_workers: int,
    reading: Reading,
    escape_formulas: bool = True,
) -> None:
    """
    Writes the vectors of the rows of a file, or of the pictures and sounds of a folder.

    Args:
        output: a table, with the columns of the input and one column per vector; or .safetensors, with the vectors
            alone, one row each, NaN where one is missing.

    Raises:
        ValueError, OSError: one sentence.
    """
    suffix = check_suffix(output, [_TENSORS])
    opened = open_rows(model_name, file, output, reading)
    predictor = Predictor(opened.model, opened.collator, None, batch_size, num_workers)
    names = list(predictor.embedding_widths(task))
    with opened.errors_with_names():
        if suffix == _TENSORS:
            vectors = predictor.embed(opened.rows, task, normalize, opened.reader)
            if this_process().is_main_process:
                with write_atomically(output) as target:
                    target.write(save(vectors))
                say(f"Wrote the vectors of {len(vectors[names[0]]):,} rows to {output}: {', '.join(names)}.")
            return
        keep = partial(plain_cells, list(opened.types))
        embedded = predictor.stream_embeddings(opened.rows, task, normalize, opened.reader, keep)
        table = (
            (kept, {f"{name}_embedding": None if v is None else v.tolist() for name, v in vectors.items()})
            for batch in embedded
            for kept, vectors in batch
        )
        kinds = {f"{name}_embedding": pyarrow.list_(pyarrow.float32()) for name in names}
        told = "Wrote the vectors of {:,} rows to {}: " + ", ".join(kinds) + "."
        write_rows(table, output, suffix, opened.types, escape_formulas, told, kinds)
