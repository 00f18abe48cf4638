"""The settings that determine the order of the training rows. A resumed training needs the same settings."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ...data.mixture import DataMixture
from ...data.sources import DataSource, is_iterable


logger = logging.get_logger(__name__)


def order_of_rows(dataset: Any, args: TrainingArguments, batch_size: int) -> dict[str, int]:
    """
    The settings that determine the order of the rows.

    Args:
        dataset: the training rows.
        batch_size: of one process.

    Returns:
        Name -> number: `rows_per_step` and all other settings that affect the order.
    """
    found = {"rows_per_step": batch_size * args.gradient_accumulation_steps * args.world_size}
    is_mixture = isinstance(dataset, DataMixture)
    is_stream = dataset.is_stream if isinstance(dataset, (DataMixture, DataSource)) else is_iterable(dataset)
    if is_stream:
        found["dataloader_num_workers"] = max(args.dataloader_num_workers, 1)
    if is_stream and is_mixture:  # each of them reads a part of its own
        found["processes"] = args.world_size
    if is_mixture or (not is_stream and getattr(args, "train_sampling_strategy", "random") != "sequential"):
        found["seed"] = args.seed if args.data_seed is None else args.data_seed
    return found


def tell_changes(before: Mapping[str, str], now: Mapping[str, int]) -> None:
    """Warns if a training is resumed with another order than [`order_of_rows`] gave when the checkpoint was written."""
    for name, number in now.items():
        saved = int(before.get(name, number))
        if saved == number:
            continue
        if name == "rows_per_step":
            logger.warning(
                f"The checkpoint was written with {saved} rows per optimiser step, but now a step has {number} "
                "(batch size x accumulation x processes), so training resumes at another place of the epoch. For the "
                f"same place, use {saved} rows again, for example by gradient_accumulation_steps."
            )
        else:
            logger.warning(
                f"The checkpoint was written with {name}={saved}, but now it is {number}, so training may resume "
                f"with other rows of the epoch, some of them for the second time. For the same rows, use {saved} "
                "again."
            )
