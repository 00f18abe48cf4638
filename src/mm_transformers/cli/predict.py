"""`mm-transformers evaluate` and `mm-transformers predict`: a trained model and a file of rows."""

import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from ..data.folders import FolderRows
from ..data.labels import check_labels, has_labels, prepare_labels
from ..data.loading import leave_out_empty_rows, load_files
from ..data.row_labels import as_columns
from ..data.sources import media_of
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
from ..training.recipe.recipe import are_columns
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
        columns: "text", "image", "video" or "audio" -> the name of the column, or several names.
    """

    columns: Mapping[str, str | list[str] | None] = field(default_factory=dict)
    image_root: str | None = None
    on_bad_file: str | None = None
    # Only from the command line: the recipe beside a model may come from a stranger.
    allow_urls: bool | list[str] = False

    def options(self, model: str, known: Mapping[str, Sequence[str]]) -> tuple[ColumnsSection, DataSection]:
        """
        The columns and the data section.

        Args:
            model: its folder or Hub id.
            known: the columns that the processor knows; a model may be without its recipe.

        Raises:
            ValueError: if the recipe is no YAML.
        """
        columns, data = ColumnsSection.from_columns(known), DataSection()
        check_folder(model)
        path = cached_file(model, RECIPE_NAME, _raise_exceptions_for_missing_entries=False)
        # Only the options for reading rows; others may be from another release.
        recipe = read_yaml(Path(path)) if path is not None else {}
        for section, name in ((columns, "columns"), (data, "data")):
            said = recipe.get(name)
            for option in fields(section):
                value = said.get(option.name) if isinstance(said, dict) else None
                if isinstance(value, (str, int, float)) or (
                    option.name in ("text", "image", "audio") and are_columns(value)
                ):
                    setattr(section, option.name, value)
        said = recipe.get("columns")
        if isinstance(said, dict):
            columns.text = None if said.get("text", "") is None else columns.text
            columns.own |= {name: column for name, column in said.items() if name in PARTS and isinstance(column, str)}
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
    model, collator, columns, data = load_model(model_name, reading)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_eval_batch_size=batch_size, report_to="none")
        show_progress_of_package(args.should_log)
        with args.main_process_first(desc="reading the data"):
            rows = _read(model, file, columns, data)
        _check_columns(rows.column_names, collator, columns, reading, file)
        check_labels({file.name: rows}, model.tasks.values(), columns.text, data.label_separator)
        rows = _with_content(rows, model, collator, file)
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
    model, collator, columns, data = load_model(model_name, reading)
    rows = _read(model, file, columns, data)
    _check_columns(rows.column_names, collator, columns, reading, file)
    check_labels({file.name: rows}, model.tasks.values(), columns.text, data.label_separator)
    return model, collator, _with_content(rows, model, collator, file)


def _with_content(
    rows: datasets.Dataset, model: MMTransformerForMultiTask, collator: MMDataCollator, file: Path
) -> datasets.Dataset:
    splits, table = datasets.DatasetDict({file.name: rows}), model.config.table_config
    numbers = [] if table is None else [column["name"] for column in table.numbers]
    leave_out_empty_rows(splits, collator.input_columns, numbers)
    return splits[file.name]


def _read(model: MMTransformerForMultiTask, file: Path, columns: ColumnsSection, data: DataSection) -> datasets.Dataset:
    splits = load_files({"test": str(file)}, columns.files, data.image_root, option="The file")
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
    probabilities: bool = False,
    coverage: float | None = None,
) -> None:
    """
    Answers the rows of a file, or the pictures and sounds of a folder.

    Args:
        coverage: also writes sets or intervals that hold the truth in this share of rows.
        probabilities: also writes a column with the probability of each label.
        escape_formulas: as in [`table_writer`].

    Raises:
        ValueError, OSError: one sentence.
    """
    suffix = check_suffix(output)
    opened = open_rows(model_name, file, output, reading, tasks)
    options = {} if num_beams is None else {"num_beams": num_beams}
    predictor = Predictor(
        opened.model, opened.collator, tasks, batch_size, num_workers, probabilities, coverage, **options
    )
    names, keys = predictor.probability_names, predictor.answer_keys
    answered = predictor.stream(opened.rows, prepare=opened.reader, keep=partial(plain_cells, list(opened.types)))
    table = ((kept, answer_columns(answers, names, keys)) for batch in answered for kept, answers in batch)
    told = "Wrote the answers to {:,} rows to {}."
    with opened.errors_with_names():
        example, new_types = None, None
        if suffix == ".parquet":
            answers = predictor.example()
            example = answer_columns(answers, names, keys)
            new_types = {} if coverage is None else _promise_types(answers)
        write_rows(table, output, suffix, opened.types, escape_formulas, told, new_types, example)


def _promise_types(answers: Mapping[str, Any]) -> dict[str, pyarrow.DataType]:
    """The types of the columns of sets and intervals. Without them, first rows without an interval would be texts."""
    types = {
        "set": pyarrow.list_(pyarrow.string()),
        "interval": pyarrow.list_(pyarrow.float64()),
        "abstain": pyarrow.bool_(),
        "odd": pyarrow.bool_(),
    }
    promised = {task: answer for task, answer in answers.items() if isinstance(answer, dict) and "abstain" in answer}
    return {f"{task}_{key}": kind for task, found in promised.items() for key, kind in types.items() if key in found}


@dataclass
class OpenedRows:
    """
    A model, and the rows of a file or folder for it.

    Args:
        reader: a row -> the row for the collator.
        types: the columns to keep in an output, with their types.
    """

    file: Path
    model: MMTransformerForMultiTask
    collator: MMDataCollator
    rows: TableRows | FolderRows
    reader: Callable[[Any], Mapping[str, Any]]
    types: dict[str, pyarrow.DataType]

    @contextmanager
    def errors_with_names(self) -> Iterator[None]:
        """Adds the name of the file to errors, and tells how many bad files were dropped."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error
        if self.collator.num_bad_files:
            logger.warning(
                f"Reading a file failed {self.collator.num_bad_files:,} times; these files were treated as missing."
            )


def open_rows(
    model_name: str, file: Path, output: Path, reading: Reading, tasks: list[str] | None = None
) -> OpenedRows:
    """
    A model on the device of this process, and the rows of a table, or the files of a folder.

    Raises:
        ValueError, OSError: one sentence, also if the output cannot be written or the model lacks a task.
    """
    check_writable(output)
    if output.exists() and file.exists() and output.samefile(file):
        raise ValueError(f"The output would overwrite the rows: {output} is the input.")
    table = None if file.is_dir() else TableRows(file)  # an unreadable table is told before the model is loaded
    model, collator, columns, data = load_model(model_name, reading)
    check_tasks(model, tasks)
    state = this_process()
    show_progress_of_package(state.is_main_process)
    model = model.to(state.device)
    if table is None:
        folder = FolderRows(file, collator)
        return OpenedRows(file, model, collator, folder, folder.read, dict.fromkeys(folder.columns, pyarrow.string()))
    _check_columns(table.schema.names, collator, columns, reading, file)
    reader = RowReader(
        _features(table.schema, collator.input_columns),
        {name: part for name, part in media_of(collator).items() if MODALITIES[part].has_files},
        data.image_root or str(file.parent),
    )
    return OpenedRows(file, model, collator, table, reader, table.plain_types())


def load_model(
    name: str, reading: Reading
) -> tuple[MMTransformerForMultiTask, MMDataCollator, ColumnsSection, DataSection]:
    """A saved model, a collator for rows as `reading` says, and how they are read."""
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        checkpoint = newest_checkpoint(name)
        advice = "" if checkpoint is None else f"; its training has not ended, but it has the checkpoint {checkpoint}"
        raise ValueError(f"{name} holds no model{advice}.")
    model = MMTransformerForMultiTask.from_pretrained(name).eval()
    processor = MMTransformerProcessor.from_pretrained(name)
    columns, data = reading.options(name, processor.input_columns)
    options: dict[str, Any] = {**columns.collator_options, **data.collator_options}
    return model, MMDataCollator(processor, model.config, allow_urls=reading.allow_urls, **options), columns, data


def _check_columns(
    names: list[str], collator: MMDataCollator, columns: ColumnsSection, reading: Reading, file: Path
) -> None:
    known = ", ".join(map(repr, names))
    for part in ("text", "image", "video", "audio"):
        asked = reading.columns.get(part) is not None
        missing = [column for column in as_columns(getattr(columns, part)) if column not in names]
        if missing and (asked or (part == "text" and collator.text_column is not None)):
            raise ValueError(f"{file} has no column {missing[0]!r}; set --{part}_column to one of {known}.")
    for column in (column for table in collator.tables.values() for column in table.columns):
        if column not in names:
            raise ValueError(
                f"{file} has no column {column!r}, which the model reads as a number or a category; its columns are "
                f"{known}."
            )
    media = [name for column in collator.media.values() for name in column.columns]
    if media and not set(media) & set(names):
        logger.warning(
            f"{file} has no column {' or '.join(map(repr, media))}, so its rows have no {' or '.join(collator.media)}; "
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


def write_rows(
    rows: Iterable[tuple[dict[str, Any], dict[str, Any]]],
    output: Path,
    suffix: str,
    types: Mapping[str, pyarrow.DataType],
    escape_formulas: bool,
    told: str,
    new_types: Mapping[str, pyarrow.DataType] | None = None,
    example: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes a table, in the main process only; the others compute their share.

    Args:
        rows: the cells of the input that are kept, and the new ones.
        types: of the kept columns.
        told: the sentence at the end, with places for the number of rows and the file.
        new_types: of new columns, if known.
        example: new cells that have a type, for others that are all empty in the first rows.
    """
    if not this_process().is_main_process:
        for _ in rows:
            pass
        return
    writer, num_rows, names = None, 0, {}
    bar = Progress(
        TextColumn("answering"), SpinnerColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with write_atomically(output) as file, bar:
        shown = bar.add_task("", total=None)
        for kept, new in rows:
            if writer is None:
                # The input column stays beside the answer, under another name.
                names = {name: f"{name}_input" if name in new else name for name in types}
                twice = next((name for name in names if f"{name}_input" in types and names[name] != name), None)
                if twice is not None:
                    raise ValueError(
                        f"its columns {twice!r}, which has the name of an answer, and '{twice}_input' would have the "
                        f"same name '{twice}_input' in the output; rename one of them."
                    )
                renamed = {names[name]: dtype for name, dtype in types.items()}
                writer = table_writer(file, suffix, {**renamed, **(new_types or {})}, escape_formulas, example)
            writer.write([{names[n]: cell for n, cell in kept.items()} | new])
            num_rows += 1
            bar.advance(shown)
        if writer is not None:
            writer.close()
    say(told.format(num_rows, output))
