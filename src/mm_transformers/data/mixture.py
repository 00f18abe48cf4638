"""Several data sets, each with its own columns and tasks, as one training set."""

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from transformers.utils import logging

from .collator import MMDataCollator
from .mixture_rows import MixedRows, MixedStream, MixtureSampler
from .sources import DataSource


if TYPE_CHECKING:
    from transformers import TrainingArguments


logger = logging.get_logger(__name__)


class DataMixture:
    """
    Several data sets to train on together: a `train_dataset` for [`MMTrainer`].

    A task without labels in a data set learns nothing from its rows.

    An epoch has as many rows as all the data sets together. If the shares differ from the sizes, small data sets
    repeat, and large ones are read in part; the next epoch continues there. The order depends on `data_seed` (or
    `seed`) and the epoch alone.

    If a data set is a stream (`datasets.IterableDataset` or any iterable), the mixture is one endless stream. Each row
    then comes from a data set drawn by the shares, and `max_steps` ends the training. Map-style data sets are shuffled.
    Streams keep their own order: shuffle them by their own `shuffle`. In each pass through a data set, each process and
    each worker of its data loader reads different rows. So every data set needs at least as many rows as there are
    readers.

    Args:
        datasets (`dict[str, Any]`):
            Names, for messages and logs -> data sets, or [`DataSource`] objects with columns and tasks.
        sampling (`str` or `dict[str, float]`, *optional*, defaults to `"proportional"`):
            `"proportional"`: every row once per epoch. `"temperature"`: each data set by N^(1 / temperature), where N
            is its number of rows (https://arxiv.org/abs/1910.10683). Or a dict with the weight of each; 0 leaves a data
            set out. A positive weight gives at least one row (with separate batches, one batch) in each epoch. Streams
            need weights. A repeated data set is shuffled anew each time, so that its rows are used evenly.
        temperature (`float`, *optional*, defaults to 2.0): More than 0. 1 is by size, infinity is equal shares.
        batches (`str`, *optional*, defaults to `"mixed"`):
            `"mixed"`, or `"separate"`: each batch of a process is from one data set. With `"proportional"`, the last
            batch of a data set then has the remaining rows, and `dataloader_drop_last` leaves it out. Otherwise all
            batches are full, and the remaining rows are for the next epoch. Processes may have batches from different
            data sets in the same step.

    Raises:
        ValueError: one sentence, if a data set is empty or several splits, weights do not fit the data sets, or streams
            have no weights.

    Example:

    ```python
    >>> mixture = DataMixture({"reviews": rows, "tweets": DataSource(tweets, columns={"text": "tweet"})})
    >>> trainer = MMTrainer(model, MMTrainingArguments("out"), processing_class=processor, train_dataset=mixture)
    ```
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        sampling: str | Mapping[str, float] = "proportional",
        temperature: Optional[float] = None,
        batches: str = "mixed",
    ):
        if not isinstance(datasets, Mapping) or hasattr(datasets, "column_names") or not datasets:
            raise ValueError(
                "A DataMixture takes a dict of names and data sets, {'reviews': ..., 'captions': ...}, but got "
                f"{'an empty one' if isinstance(datasets, Mapping) and not datasets else type(datasets).__name__}."
            )
        if batches not in ("mixed", "separate"):
            raise ValueError(f"batches must be 'mixed' or 'separate', but is {batches!r}.")
        self.batches = batches
        self.sources: dict[str, DataSource] = {}
        for name, dataset in datasets.items():
            if not isinstance(name, str):
                raise ValueError(f"The name of a data set must be a string, but is {name!r}.")
            if dataset is None or isinstance(dataset, dict):
                what = "no data set" if dataset is None else f"several splits, {', '.join(map(repr, dataset))}"
                raise ValueError(f"Data set {name!r} is {what}: give one data set.")
            self.sources[name] = dataset if isinstance(dataset, DataSource) else DataSource(dataset)
        sizes = {name: _size(source) for name, source in self.sources.items()}
        for name, size in sizes.items():
            if size == 0:
                raise ValueError(f"Data set {name!r} is empty; leave it out.")
        self.shares = _shares(sampling, temperature, sizes)
        if self.shares is not None:
            self.sources = {name: self.sources[name] for name in self.shares}
        self.is_stream = any(source.is_stream for source in self.sources.values())

    def __len__(self) -> int:
        if self.is_stream:
            raise TypeError("A mixture with a stream has no length.")
        return sum(len(source) for source in self.sources.values())

    def check(self, collator: MMDataCollator, args: "TrainingArguments") -> None:
        """
        Checks that the data sets fit the model and the training arguments.

        Raises:
            ValueError: one sentence.
        """
        strategy = getattr(args, "train_sampling_strategy", "random")
        if strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={strategy!r} is for one data set, but a mixture defines the order of its "
                "rows: leave it at 'random'."
            )
        separate = self.batches == "separate"
        if separate and args.accelerator_config.split_batches:
            raise ValueError(
                "Leave out split_batches: it would split the batches of DataMixture, each of which is of one data set."
            )
        for name, source in self.sources.items():
            source.check(collator, f"Data set {name!r}")
            small = not self.is_stream and self.shares is None and len(source) < args.train_batch_size
            if separate and args.dataloader_drop_last and small:
                raise ValueError(
                    f"Data set {name!r} has {len(source):,} rows, fewer than a batch of {args.train_batch_size}, so "
                    "dataloader_drop_last would drop all its rows: leave that out, or use smaller batches."
                )
        media = [name for column in collator.media.values() for name in column.columns]
        columns = [source.column_names for source in self.sources.values()]
        if media and not any(names is None or set(names) & set(media) for names in columns):
            logger.warning(
                f"None of the data sets has a column {' or '.join(map(repr, media))}, so no row has "
                f"{' or '.join(collator.media)}; if some have, name the column by DataSource(..., columns=...)."
            )
        for task in collator.tasks:
            if not any(task in source.labelled_tasks(collator) for source in self.sources.values()):
                logger.warning(f"None of the data sets has labels of task {task!r}.")

    def rows(self, collator: MMDataCollator, batch_size: int, args: "TrainingArguments") -> MixedRows | MixedStream:
        """The rows for the data loader of one process; `batch_size` is that of a process."""
        parts = [
            source.rows(collator, name, place=(i, len(self.sources)))
            for i, (name, source) in enumerate(self.sources.items())
        ]
        seed = args.seed if args.data_seed is None else args.data_seed
        size = batch_size if self.batches == "separate" else None
        shares = None if self.shares is None else list(self.shares.values())
        if self.is_stream:
            if shares is None:
                shares = [float(len(source)) for source in self.sources.values()]
            return MixedStream(parts, shares, seed, size)
        return MixedRows(parts, MixtureSampler(list(map(len, parts)), shares, seed, size, args.dataloader_drop_last))


def check_sources(train_dataset: Any, eval_dataset: Any, collator: MMDataCollator, args: "TrainingArguments") -> None:
    """
    Checks the mixtures and [`DataSource`] objects among the data sets of a trainer.

    Raises:
        ValueError: one sentence.
    """
    evaluated = {"The eval data set": eval_dataset}
    if isinstance(eval_dataset, dict):
        evaluated = {f"Data set {name!r} of eval_dataset": dataset for name, dataset in eval_dataset.items()}
    if any(isinstance(dataset, DataMixture) for dataset in evaluated.values()):
        raise ValueError(
            "A mixture is for training; evaluate on each data set: eval_dataset={'reviews': ..., 'captions': ...}."
        )
    ours = [
        dataset for dataset in [train_dataset, *evaluated.values()] if isinstance(dataset, (DataMixture, DataSource))
    ]
    if ours and not isinstance(collator, MMDataCollator):
        raise ValueError(
            f"{type(ours[0]).__name__} needs MMDataCollator, or a subclass of it, to name columns and tasks; the "
            f"data_collator is a {type(collator).__name__}."
        )
    if isinstance(train_dataset, DataMixture):
        train_dataset.check(collator, args)
    elif isinstance(train_dataset, DataSource):
        train_dataset.check(collator, "The train data set")
    for name, dataset in evaluated.items():
        if isinstance(dataset, DataSource):
            dataset.check(collator, name)


def _size(source: DataSource) -> Optional[int]:
    try:
        return len(source)
    except TypeError:
        return None


def _shares(sampling: Any, temperature: Optional[float], sizes: dict[str, Optional[int]]) -> Optional[dict[str, float]]:
    """The share of each data set with a positive share; `None` for proportional."""
    if temperature is not None and sampling != "temperature":
        raise ValueError("temperature needs sampling='temperature': set that, or leave out temperature.")
    if isinstance(sampling, Mapping):
        return _checked_weights(sampling, list(sizes))
    if sampling not in ("proportional", "temperature"):
        raise ValueError(
            f"sampling must be 'proportional', 'temperature' or a dict with the weight of each data set, but is "
            f"{sampling!r}."
        )
    for name, size in sizes.items():
        if size is None:
            raise ValueError(
                f"Data set {name!r} is a stream of unknown length, so sampling={sampling!r} is not possible: give "
                f"weights, sampling={{{', '.join(f'{n!r}: ...' for n in sizes)}}}."
            )
    if sampling == "proportional":
        return None
    temperature = 2.0 if temperature is None else temperature
    if not isinstance(temperature, numbers.Real) or not temperature > 0:
        raise ValueError(f"temperature must be a number above 0, but is {temperature!r}.")
    logs = np.log([float(size or 0) for size in sizes.values()])
    shares = np.exp((logs - logs.max()) / float(temperature))
    return dict(zip(sizes, (shares / shares.sum()).tolist(), strict=True))


def _checked_weights(weights: Mapping[str, float], names: list[str]) -> dict[str, float]:
    known = ", ".join(map(repr, names))
    for name in weights:
        if name not in names:
            raise ValueError(f"sampling has a weight for {name!r}, but the data sets are {known}.")
    for name in names:
        weight = weights.get(name)
        if weight is None:
            raise ValueError(f"sampling has no weight for the data set {name!r}; give 0 to leave it out.")
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"The weight of data set {name!r} must be a number of 0 or more, but is {weight!r}.")
    total = float(sum(weights.values()))
    if total == 0:
        raise ValueError("The weights of all data sets are 0; at least one must be more than 0.")
    return {name: weights[name] / total for name in names if weights[name] > 0}
