"""Batches of stored features instead of images, sounds or texts."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import torch

from ..model.modalities import modalities_of, no_pixel_limit
from .feature_keys import ItemHash, hash_of_text
from .feature_store import FeatureStore
from .media import MediaColumn


class CachedItem(NamedTuple):
    """The features of an image, a video or a sound; `tokens` is `None` if there are none."""

    key: bytes
    tokens: Optional[torch.Tensor] = None
    digest: bytes = b""


class _Lookup:
    """Replaces the reader of an item: returns its features, and reads the item only to raise its error."""

    def __init__(self, item_hash: ItemHash, store: FeatureStore):
        self.item_hash, self.store = item_hash, store

    def __call__(self, cell: Any) -> Any:
        key = self.item_hash(cell)
        if key in self.store:
            found = CachedItem(*self.store[key])
        else:
            self.item_hash.load(cell)  # a file that cannot be read is treated as it is without a cache
            found = CachedItem(key)
        return [found] if self.item_hash.modality.is_sequence else found


class CachedFeatures:
    """
    The stored features that a collator reads instead of the inputs of frozen encoders.

    Args:
        stores: "text", "vision" or "audio" -> the store of its features.
        hashes: "images", "videos" or "audio" -> the hash by which an item is found.
        text_width, text_dtype: of the features of texts, needed for a batch without any text.
    """

    def __init__(
        self,
        stores: dict[str, FeatureStore],
        hashes: dict[str, ItemHash],
        text_width: int,
        text_dtype: torch.dtype,
    ):
        self.stores, self.hashes, self.text_width, self.text_dtype = stores, hashes, text_width, text_dtype

    @property
    def kinds(self) -> list[str]:
        """The inputs that the processor no longer gets."""
        return [modality.argument for encoder in self.stores for modality in modalities_of(encoder)]

    def with_lookup(self, media: dict[str, MediaColumn]) -> dict[str, MediaColumn]:
        """The columns of a collator; stored columns look their items up instead of reading them."""
        columns = dict(media)
        for encoder, store in self.stores.items():
            for modality in modalities_of(encoder):
                kind = modality.argument
                columns[kind] = replace_load(media[kind], _Lookup(self.hashes[kind], store))
        return columns

    def fill(self, batch: dict[str, Any], media: Mapping[str, list[Any]], names: list[str]) -> None:
        """
        Adds `image_features`, `audio_features`, `audio_feature_mask`, `text_features` and the indexes to a batch.

        Args:
            media: the items of the columns for each row.
            names: the names of the rows in messages.

        Raises:
            ValueError: if something is not stored, or images have different numbers of tokens.
        """
        if "vision" in self.stores:
            rows = [[*images, *(videos or [])] for images, videos in zip(media["images"], media["videos"], strict=True)]
            batch.update(_images(rows, names))
        if "audio" in self.stores:
            batch.update(_sounds(media["audio"], names))
        if "text" in self.stores:
            batch["text_features"] = self._texts(batch, names)

    def _texts(self, batch: dict[str, Any], names: list[str]) -> torch.Tensor:
        store, mask = self.stores["text"], batch["attention_mask"].bool()
        features = torch.zeros(*mask.shape, self.text_width, dtype=self.text_dtype)
        for row, (name, inputs) in enumerate(zip(names, unpadded_texts(batch), strict=True)):
            if inputs is None:
                continue
            key = hash_of_text(inputs)
            if key not in store:
                raise ValueError(_missing(name, "text"))
            features[row, mask[row]] = store[key].tokens
        return features


def unpadded_texts(batch: Mapping[str, torch.Tensor]) -> list[Optional[dict[str, torch.Tensor]]]:
    """The inputs of the text encoder row by row, without padding; `None` for rows without a text."""
    rows: list[Optional[dict[str, torch.Tensor]]] = []
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
    for row, mask in enumerate(batch["attention_mask"].bool()):
        rows.append({name: value[row, mask] for name, value in inputs.items()} if mask.any() else None)
    return rows


def replace_load(column: MediaColumn, load: Callable[[Any], Any], **kwargs: Any) -> MediaColumn:
    """A copy of the column with another reader."""
    column = copy.copy(column)
    column.load, column.pixels_for_each, column.process = load, no_pixel_limit, None
    for name, value in kwargs.items():
        setattr(column, name, value)
    return column


def _images(rows: list[list[CachedItem]], names: list[str]) -> dict[str, torch.Tensor]:
    """Images, then frames of videos, in the order of the processor."""
    numbers: dict[tuple[bytes, int], int] = {}
    distinct: list[torch.Tensor] = []
    index: list[list[int]] = []
    frame_index: list[list[int]] = []
    for items, name in zip(rows, names, strict=True):
        index.append([])
        frame_index.append([])
        for item in items:
            if item.tokens is None:
                raise ValueError(_missing(name, "image or video"))
            is_video = item.tokens.ndim == 3
            for frame, tokens in enumerate(item.tokens if is_video else [item.tokens]):
                if (item.key, frame) not in numbers:
                    numbers[item.key, frame] = len(distinct)
                    distinct.append(tokens)
                index[-1].append(numbers[item.key, frame])
                frame_index[-1].append(frame if is_video else -1)
    batch = {"image_index": _padded(index)}
    if any(number >= 0 for row in frame_index for number in row):
        batch["frame_index"] = _padded(frame_index)
    if distinct:
        lengths = {len(tokens) for tokens in distinct}
        if len(lengths) > 1:
            raise ValueError(
                f"The images of a batch have {min(lengths)} to {max(lengths)} tokens, but must have equally many: "
                "set the image processor to resize images to one size."
            )
        batch["image_features"] = torch.stack(distinct)
    return batch


def _sounds(rows: list[list[CachedItem]], names: list[str]) -> dict[str, torch.Tensor]:
    numbers: dict[bytes, int] = {}
    distinct: list[torch.Tensor] = []
    index: list[list[int]] = []
    for items, name in zip(rows, names, strict=True):
        index.append([])
        for item in items:
            if item.tokens is None:
                raise ValueError(_missing(name, "sound"))
            if item.key not in numbers:
                numbers[item.key] = len(distinct)
                distinct.append(item.tokens)
            index[-1].append(numbers[item.key])
    batch = {"audio_index": _padded(index)}
    if distinct:
        lengths = torch.tensor([len(tokens) for tokens in distinct])
        batch["audio_features"] = torch.nn.utils.rnn.pad_sequence(distinct, batch_first=True)
        batch["audio_feature_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


def _padded(rows: list[list[int]]) -> torch.Tensor:
    width = max([len(row) for row in rows] + [1])
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)


def _missing(name: str, what: str) -> str:
    return (
        f"{name}: its {what} is not in the feature cache, although the data set was encoded. Rows that change at "
        "random when they are read (augmentation) cannot be cached: leave out feature_cache."
    )
