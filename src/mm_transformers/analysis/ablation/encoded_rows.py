"""Variants of rows that are encoded once: without a modality, or with that of another row."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch
from torch.nn.functional import pad

from ...model.fusion_base import Stream
from ...model.modalities import ENCODERS
from ...model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModelOutput


class EncodedRows:
    """
    Some rows after the encoders, before the fusion: their variants need the fusion and the heads only.

    Args:
        model ([`MMTransformerModel`]): The model that encoded them, in evaluation mode.
        encoded: modality -> its tokens: "text" and all other modalities.
        has_text (`torch.BoolTensor` of shape `(num_rows,)`): The rows with a text. Others have a learned vector, which
            the tokens do not reveal.
    """

    def __init__(self, model: MMTransformerForMultiTask, encoded: Mapping[str, Stream], has_text: torch.Tensor):
        self.model, self.encoded, self.has_text = model, encoded, has_text
        self.num_rows = len(has_text)

    @classmethod
    def of(cls, model: MMTransformerForMultiTask, batch: Mapping[str, torch.Tensor]) -> "EncodedRows":
        """
        The encoded rows of a batch.

        Args:
            batch: the inputs of the model.
        """
        encoded, _ = model.encode_rows(**batch)
        return cls(model, encoded, batch["attention_mask"].bool().any(-1))

    @classmethod
    def together(cls, parts: Sequence["EncodedRows"]) -> "EncodedRows":
        """The rows of all parts, one after the other."""
        names = dict.fromkeys(name for part in parts for name in part.encoded)
        sizes = [part.num_rows for part in parts]
        encoded = {name: joined([part.encoded.get(name) for part in parts], sizes) for name in names}
        return cls(parts[0].model, encoded, torch.cat([part.has_text for part in parts]))

    def view(
        self, rows: Mapping[str, np.ndarray | torch.Tensor], modalities: Optional[frozenset[str]] = None
    ) -> MMTransformerModelOutput:
        """
        The fused outputs of rows that are combined from these.

        Args:
            rows: modality -> the row that it comes from, (new number of rows,) int64.
            modalities: the kept modalities; all by default. With none, the model answers from its priors.
        """
        fused: dict[str, Stream] = {}
        for name, stream in self.encoded.items():
            # A model that reads no text has a stream of the vector instead, equal in all rows.
            chosen = torch.as_tensor(rows.get(name, next(iter(rows.values()))), device=self.has_text.device)
            if modalities is None or name in modalities:
                taken = of_rows(stream, chosen)
            else:
                taken = self.model.no_text(len(chosen)) if name == "text" else None
            if taken is not None:
                fused[name] = taken
        return self.model.fuse(fused)

    def without_column(self, token: int, features: list[int]) -> "EncodedRows":
        """
        The same rows without one column of their table.

        Args:
            token: the number of its token.
            features: the numbers of its features for linear probes.
        """
        table = self.encoded.get("table")
        if table is None or table.token_mask is None or table.item_index is None:
            return self
        mask, means = table.token_mask.clone(), table.item_means
        mask[:, token] = False
        if means is not None:
            means = means.clone()
            means[:, features] = 0.0
        index, has_cell = table.item_index, mask.any(1)
        index = torch.where((index >= 0) & has_cell[index.clamp(min=0)], index, -1)
        table = table._replace(token_mask=mask, item_means=means, item_index=index)
        return EncodedRows(self.model, {**self.encoded, "table": table}, self.has_text)

    def present(self, modality: str) -> np.ndarray:
        """(num_rows,) bool: the rows with this modality."""
        if modality == "text":
            return self.has_text.cpu().numpy()
        if modality not in self.encoded:
            return np.zeros(self.num_rows, dtype=bool)
        return self.encoded[modality].present.cpu().numpy()


def joined(streams: Sequence[Optional[Stream]], sizes: Sequence[int]) -> Stream:
    """
    One stream of the rows of several, one after the other; shorter ones are padded.

    Args:
        streams: at least one, of the same modality; `None` if no row has an item.
        sizes: the number of rows in each.
    """
    given = [stream for stream in streams if stream is not None]
    length = max(stream.tokens.shape[1] for stream in given)
    tokens = torch.cat([pad(stream.tokens, (0, 0, 0, length - stream.tokens.shape[1])) for stream in given])
    token_mask = None
    if any(stream.token_mask is not None or stream.tokens.shape[1] < length for stream in given):
        masks = [tokens.new_ones(s.tokens.shape[:2], dtype=torch.bool) if s.token_mask is None else s.token_mask
                 for s in given]  # fmt: skip
        token_mask = torch.cat([pad(mask, (0, length - mask.shape[1])) for mask in masks])
    means: Any = [stream.item_means for stream in given]
    result = Stream(given[0].name, tokens, token_mask, item_means=None if means[0] is None else torch.cat(means))
    ids = [stream.token_ids for stream in given if stream.token_ids is not None]
    if ids:
        result = result._replace(token_ids=torch.cat([pad(part, (0, length - part.shape[1])) for part in ids]))
    if all(stream is not None and stream.item_index is None for stream in streams):
        return result
    places, first = [], 0
    for stream, size in zip(streams, sizes, strict=True):
        if stream is None:
            places.append(torch.full((size, 1), -1, device=tokens.device))
            continue
        index = torch.arange(size, device=tokens.device)[:, None] if stream.item_index is None else stream.item_index
        places.append(torch.where(index >= 0, index + first, -1))
        first += len(stream.tokens)
    most = max(index.shape[1] for index in places)
    index = torch.cat([pad(part, (0, most - part.shape[1]), value=-1) for part in places])

    def of_places(name: str) -> Optional[torch.Tensor]:
        """This value of each place of each row, 0 if a stream lacks it."""
        if all(getattr(stream, name) is None for stream in given):
            return None
        parts = []
        for stream, part in zip(streams, places, strict=True):
            own = None if stream is None else getattr(stream, name)
            parts.append(tokens.new_zeros(*part.shape, tokens.shape[-1]) if own is None else own)
        return torch.cat([pad(part, (0, 0, 0, most - part.shape[1])) for part in parts])

    return result._replace(item_index=index, offsets=of_places("offsets"), scales=of_places("scales"))


def of_rows(stream: Stream, rows: torch.Tensor) -> Optional[Stream]:
    """The stream of these rows, (num_rows,) int64, with their items; `None` if they have none."""
    stream = stream.of_rows(rows)
    index: Any = stream.item_index
    used, places = index[index >= 0].unique(return_inverse=True)
    if len(used) == 0:
        return None
    index = index.clone()
    index[index >= 0] = places
    of_items = ("token_mask", "item_means", "token_ids")
    kept = {name: x[used] for name in of_items if (x := getattr(stream, name)) is not None}
    return stream._replace(tokens=stream.tokens[used], item_index=index, is_full=False, **kept)


def exchanged(present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    For each row, the row whose modality it gets.

    The rows that have the modality form one cycle, so none keeps its own, unless it is the only one. Rows without the
    modality stay without it.
    """
    cycle = rng.permutation(np.flatnonzero(present))
    rows = np.arange(len(present))
    rows[cycle] = np.roll(cycle, 1)
    return rows


def pairs(num_rows: int, chunk: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All (i, j) with i, j < num_rows, in chunks."""
    for numbers in torch.arange(num_rows * num_rows).split(chunk):
        yield numbers // num_rows, numbers % num_rows


def shown_name(modality: str) -> str:
    """The name of a modality in tables and figures."""
    return ENCODERS[modality].noun
