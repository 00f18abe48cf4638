"""
Answers the rows of large Parquet files with several workers of Ray Data, on one machine or a cluster.

    pip install -c constraints.txt -e ".[ray]"
    python ray_predict.py my-model rows.parquet answers --workers 2
    python ray_predict.py my-model s3://bucket/rows answers --workers 8 --gpus 1

Each worker loads the model once and takes batches. The output is a folder of Parquet files in the order of the rows,
with all columns of the input and those of the answers: the ones that `mm-transformers predict` writes.
"""

import argparse
import os
from pathlib import Path

import pyarrow
import ray

from mm_transformers import MMTransformerProcessor, Predictor
from mm_transformers.cli.predict import Reading
from mm_transformers.data.cells import RowReader
from mm_transformers.data.sources import media_of
from mm_transformers.training.predictor import answer_columns


class Answers:
    """
    A model that answers batches of rows; each worker of Ray builds its own.

    Args:
        model: a folder or a Hub id. The recipe beside it names the columns.
        batch_size: rows per batch of the model.
        image_root: where relative paths of pictures and sounds start.
    """

    def __init__(self, model: str, batch_size: int, image_root: str | None = None):
        columns, data = Reading().options(model, MMTransformerProcessor.from_pretrained(model).input_columns)
        options = {**columns.collator_options, **data.collator_options}
        self.predictor = Predictor.from_pretrained(model, batch_size=batch_size, **options)
        self.example = answer_columns(self.predictor.example(), answer_keys=self.predictor.answer_keys)
        self.reader = RowReader(None, media_of(self.predictor.collator), image_root)
        print(f"Worker {os.getpid()} has loaded the model.")

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        answered = self.predictor.stream(batch.to_pylist(), prepare=self.reader, keep=lambda row: None)
        answers = [
            answer_columns(answer, answer_keys=self.predictor.answer_keys) for part in answered for _, answer in part
        ]
        if not answers:
            return batch
        # As `mm-transformers predict`: an input column stays beside the answer of the same name.
        batch = batch.rename_columns([f"{name}_input" if name in answers[0] else name for name in batch.column_names])
        for name in answers[0]:
            # The example gives the type, also in a batch without any answer.
            cells = pyarrow.array([*(row[name] for row in answers), self.example[name]])
            batch = batch.append_column(name, cells[:-1])
        return batch


def answer(
    model: str,
    rows: str,
    output: str,
    workers: int = 2,
    batch_size: int = 32,
    gpus: float = 0,
    image_root: str | None = None,
) -> int:
    """
    Answers all rows of a file or folder, and returns their number.

    Args:
        model, batch_size, image_root: as in [`Answers`].
        rows: a Parquet file, or a folder of these.
        output: a folder for Parquet files.
        workers: the models that run at the same time.
        gpus: of each worker.
    """
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        # Each worker takes one CPU; without another one, Ray would wait forever to read rows.
        ray.init(num_cpus=max(os.cpu_count() or 1, workers + 1))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.wait_for_min_actors_s = 600  # until all workers have loaded the model
    # Several blocks for each worker, also of one small file.
    table = ray.data.read_parquet(rows, override_num_blocks=4 * workers)
    answered = table.map_batches(
        Answers,
        fn_constructor_kwargs={"model": model, "batch_size": batch_size, "image_root": image_root},
        batch_format="pyarrow",
        batch_size=8 * batch_size,
        concurrency=workers,
        num_gpus=gpus,
    )
    answered.write_parquet(output)  # block by block: the answers need not fit into memory
    return table.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id; a folder must be there on all machines of a cluster")
    parser.add_argument("rows", help="Parquet file, or folder of these")
    parser.add_argument("output", help="folder for the answers")
    parser.add_argument("--workers", type=int, default=2, help="models that run at the same time")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch of the model")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker; 0.5 lets two workers share one")
    parser.add_argument("--image_root", help="folder for relative paths; by default the folder of the rows")
    options = vars(parser.parse_args())
    model, rows = options["model"], options["rows"]
    # Workers may have another current folder.
    options["model"] = os.path.abspath(model) if os.path.isdir(model) else model
    if "://" not in rows:
        options["rows"] = os.path.abspath(rows)
        folder = Path(rows) if os.path.isdir(rows) else Path(rows).parent
        options["image_root"] = os.path.abspath(options["image_root"] or folder)
    if "://" not in options["output"]:
        options["output"] = os.path.abspath(options["output"])
    print(f"Wrote the answers to {answer(**options):,} rows to {options['output']}.")


if __name__ == "__main__":
    main()
