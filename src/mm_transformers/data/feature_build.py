"""Fills feature stores: finds the distinct items of a data set, and runs the encoders on the missing ones."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..model.modalities import ENCODERS, MODALITIES
from . import feature_store
from .feature_items import Found, Items, Read, Reader, Rows, Scanner
from .feature_keys import ItemHash
from .feature_store import Features, FeatureStore


class Builder:
    """
    Encodes the missing items of a data set and writes their features to the stores.

    Args:
        model: the [`MMTransformerModel`].
        collator: of rows, as it is without a cache.
        stores: modality -> the store of its features.
        hashes: "images", "videos" or "audio" -> the hash of an item.
        dtype: modality -> the dtype of its stored features.
        make_room: called with the modality, the number of items and the bytes that they need; raises `ValueError` if
            there is no room for them.
        batch_size, num_workers: of reading and encoding.
    """

    def __init__(
        self,
        model: Any,
        collator: Any,
        stores: dict[str, FeatureStore],
        hashes: dict[str, ItemHash],
        dtype: dict[str, torch.dtype],
        make_room: Callable[[dict[str, int], int], None],
        batch_size: int,
        num_workers: int,
    ):
        self.model, self.collator, self.stores, self.hashes, self.dtype = model, collator, stores, hashes, dtype
        self.make_room, self.batch_size, self.num_workers = make_room, batch_size, num_workers
        self.state = PartialState()

    def build(self, dataset: Any) -> None:
        """
        Encodes the items of a data set that the stores lack.

        Each process takes its share, and returns when all have finished theirs.

        Raises:
            ValueError, OSError: one sentence, in all processes, if an item cannot be read or there is no room.
        """
        missing: dict[str, list[Found]] = {modality: [] for modality in self.stores}
        with _all_or_none():
            found = self._scan(dataset)
        met: set[bytes] = set()
        for item in gather_object(found):  # the same, in the same order, in all processes
            if item.key not in met:
                met.add(item.key)
                missing[item.modality].append(item)
        work: dict[str, Iterator[_Encoded]] = {}
        with _all_or_none():
            needed, counts = 0, {}
            for modality, items in missing.items():
                if not items:
                    continue
                # Texts of one length need no padding; neighbouring rows are read together.
                items.sort(key=lambda item: (item.kind, item.length, item.row, item.place))
                if modality == "text":
                    self._check_padding(items[0])
                batches = self._encode(modality, items[self.state.process_index :: self.state.num_processes], dataset)
                first = next(batches, None)
                if first is not None:
                    work[modality] = itertools.chain([first], batches)
                    counts[modality] = len(items)
                    needed += self._bytes_needed(items, first)
            if counts and self.state.is_main_process:
                self.make_room(counts, needed)
        dropped: list[bytes] = []
        with _all_or_none():
            for modality, batches in work.items():
                dropped += self._write(modality, batches, missing[modality])
        unread = set(gather_object(dropped))
        with _all_or_none():
            for modality, items in missing.items():
                self.stores[modality].refresh()
                if any(item.key not in self.stores[modality] and item.key not in unread for item in items):
                    raise ValueError(
                        f"{self.stores[modality].folder} lacks the features that other processes wrote: put the "
                        "folder of the feature cache on a disk that all processes can read."
                    )

    def _scan(self, dataset: Any) -> list[Found]:
        """The items in this process's share of the rows that are not stored yet, each once."""
        numbers = range(self.state.process_index, len(dataset), self.state.num_processes)
        rows = self._loader(Rows(dataset, numbers), 64, Scanner(self.collator, self.stores, self.hashes))
        found: dict[bytes, Found] = {}
        for batch in logging.tqdm(rows, desc="Reading the feature cache", leave=False, disable=self._is_silent):
            for item in batch:
                found.setdefault(item.key, item)
        return list(found.values())

    def _encode(self, modality: str, items: list[Found], dataset: Any) -> Iterator["_Encoded"]:
        encoder = self.model.encoder(modality).eval()
        for kind, group in itertools.groupby(items, key=lambda item: item.kind):
            together, part = self.batch_size, MODALITIES.get(kind)
            if part is not None and part.is_sequence:
                together = max(1, together // self.collator.processor.num_frames)
            if getattr(encoder.config, "feat_extract_norm", None) == "group":
                together = 1  # it normalises over the padding too
            pairs, reader = Items(dataset, list(group)), Reader(self.collator, part)
            for read in self._loader(pairs, together, reader):
                if read.items and not all(item.key in self.stores[modality] for item in read.items):
                    yield self._run(modality, read)
                else:
                    yield _Encoded([], read.dropped, len(read.items) + len(read.dropped))

    @torch.no_grad()
    def _run(self, modality: str, read: Read) -> "_Encoded":
        device, dtype = self.model.device, self.dtype[modality]
        features, mask = self.model.encode(modality, **{name: x.to(device) for name, x in read.inputs.items()})
        stored = features.to(dtype)
        if dtype == torch.float16 and bool((stored.isinf() & features.isfinite()).any()):
            raise ValueError(
                f"The outputs of the {modality} encoder are too large for float16: use FeatureCache(..., "
                "dtype='bfloat16')."
            )
        stored, mask = stored.cpu(), None if mask is None else mask.cpu()
        result = []
        for item, numbers, digest in zip(read.items, read.numbers, read.digests, strict=True):
            tokens = stored[numbers]
            if modality == "text":
                tokens = tokens[: item.length]
            elif mask is not None:
                tokens = tokens[mask[numbers]]
            if not tokens.isfinite().all():
                raise ValueError(
                    f"Row {item.row:,}: the {modality} encoder outputs values that are not finite, so they cannot be "
                    "cached. Its weights or the settings of its processor are damaged."
                )
            result.append(Features(item.key, tokens, digest))
        return _Encoded(result, read.dropped, len(read.items) + len(read.dropped))

    def _write(self, modality: str, batches: Iterator["_Encoded"], items: list[Found]) -> list[bytes]:
        """Returns the keys of the items that could not be read."""
        store, dropped, count = self.stores[modality], [], 0
        waiting: list[Features] = []
        total = len(range(self.state.process_index, len(items), self.state.num_processes))
        bar = logging.tqdm(total=total, desc=f"Encoding {ENCODERS[modality].plural}", disable=self._is_silent)
        try:
            for batch in batches:
                waiting += [features for features in batch.features if features.key not in store]
                dropped += batch.dropped
                count += batch.num_items
                bar.update(batch.num_items)
                size = sum(features.tokens.nbytes for features in waiting)
                if size >= feature_store.SHARD_BYTES:
                    self.make_room({modality: total - count}, size)
                    written, waiting = waiting, []
                    store.write(written)
        finally:  # also after an error or an interrupt: the next build resumes here
            bar.close()
            if waiting:
                store.write(waiting)
        return dropped

    def _bytes_needed(self, items: list[Found], first: "_Encoded") -> int:
        size, tokens = sum(f.tokens.nbytes for f in first.features), sum(len(f.tokens) for f in first.features)
        if not first.features:
            return 0
        if items[0].modality == "text":
            return size // tokens * sum(item.length for item in items)
        return size * len(items) // len(first.features)

    @torch.no_grad()
    def _check_padding(self, shortest: Found) -> None:
        """Stored features are those of texts without padding, so padding must not change the encoder outputs."""
        tokenizer, inputs = self.collator.processor.tokenizer, shortest.inputs
        if inputs is None or shortest.length + 3 > self.collator.max_length:
            return
        ids, mask = (
            torch.from_numpy(inputs["input_ids"]).long()[None],
            torch.ones(1, shortest.length, dtype=torch.int64),
        )
        places = (3, 0) if tokenizer.padding_side == "left" else (0, 3)
        alone = {"input_ids": ids, "attention_mask": mask}
        padded = {
            "input_ids": torch.nn.functional.pad(ids, places, value=tokenizer.pad_token_id),
            "attention_mask": torch.nn.functional.pad(mask, places),
        }
        states, expected = (
            self.model.encode("text", **{name: value.to(self.model.device) for name, value in given.items()})[0].float()
            for given in (padded, alone)
        )
        difference = (states[padded["attention_mask"].bool()] - expected[0]).norm()
        if difference > 0.05 * expected.norm():
            raise ValueError(
                f"What the text encoder ({self.model.text_encoder.config.model_type!r}) outputs for a text depends "
                "on the padding, so it cannot be cached. Load the encoder by `from_encoders`, which runs such "
                "encoders without padding."
            )

    def _loader(self, rows: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        # A separate generator: training has the same dropout and row order as without a cache.
        return DataLoader(
            rows,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )

    @property
    def _is_silent(self) -> bool:
        return not self.state.is_local_main_process


class _Encoded(NamedTuple):
    features: list[Features]
    dropped: list[bytes]  # keys of the items that could not be read
    num_items: int


@contextmanager
def _all_or_none() -> Iterator[None]:
    """If one process fails, all fail: otherwise the others would wait for it forever."""
    error: Optional[Exception] = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = gather_object([None if error is None else str(error)])
    if error is not None:
        raise error
    told = [failure for failure in failures if failure is not None]
    if told:
        raise ValueError(f"Another process could not write the feature cache: {told[0]}")
