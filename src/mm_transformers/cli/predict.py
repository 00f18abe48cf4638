"""`mm-transformers evaluate` and `mm-transformers predict`: a trained model and a file of rows."""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import TrainingArguments
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..analysis import Ablation, ablate
from ..data.cells import RowReader
from ..data.collator import MMDataCollator
from ..data.files import check_writable
from ..data.labels import check_labels, has_labels, prepare_labels
from ..data.loading import load_files
from ..data.row_labels import text_columns
from ..data.tables import TableRows, check_suffix, plain_cells, table_writer
from ..model.answers import check_tasks
from ..model.messages import check_folder
from ..model.modalities import MODALITIES, PARTS
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.safe_writing import write_atomically
from ..training.predictor import Predictor, answer_columns
from ..training.recipe import RECIPE_NAME, ColumnsSection, DataSection
from ..training.recipe.output_folder import newest_checkpoint
from ..training.recipe.yaml_format import read_yaml
from ..training.trainer import MMTrainer
from .metrics_table import print_ablation, print_metrics
from .processes import say, this_process
from .train import show_progress_of_package


logger = logging.get_logger(__name__)


@dataclass
class Reading:
    """
    Options for reading rows; `None` stands for the value of the recipe beside the model, or the default.

    Args:
        columns: "text", "image", "video" or "audio" -> the name of the column.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    image_root: str | None = None
    on_bad_file: str | None = None
    # Only from the command line: the recipe beside a model may come from a stranger.
    allow_urls: bool | list[str] = False

    def options(self, model: str) -> tuple[ColumnsSection, DataSection]:
        """
        The columns and the data section.

        Raises:
            ValueError: if the recipe is no YAML.
        """
        columns, data = ColumnsSection(), DataSection()
        check_folder(model)
        path = cached_file(model, RECIPE_NAME, _raise_exceptions_for_missing_entries=False)
        # Only the options for reading rows; others may be from another release.
        recipe = read_yaml(Path(path)) if path is not None else {}
        for section, name in ((columns, "columns"), (data, "data")):
            said = recipe.get(name)
            for option in fields(section):
                value = said.get(option.name) if isinstance(said, dict) else None
                if isinstance(value, (str, int, float)) or (option.name == "text" and isinstance(value, list)):
                    setattr(section, option.name, value)
        said = recipe.get("columns")
        if isinstance(said, dict):
            columns.text = None if said.get("text", "") is None else columns.text
            columns.own = {name: column for name, column in said.items() if name in PARTS and isinstance(column, str)}
        for name in ("text", "image", "video", "audio"):
            columns.own.pop(name, None)
            setattr(columns, name, self.columns.get(name) or getattr(columns, name))
        data.image_root = self.image_root or data.image_root
        data.on_bad_file = self.on_bad_file or data.on_bad_file
        return columns, data


def run_evaluation(
    model_name: str,
    file: Path,
    output: Path | None,
    batch_size: int,
    reading: Reading,
    with_ablation: bool = False,
    slices: Sequence[str] = (),
) -> None:
    """
    Measures a model on the labelled rows of a file.

    Raises:
        ValueError, OSError: one sentence.
    """
    if output is not None:
        check_writable(output)
    with evaluator(model_name, file, batch_size, reading) as (trainer, rows):
        metrics: dict[str, Any] = {**trainer.evaluate(), "eval_samples": len(rows)}
        if not trainer.args.should_save:
            return
        print_metrics({file.name: metrics}, {file.name: "eval"}, list(trainer.fused_model.tasks))
        if with_ablation:
            ablation = ablation_of(trainer, rows, batch_size, slices)
            print_ablation(ablation)
            metrics["ablation"] = ablation.to_dict()
            if output is not None:
                picture = output.with_suffix(".png")
                with write_atomically(picture) as drawn:
                    ablation.plot().savefig(drawn, format="png", dpi=120)
                say(f"Wrote {picture}.")
        if output is not None:
            with write_atomically(output) as target:
                target.write((json.dumps(metrics, indent=2) + "\n").encode())
            say(f"Wrote {output}.")


def ablation_of(trainer: MMTrainer, rows: datasets.Dataset, batch_size: int, slices: Sequence[str] = ()) -> Ablation:
    """The contribution of each modality, by the metrics of the trainer."""
    return ablate(
        trainer.fused_model,
        trainer.data_collator.processor,
        rows,
        collator=trainer.data_collator,
        slices=slices,
        batch_size=batch_size,
        compute_metrics=trainer.compute_metrics,
    )


@contextmanager
def evaluator(
    model_name: str, file: Path, batch_size: int, reading: Reading
) -> Iterator[tuple[MMTrainer, datasets.Dataset]]:
    """
    A trainer of a saved model for the labelled rows of a file, and these rows.

    Raises:
        ValueError, OSError: one sentence.
    """
    columns, data = reading.options(model_name)
    model, collator = _load(model_name, columns, data, reading.allow_urls)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_eval_batch_size=batch_size, report_to="none")
        show_progress_of_package(args.should_log)
        with args.main_process_first(desc="reading the data"):
            rows = _read(model, file, columns, data)
        _check_columns(rows.column_names, collator, columns, reading, file)
        check_labels({file.name: rows}, model.tasks.values(), columns.text, data.label_separator)
        _check_labelled(rows, collator, file)
        yield MMTrainer(model, args, data_collator=collator, eval_dataset=rows), rows


def load_with_rows(
    model_name: str, file: Path, reading: Reading
) -> tuple[MMTransformerForMultiTask, MMDataCollator, datasets.Dataset]:
    """
    A saved model, and the rows of a file, with or without labels.

    Raises:
        ValueError, OSError: one sentence.
    """
    columns, data = reading.options(model_name)
    model, collator = _load(model_name, columns, data, reading.allow_urls)
    rows = _read(model, file, columns, data)
    _check_columns(rows.column_names, collator, columns, reading, file)
    check_labels({file.name: rows}, model.tasks.values(), columns.text, data.label_separator)
    return model, collator, rows


def _read(model: MMTransformerForMultiTask, file: Path, columns: ColumnsSection, data: DataSection) -> datasets.Dataset:
    media = (columns.image, columns.video, columns.audio)
    splits = load_files({"test": str(file)}, media, data.image_root, option="The file")
    tasks = [task.to_dict() for task in model.tasks.values()]
    return prepare_labels(splits, tasks)["test"]


def run_prediction(
    model_name: str,
    file: Path,
    output: Path,
    tasks: list[str] | None,
    batch_size: int,
    num_workers: int,
    num_beams: int | None,
    reading: Reading,
    escape_formulas: bool = True,
) -> None:
    """
    Answers the rows of a file.

    Args:
        escape_formulas: as in [`table_writer`].

    Raises:
        ValueError, OSError: one sentence.
    """
    suffix = check_suffix(output)
    check_writable(output)
    if output.exists() and file.exists() and output.samefile(file):
        raise ValueError(f"The answers would overwrite the rows: {output} is the input.")
    rows = TableRows(file)
    types = rows.plain_types()
    columns, data = reading.options(model_name)
    model, collator = _load(model_name, columns, data, reading.allow_urls)
    check_tasks(model, tasks)
    state = this_process()
    show_progress_of_package(state.is_main_process)
    _check_columns(rows.schema.names, collator, columns, reading, file)
    reader = RowReader(
        _features(rows.schema, collator.input_columns),
        {column.column: kind for kind, column in collator.media.items() if MODALITIES[kind].has_files},
        data.image_root or str(file.parent),
    )
    options: dict[str, Any] = {} if num_beams is None else {"num_beams": num_beams}
    predictor = Predictor(model.to(state.device), collator, tasks, batch_size, num_workers, **options)
    answered = predictor.stream(rows, prepare=reader, keep=partial(plain_cells, list(types)))
    try:
        if state.is_main_process:
            num_rows = _write(answered, output, suffix, types, escape_formulas)
            say(f"Wrote the answers to {num_rows:,} rows to {output}.")
        else:
            for _ in answered:  # processes its share
                pass
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if collator.num_bad_files:
        logger.warning(f"Reading a file failed {collator.num_bad_files:,} times; these files were treated as missing.")


def _load(
    name: str, columns: ColumnsSection, data: DataSection, allow_urls: bool | list[str]
) -> tuple[MMTransformerForMultiTask, MMDataCollator]:
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        checkpoint = newest_checkpoint(name)
        advice = "" if checkpoint is None else f"; its training has not ended, but it has the checkpoint {checkpoint}"
        raise ValueError(f"{name} holds no model{advice}.")
    model = MMTransformerForMultiTask.from_pretrained(name).eval()
    processor = MMTransformerProcessor.from_pretrained(name)
    options: dict[str, Any] = {**columns.collator_options, **data.collator_options}
    return model, MMDataCollator(processor, model.config, allow_urls=allow_urls, **options)


def _check_columns(
    names: list[str], collator: MMDataCollator, columns: ColumnsSection, reading: Reading, file: Path
) -> None:
    known = ", ".join(map(repr, names))
    for part in ("text", "image", "video", "audio"):
        asked = reading.columns.get(part) is not None
        missing = [column for column in text_columns(getattr(columns, part)) if column not in names]
        if missing and (asked or (part == "text" and collator.text_column is not None)):
            raise ValueError(f"{file} has no column {missing[0]!r}; set --{part}_column to one of {known}.")
    for column in (column for table in collator.tables.values() for column in table.columns):
        if column not in names:
            raise ValueError(
                f"{file} has no column {column!r}, which the model reads as a number or a category; its columns are "
                f"{known}."
            )
    media = {kind: column.column for kind, column in collator.media.items()}
    if media and not set(media.values()) & set(names):
        logger.warning(
            f"{file} has no column {' or '.join(map(repr, media.values()))}, so its rows have no {' or '.join(media)}; "
            f"its columns are {known}."
        )


def _check_labelled(rows: datasets.Dataset, collator: MMDataCollator, file: Path) -> None:
    """
    Checks that the rows have labels.

    Raises:
        ValueError: if there is nothing to measure.
    """
    wanted = [task for task in collator.tasks.values() if task.default_cell is None]
    labelled = [task for task in wanted if has_labels(rows, task, collator.text_column, collator.label_separator)]
    if not labelled and len(wanted) == len(collator.tasks):
        columns = ", ".join(repr(task.column) for task in wanted)
        raise ValueError(
            f"{file} has no label of any task (looked for in column {columns}), so there is nothing to measure. For "
            "the answers of the model, use `mm-transformers predict`."
        )
    for task in wanted:
        if task not in labelled and task.column in rows.column_names:
            logger.warning(f"{file} has no label of task {task.name!r}: column {task.column!r} is empty.")


def _features(schema: pyarrow.Schema, columns: Collection[str]) -> dict[str, Any]:
    """
    The features of these columns: those of the data set in a Parquet file, or those of the types of another file.

    Other columns may have types that `datasets` does not know.
    """
    fields = [field for field in schema if field.name in columns]
    return dict(datasets.Features.from_arrow_schema(pyarrow.schema(fields, schema.metadata)))


def _write(
    answered: Iterator[list[tuple[Any, dict[str, Any]]]],
    output: Path,
    suffix: str,
    types: dict[str, Any],
    escape_formulas: bool,
) -> int:
    """Writes the answers, and returns the number of rows."""
    writer, num_rows, names = None, 0, {}
    bar = Progress(
        TextColumn("answering"), SpinnerColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with write_atomically(output) as file, bar:
        shown = bar.add_task("", total=None)
        for batch in answered:
            rows = [(kept, answer_columns(answers)) for kept, answers in batch]
            if writer is None:
                # The input column stays beside the answer, under another name.
                names = {name: f"{name}_input" if name in rows[0][1] else name for name in types}
                twice = next((name for name in names if f"{name}_input" in types and names[name] != name), None)
                if twice is not None:
                    raise ValueError(
                        f"its columns {twice!r}, which has the name of an answer, and '{twice}_input' would have the "
                        f"same name '{twice}_input' in the output; rename one of them."
                    )
                renamed = {names[name]: dtype for name, dtype in types.items()}
                writer = table_writer(file, suffix, renamed, escape_formulas)
            writer.write([{names[n]: cell for n, cell in kept.items()} | answers for kept, answers in rows])
            num_rows += len(rows)
            bar.advance(shown, len(rows))
        if writer is not None:
            writer.close()
    return num_rows
