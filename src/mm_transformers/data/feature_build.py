"""Fills feature stores: finds the distinct items of a data set, and lets the encoders run on those that are missing."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from . import feature_store
from .feature_keys import ItemHash, digest_of, hash_of_text
from .feature_reading import KINDS, replace_load, unpadded_texts
from .feature_store import Features, FeatureStore
from .media import SharedCounter


# What messages call the items of a modality.
ITEMS = {"text": "texts", "vision": "images", "audio": "sounds"}


class Found(NamedTuple):
    """
    An item of a data set: where it is first met, and for a text its tokens.

    Args:
        place: which of the cell's items it is.
    """

    modality: str
    kind: str
    key: bytes
    row: int
    place: int
    inputs: Optional[dict[str, list[int]]] = None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"]) if self.inputs else 0


class Builder:
    """
    Args:
        model: the [`MMTransformerModel`].
        collator: of rows, as it is without a cache.
        stores: modality -> where its features go.
        hashes: "images", "videos" or "audio" -> the hash of an item.
        dtype: modality -> what features are stored in.
        make_room: called with the modality, how many items there are and the bytes that they need; raises
            `ValueError` if there is no room for them.
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
        Encodes what the stores lack of the items of a data set. Each process takes its share, and returns when all
        have done theirs.

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
                # Texts of one length need no padding; neighbours in a data set are read together.
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
                        f"{self.stores[modality].folder} does not hold what other processes have written: the folder "
                        "of the feature cache must be on a disk that all of them see."
                    )

    def _scan(self, dataset: Any) -> list[Found]:
        """The items of this process's share of the rows that are not stored yet, each once."""
        numbers = range(self.state.process_index, len(dataset), self.state.num_processes)
        rows = self._loader(_Rows(dataset, numbers), 64, _Scanner(self.collator, self.stores, self.hashes))
        found: dict[bytes, Found] = {}
        for batch in logging.tqdm(rows, desc="Looking into the feature cache", leave=False, disable=self._is_silent):
            for item in batch:
                found.setdefault(item.key, item)
        return list(found.values())

    def _encode(self, modality: str, items: list[Found], dataset: Any) -> Iterator["_Encoded"]:
        encoder = self.model.encoder(modality).eval()
        for kind, group in itertools.groupby(items, key=lambda item: item.kind):
            together = self.batch_size
            if kind == "videos":
                together = max(1, together // self.collator.processor.num_frames)
            if getattr(encoder.config, "feat_extract_norm", None) == "group":
                together = 1  # it normalises over the padding too
            pairs, reader = _Items(dataset, list(group)), _Reader(self.collator, kind)
            for read in self._loader(pairs, together, reader):
                if read.items and not all(item.key in self.stores[modality] for item in read.items):
                    yield self._run(modality, read)
                else:
                    yield _Encoded([], read.dropped, len(read.items) + len(read.dropped))

    @torch.no_grad()
    def _run(self, modality: str, read: "_Read") -> "_Encoded":
        device, dtype = self.model.device, self.dtype[modality]
        features, mask = self.model.encode(modality, **{name: x.to(device) for name, x in read.inputs.items()})
        stored = features.to(dtype)
        if dtype == torch.float16 and bool((stored.isinf() & features.isfinite()).any()):
            raise ValueError(
                f"What the {modality} encoder gives is too large for float16: let the feature cache take "
                "dtype='bfloat16'."
            )
        stored, mask = stored.cpu(), None if mask is None else mask.cpu()
        result = []
        for item, numbers, digest in zip(read.items, read.numbers, read.digests, strict=True):
            tokens = stored[numbers]
            if modality == "text":
                tokens = tokens[: item.length]
            elif mask is not None:
                tokens = tokens[mask[numbers]]
            result.append(Features(item.key, tokens, digest))
        return _Encoded(result, read.dropped, len(read.items) + len(read.dropped))

    def _write(self, modality: str, batches: Iterator["_Encoded"], items: list[Found]) -> list[bytes]:
        """Returns the keys of what could not be read."""
        store, dropped, count = self.stores[modality], [], 0
        waiting: list[Features] = []
        total = len(range(self.state.process_index, len(items), self.state.num_processes))
        bar = logging.tqdm(total=total, desc=f"Encoding {ITEMS[modality]}", disable=self._is_silent)
        try:
            for batch in batches:
                waiting += [features for features in batch.features if features.key not in store]
                dropped += batch.dropped
                count += batch.count
                bar.update(batch.count)
                size = sum(features.tokens.nbytes for features in waiting)
                if size >= feature_store.SHARD_BYTES:
                    self.make_room({modality: total - count}, size)
                    written, waiting = waiting, []
                    store.write(written)
        finally:  # also if something went wrong, or the user has had enough: the next build goes on from here
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
        """What is stored is what the encoder says of a text without padding, so padding must change nothing."""
        tokenizer, length = self.collator.processor.tokenizer, shortest.length
        if length + 3 > self.collator.max_length:
            return
        assert shortest.inputs is not None
        rows = [{"input_ids": ids} for ids in (shortest.inputs["input_ids"], shortest.inputs["input_ids"] + [0] * 3)]
        padded = tokenizer.pad(rows, return_tensors="pt", padding_side=tokenizer.padding_side)
        inputs = {name: padded[name][:1] for name in ("input_ids", "attention_mask")}
        kept = inputs["attention_mask"][0].bool()
        alone = {name: value[:, kept] for name, value in inputs.items()}
        states, expected = (
            self.model.encode("text", **{name: value.to(self.model.device) for name, value in given.items()})[0].float()
            for given in (inputs, alone)
        )
        difference = (states[:, kept.to(states.device)] - expected).norm()
        if difference > 0.05 * expected.norm():
            raise ValueError(
                f"What the text encoder ({self.model.text_encoder.config.model_type!r}) says of a text depends on how "
                f"many places the tokenizer pads on the {tokenizer.padding_side}, so it cannot be cached"
                + (": set processor.tokenizer.padding_side = 'right'." if tokenizer.padding_side == "left" else ".")
            )

    def _loader(self, rows: Dataset, batch_size: int, collate: Callable[[list[Any]], Any]) -> DataLoader:
        return DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=self.num_workers)

    @property
    def _is_silent(self) -> bool:
        return not self.state.is_local_main_process


class _Encoded(NamedTuple):
    features: list[Features]
    dropped: list[bytes]  # keys of what could not be read
    count: int


class _Read(NamedTuple):
    """Items, the input of the encoder, which entries of it are whose, and hashes of the items as they were read."""

    items: list[Found]
    inputs: dict[str, torch.Tensor]
    numbers: list[Any]
    digests: list[bytes]
    dropped: list[bytes]


class _Rows(Dataset):
    def __init__(self, dataset: Any, numbers: range):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Mapping[str, Any]]]:
        numbers = [self.numbers[index] for index in indices]
        if hasattr(self.dataset, "__getitems__"):
            return list(zip(numbers, self.dataset.__getitems__(numbers), strict=True))
        return [(number, self.dataset[number]) for number in numbers]


class _Items(Dataset):
    """Items, each with the row that it is in."""

    def __init__(self, dataset: Any, items: list[Found]):
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Found, Any]:
        item = self.items[index]
        return item, None if item.inputs is not None else self.dataset[item.row]


class _Scanner:
    """Rows -> the items in them that are not stored."""

    def __init__(self, collator: Any, stores: dict[str, FeatureStore], hashes: dict[str, ItemHash]):
        self.collator, self.stores = collator, stores
        self.columns = {
            kind: replace_load(collator.media[kind], hashes[kind], num_bad_files=SharedCounter())
            for modality in stores
            for kind in KINDS[modality]
        }

    def __call__(self, rows: list[tuple[int, Mapping[str, Any]]]) -> list[Found]:
        found = []
        for modality, store in self.stores.items():
            for kind in KINDS[modality]:
                column, known = self.columns[kind], {}
                for number, row in rows:
                    for place, cell in enumerate(column.split(row.get(column.column))):
                        same = column.key(cell)
                        if same not in known:
                            # The cell is kept, for its id is given again once it is gone.
                            known[same] = cell, column.load_item(cell, f"row {number:,}")
                        key = known[same][1]
                        if key is not None and key not in store:
                            found.append(Found(modality, kind, key, number, place))
        if "text" in self.stores:
            found += self._texts(rows)
        return found

    def _texts(self, rows: list[tuple[int, Mapping[str, Any]]]) -> list[Found]:
        texts = []
        for number, row in rows:
            had_other = any(column.split(row.get(column.column)) for column in self.collator.media.values())
            texts.append(self.collator.text_of(row, had_other, f"row {number:,}"))
        batch = self.collator.processor(text=texts, max_length=self.collator.max_length)
        found = []
        for (number, _), inputs in zip(rows, unpadded_texts(batch), strict=True):
            if inputs is not None and (key := hash_of_text(inputs)) not in self.stores["text"]:
                ids = {name: value.tolist() for name, value in inputs.items()}
                found.append(Found("text", "text", key, number, 0, ids))
        return found


class _Reader:
    """Items and their rows -> the input of the encoder."""

    def __init__(self, collator: Any, kind: str):
        self.processor, self.kind = collator.processor, kind
        self.column = None if kind == "text" else replace_load(collator.media[kind], collator.media[kind].load)

    def __call__(self, pairs: list[tuple[Found, Any]]) -> _Read:
        items = [item for item, _ in pairs]
        if self.column is None:
            return _Read(items, self._pad(items), list(range(len(items))), [item.key for item in items], [])
        column, read, dropped = self.column, [], []
        for item, row in pairs:
            content = column.load_item(column.split(row[column.column])[item.place], f"row {item.row:,}")
            if content is None:
                dropped.append(item.key)
            else:
                read.append((item, content))
        if not read:
            return _Read([], {}, [], [], dropped)
        contents = [content for _, content in read]
        options: dict[str, Any] = {self.kind: contents}
        batch = self.processor(text=[""] * len(read), **options)
        index = batch["audio_index" if self.kind == "audio" else "image_index"]
        numbers = [row[row >= 0] if self.kind == "videos" else int(row[0]) for row in index]
        names = {"pixel_values": "pixel_values", "input_values": "input_values", "input_features": "input_features",
                 "audio_attention_mask": "attention_mask"}  # fmt: skip
        inputs = {names[name]: value for name, value in batch.items() if name in names}
        return _Read([item for item, _ in read], inputs, numbers, [digest_of(content) for content in contents], dropped)

    def _pad(self, items: list[Found]) -> dict[str, torch.Tensor]:
        rows = [{name: torch.tensor(value) for name, value in (item.inputs or {}).items()} for item in items]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {n: pad([r[n] for r in rows], batch_first=True, padding_value=fill.get(n, 0)) for n in rows[0]}
        inputs["attention_mask"] = pad([torch.ones(item.length, dtype=torch.int64) for item in items], batch_first=True)
        return inputs


@contextmanager
def _all_or_none() -> Iterator[None]:
    """If one process fails, all do: those that wait for it would wait for ever."""
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
        raise ValueError(f"Another process could not fill the feature cache: {told[0]}")
