"""Checks of arguments and data before a training begins."""

import difflib
import os
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..data.collator import MMDataCollator
from ..data.mixture import DataMixture
from ..data.row_labels import rows_with_columns
from ..data.sources import ANY_SOURCE, SOURCE_KEY, DataSource, columns_of, is_iterable
from ..model.label_cells import is_missing
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.task_base import Task
from .metrics import is_known_error, result_names


logger = logging.get_logger(__name__)


def check_arguments(args: TrainingArguments) -> None:
    """
    Checks the training arguments.

    Raises:
        ValueError: if an option would be ignored, or cannot work.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and nn.DataParallel cannot split a batch of images: start one "
            "process per GPU by `accelerate launch`, or limit it to one GPU by CUDA_VISIBLE_DEVICES=0."
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            "MMTrainer takes no label_smoothing_factor: smoothing is an option of the task, as in "
            "Classification(..., label_smoothing=0.1)."
        )
    if getattr(args, "sortish_sampler", False):
        raise ValueError(
            "MMTrainer does not support sortish_sampler; to group rows by length, use "
            "train_sampling_strategy='group_by_length'."
        )
    if args.batch_eval_metrics:
        raise ValueError("MMTrainer computes metrics over all rows at once; leave out batch_eval_metrics.")
    if args.label_names not in (None, ["labels"]):
        raise ValueError(
            f"label_names={args.label_names!r} is not supported: leave it out. A batch holds the labels of all tasks "
            "under 'labels', and each task names its column."
        )
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started != args.world_size:
        raise ValueError(
            f"{num_started} processes were started, but each would train alone, since torch finds no GPU. To train "
            "on CPUs, set use_cpu=True in the training arguments (--use_cpu)."
        )


def check_parts(data_collator: Any, processing_class: Any, train_dataset: Any, compute_loss_func: Any) -> None:
    """
    Checks the parts of a trainer.

    Raises:
        ValueError: if they do not fit [`MMTrainer`].
    """
    if compute_loss_func is not None:
        raise ValueError("MMTrainer takes no compute_loss_func: the loss of a task is its method `loss`.")
    if data_collator is None and processing_class is None:
        raise ValueError(
            "MMTrainer needs a model and its processor: MMTrainer(model, args, processing_class=processor)."
        )
    if data_collator is None and not hasattr(processing_class, "tokenizer"):
        raise ValueError(
            f"processing_class must be an MMTransformerProcessor, but is a {type(processing_class).__name__}: make "
            "one by MMTransformerProcessor.from_encoders(text=..., vision=...)."
        )
    if isinstance(train_dataset, dict) and hasattr(train_dataset, "column_names"):
        # A DatasetDict, which also has splits that are not for training.
        raise ValueError(f"train_dataset must be one split, not all of {', '.join(map(repr, train_dataset))}.")


def check_best_metric(args: TrainingArguments, tasks: Iterable[Task], eval_dataset: Any) -> None:
    """
    Checks `metric_for_best_model`.

    Raises:
        ValueError: if it is not among the measured metrics.
    """
    wanted = args.metric_for_best_model
    if wanted is None or eval_dataset is None:
        return
    name = wanted.removeprefix("eval_")
    if isinstance(eval_dataset, dict):
        of_one = [dataset for dataset in eval_dataset if name.startswith(f"{dataset}_")]
        name = name.removeprefix(f"{max(of_one, key=len)}_") if of_one else name
    tasks = list(tasks)
    measured = {task.name: [f"{task.name}_{key}" for key in ("loss", *result_names(task))] for task in tasks}
    known = ["loss", *(key for keys in measured.values() for key in keys)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1) or known
        raise ValueError(
            f"metric_for_best_model is {wanted!r}, but no such metric is computed; "
            + (f"did you mean 'eval_{near[0]}'?" if len(near) == 1 else f"known are {', '.join(near)}.")
        )
    columns = None if isinstance(eval_dataset, (dict, DataSource)) else getattr(eval_dataset, "column_names", None)
    for task in tasks:
        if name in measured[task.name] and columns and task.default_cell is None and task.column not in columns:
            raise ValueError(
                f"metric_for_best_model is {wanted!r}, but the eval data set has no column {task.column!r} (its "
                f"columns are {', '.join(map(repr, columns))}), so task {task.name!r} is not measured there."
            )


def check_direction(args: TrainingArguments) -> None:
    """
    Checks `greater_is_better`.

    Raises:
        ValueError: if the best weights would be the worst.
    """
    wanted = args.metric_for_best_model
    if wanted is not None and is_known_error(wanted) and args.greater_is_better:
        raise ValueError(
            f"metric_for_best_model is {wanted!r}, and lower values are better: set greater_is_better to False."
        )


def check_adapters(fused: MMTransformerForMultiTask) -> None:
    """Warns if adapters are trained and new modules are not."""
    idle = []
    for name in fused.new_modules:
        module = getattr(fused.model, name, None) or getattr(fused, name)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            idle.append(name)
    if idle:
        logger.warning(
            f"{', '.join(idle)} will neither be trained nor saved with the adapters. To train them, set "
            "modules_to_save=model.new_modules in the config of the adapters."
        )


def check_columns(dataset: Any, name: str, collator: MMDataCollator) -> None:
    """
    Checks the columns of a data set.

    Args:
        name: "train" or "eval".

    Raises:
        ValueError: if the column of texts is missing, or all columns of labels are missing or empty.
    """
    columns = columns_of(dataset)
    if isinstance(dataset, DataMixture):
        return
    if not columns or isinstance(dataset, DataSource):
        if name == "train":
            check_any_label(dataset, collator)
        return
    shown = ", ".join(repr(column) for column in columns)
    without = [column for column in collator.text_columns if column not in columns]
    if without:
        raise ValueError(
            f"The {name} data set has no column {without[0]!r} (its columns are {shown}); name the column of "
            "your texts by data_collator=MMDataCollator(processor, model.config, text_column=...)."
        )
    media = [name for column in collator.media.values() for name in column.columns]
    if media and not set(media) & set(columns):
        logger.warning(
            f"The {name} data set has no column {' or '.join(map(repr, media))} (its columns are {shown}), so "
            f"its rows have no {' or '.join(collator.media)}; if they do, name the column by "
            "data_collator=MMDataCollator(..., image_column=...)."
        )
    for column in (column for table in collator.tables.values() for column in table.columns):
        if column not in columns:
            raise ValueError(
                f"The {name} data set has no column {column!r}, which the model reads as a number or a category (its "
                f"columns are {shown}); rename one by DataSource(..., columns={{{column!r}: '...'}})."
            )
    tasks = collator.tasks.values()
    missing = [task for task in tasks if task.default_cell is None and task.column not in columns]
    if missing and len(missing) == len(tasks):
        raise ValueError(f"The {name} data set has no column for any of the tasks (its columns are {shown}).")
    if name == "train":
        check_any_label(dataset, collator)
    for task in missing:
        logger.warning(f"The {name} data set has no column {task.column!r}: task {task.name!r} has no labels there.")


def check_any_label(dataset: Any, collator: MMDataCollator) -> None:
    """
    Checks that the training rows have labels.

    Args:
        dataset: the training rows.

    Raises:
        ValueError: if no row has a label of any task.
    """
    tasks = list(collator.tasks.values())
    source = dataset.dataset if isinstance(dataset, DataSource) else dataset
    if source is None or is_iterable(source) or not len(source) or any(t.default_cell is not None for t in tasks):
        return
    columns = [task.column or task.name for task in tasks]
    # Usually the first row has one.
    for row in rows_with_columns(dataset, columns):
        labels = row.get(SOURCE_KEY, ANY_SOURCE).labels
        if any(labels(t.name) and not is_missing(row.get(c)) for t, c in zip(tasks, columns, strict=True)):
            return
    raise ValueError(
        f"No row of the train data set has a label of any task: the columns {', '.join(map(repr, columns))} are "
        "empty or missing. A task reads the column with its name, or the column given by column=."
    )


def check_tuning(
    args: TrainingArguments, model: MMTransformerForMultiTask, eval_dataset: Any, is_sharded: bool
) -> None:
    """
    Checks `tune_thresholds`.

    Raises:
        ValueError: if no task has thresholds, there are no validation rows to read by number, or weights are sharded.
    """
    if not getattr(args, "tune_thresholds", False):
        return
    if not any(task.can_tune for task in model.tasks.values()):
        raise ValueError("tune_thresholds=True needs a task with thresholds, such as MultiLabel; leave it out.")
    sets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    plain = [one.dataset if isinstance(one, DataSource) else one for one in sets]
    if any(one is None or isinstance(one, DataMixture) or is_iterable(one) for one in plain):
        raise ValueError(
            "tune_thresholds=True needs validation rows that can be read by number: give an eval_dataset that is no "
            "stream and no mixture, or leave eval_strategy and validation_fraction at their defaults."
        )
    if is_sharded:
        raise ValueError(
            "tune_thresholds=True does not work with FSDP and DeepSpeed: leave it out, and call tune_thresholds(model, "
            "processor, rows) with the trained model."
        )


def check_lengths(dataset: Any, args: TrainingArguments) -> None:
    """
    Checks grouping by length.

    Raises:
        ValueError: if rows are to be grouped by a length that they do not have.
    """
    columns = getattr(dataset, "column_names", None)
    wanted = args.length_column_name
    if getattr(args, "train_sampling_strategy", None) == "group_by_length" and columns and wanted not in columns:
        raise ValueError(
            f"Grouping by length needs a column {wanted!r} with the length of each text, for example by "
            f"data.map(lambda row: {{{wanted!r}: len(row['text'])}})."
        )


def check_rows_per_image(dataset: Any, collator: MMDataCollator, args: TrainingArguments) -> None:
    """
    Checks `rows_per_image`.

    Raises:
        ValueError: if rows of one image are to come together, but the order of the rows is fixed.
    """
    wanted = getattr(args, "rows_per_image", 1)
    if wanted == 1 or dataset is None:
        return
    why = None
    if isinstance(dataset, DataMixture):
        why = "a mixture defines the order of its rows"
    elif is_iterable(dataset.dataset if isinstance(dataset, DataSource) else dataset):
        why = "the order of a stream cannot be changed"
    elif "images" not in collator.media:
        why = "the model takes no images"
    if why is not None:
        raise ValueError(f"rows_per_image={wanted} is not possible, because {why}: leave it out.")
