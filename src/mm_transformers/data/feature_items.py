"""The items of a data set, found and read for their encoders, in the workers of a data loader if there are any."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch.utils.data import Dataset

from ..model.modalities import TEXT, Modality, modalities_of
from .feature_keys import ItemHash, digest_of, hash_of_text
from .feature_reading import replace_load, unpadded_texts
from .feature_store import FeatureStore
from .media import SharedCounter
from .sources import ROW_KEY, name_of_row, own_column


class Found(NamedTuple):
    """
    An item of a data set, with its first row; for a text, with its tokens.

    Args:
        place: the number of the item within its cell.
    """

    modality: str
    kind: str
    key: bytes
    row: int
    place: int
    inputs: Optional[dict[str, np.ndarray]] = None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"]) if self.inputs else 0


class Read(NamedTuple):
    """Items, the encoder input, the entries of each item in it, and hashes of the items as they were read."""

    items: list[Found]
    inputs: dict[str, torch.Tensor]
    numbers: list[Any]
    digests: list[bytes]
    dropped: list[bytes]


class Rows(Dataset[tuple[int, Mapping[str, Any]]]):
    def __init__(self, dataset: Any, numbers: range):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Mapping[str, Any]]]:
        numbers = [self.numbers[index] for index in indices]
        if hasattr(self.dataset, "__getitems__"):
            return list(zip(numbers, self.dataset.__getitems__(numbers), strict=True))
        return [(number, self.dataset[number]) for number in numbers]


class Items(Dataset[tuple[Found, Any]]):
    """Items, each with its row."""

    def __init__(self, dataset: Any, items: list[Found]):
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Found, Any]:
        item = self.items[index]
        return item, None if item.inputs is not None else self.dataset[item.row]


class Scanner:
    """Rows -> their items that are not stored yet."""

    def __init__(self, collator: Any, stores: dict[str, FeatureStore], hashes: dict[str, ItemHash]):
        self.collator, self.stores = collator, stores
        self.columns = {
            part.argument: replace_load(
                collator.media[part.argument], hashes[part.argument], num_bad_files=SharedCounter()
            )
            for encoder in stores
            for part in modalities_of(encoder)
        }

    def __call__(self, rows: list[tuple[int, Mapping[str, Any]]]) -> list[Found]:
        found = []
        for modality, store in self.stores.items():
            for part in modalities_of(modality):
                column = self.columns[part.argument]
                known: dict[Hashable, tuple[Any, Any]] = {}
                for number, row in rows:
                    for place, (name, cell) in enumerate(column.cells(row)):
                        same = column.key(cell)
                        if same not in known:
                            # The cell is kept: after its deletion another object could get its id.
                            known[same] = cell, column.load_item(cell, _where(row, number, name))
                        key = known[same][1]
                        if key is not None and key not in store:
                            found.append(Found(modality, part.argument, key, number, place))
        if "text" in self.stores:
            found += self._texts(rows)
        return found

    def _texts(self, rows: list[tuple[int, Mapping[str, Any]]]) -> list[Found]:
        texts = []
        for number, row in rows:
            texts.append(self.collator.text_of(row, self.collator.has_other_input(row), _name(row, number)))
        batch = self.collator.processor(text=texts, max_length=self.collator.max_length)
        found = []
        for (number, _), inputs in zip(rows, unpadded_texts(batch), strict=True):
            if inputs is not None and (key := hash_of_text(inputs)) not in self.stores["text"]:
                ids = {name: value.numpy().astype(np.int32) for name, value in inputs.items()}  # there may be millions
                found.append(Found(TEXT.name, TEXT.name, key, number, 0, ids))
        return found


class Reader:
    """
    Items and their rows -> the input of the encoder.

    Args:
        modality: that of the items; `None` for texts.
    """

    def __init__(self, collator: Any, modality: Optional[Modality]):
        self.processor, self.modality = collator.processor, modality
        column = None if modality is None else collator.media[modality.argument]
        self.column = None if column is None else replace_load(column, column.load)

    def __call__(self, pairs: list[tuple[Found, Any]]) -> Read:
        items = [item for item, _ in pairs]
        if self.column is None or self.modality is None:
            return Read(items, self._pad(items), list(range(len(items))), [item.key for item in items], [])
        column, read, dropped = self.column, [], []
        for item, row in pairs:
            name, cell = column.cells(row)[item.place]
            content = column.load_item(cell, _where(row, item.row, name))
            if content is None:
                dropped.append(item.key)
            else:
                read.append((item, content))
        if not read:
            return Read([], {}, [], [], dropped)
        contents = [content for _, content in read]
        options: dict[str, Any] = {self.modality.argument: contents}
        batch = self.processor(text=[""] * len(read), **options)
        index = batch[self.modality.encoder.index]
        numbers = [row[row >= 0] if self.modality.is_sequence else int(row[0]) for row in index]
        names = {"pixel_values": "pixel_values", "input_values": "input_values", "input_features": "input_features",
                 "audio_attention_mask": "attention_mask"}  # fmt: skip
        inputs = {names[name]: value for name, value in batch.items() if name in names}
        return Read([item for item, _ in read], inputs, numbers, [digest_of(content) for content in contents], dropped)

    def _pad(self, items: list[Found]) -> dict[str, torch.Tensor]:
        rows = [{name: torch.from_numpy(value).long() for name, value in (item.inputs or {}).items()} for item in items]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {n: pad([r[n] for r in rows], batch_first=True, padding_value=fill.get(n, 0)) for n in rows[0]}
        inputs["attention_mask"] = pad([torch.ones(item.length, dtype=torch.int64) for item in items], batch_first=True)
        return inputs


def _name(row: Mapping[str, Any], number: int) -> str:
    return name_of_row(row, 0) if ROW_KEY in row else f"row {number:,}"


def _where(row: Mapping[str, Any], number: int, column: str) -> str:
    return f"{_name(row, number)}, column {own_column(row, column)!r}"
