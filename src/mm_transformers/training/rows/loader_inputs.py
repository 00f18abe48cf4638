"""The inputs of the Trainer's data loader, instead of the given data set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from torch.utils.data import DataLoader, IterableDataset, Sampler

from ...data.mixture_rows import MixedRows, MixedStream
from ...data.sources import StreamOfSource
from .stream_shares import ShareOfStream, WithoutRepeats


Collate = Callable[[list[Any]], dict[str, Any]]
SamplerFn = Callable[[Any], Optional[Sampler[int]]]


@dataclass
class LoaderInputs:
    """
    The inputs of a data loader.

    Args:
        rows: the rows of the loader.
        collator: makes a batch of them.
        sampler_fn: returns the order of the rows, given `rows`; `None` for streams.
    """

    rows: Any
    collator: Collate
    sampler_fn: Optional[SamplerFn] = None

    @classmethod
    def of_mixture(cls, rows: MixedRows | MixedStream, collator: Collate) -> "LoaderInputs":
        return cls(rows, collator, lambda rows: rows.sampler)

    @classmethod
    def of_rows(cls, rows: Any, original: Any, collator: Collate, sampler_fn: Optional[SamplerFn]) -> "LoaderInputs":
        """
        The inputs of a loader for these rows.

        Args:
            rows: as in the collator.
            original: the original data set, for the sampler.
            sampler_fn: returns a sampler for `original`.
        """
        if sampler_fn is None:
            return cls(rows, collator)

        def sampler_of(_: Any) -> Optional[Sampler[int]]:
            sampler = sampler_fn(original)
            if hasattr(sampler, "set_epoch"):
                # If batches are skipped on several processes, accelerate finds the data set, but not the sampler.
                rows.set_epoch = sampler.set_epoch
            return sampler

        return cls(rows, collator, sampler_of)

    def share(self, batch_size: int, num_processes: int, split_batches: bool, is_training: bool) -> None:
        """
        Splits a stream over the processes: each reads a [`ShareOfStream`].

        Args:
            batch_size: of one process, or of all if `split_batches`.
        """
        if isinstance(self.rows, StreamOfSource):
            self.rows.rows_per_turn = batch_size * (1 if split_batches else num_processes)
        if num_processes > 1 and isinstance(self.rows, IterableDataset):
            self.rows = ShareOfStream(self.rows)
            self.collator = WithoutRepeats(self.collator, tells=not is_training)

    def took(self, loader: DataLoader[Any]) -> None:
        """Call it after accelerate has wrapped the rows: they read the part of this process themselves."""
        if isinstance(self.rows, (MixedStream, ShareOfStream)):
            self.rows.read_own_part(loader.dataset)
