"""Pairs of a text and a picture (or sound): matching pairs, and the choice of mismatched pairs."""

import hashlib
from typing import Any, NamedTuple, Optional, Protocol

import torch

from .fusion_base import Stream
from .fusion_layers import masked_mean
from .label_cells import MAX_EXACT_FLOAT, as_scalar, is_missing, shorten_value
from .task_base import LabelContext


def fingerprint(content: Any) -> int:
    """63 bits of the hash of the content, equal in every process."""
    data = content if isinstance(content, bytes) else str(content).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


_TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_truth_value(text: str, default: Any) -> Any:
    """The truth value in a text, in upper or lower case; the default if it is none."""
    return _TRUTH_VALUES.get(text.strip().lower(), default)


def encode_pair(name: str, value: Any) -> Optional[int]:
    """
    The cell of a column of pairs: its group, -1 for a pair without a group, `None` for no pair.

    Raises:
        ValueError: if it is neither truth value nor id.
    """
    value = as_scalar(value)
    if is_missing(value) or value is False:
        return None
    if value is True:
        return -1
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_FLOAT:
        value = int(value)  # tables with empty cells store integers as floats
    if isinstance(value, str):
        value = value.strip()
    if not isinstance(value, (str, int)):
        raise ValueError(
            f"task {name!r}: expected an id (equal for a text and {name} that belong together), True, False or None, "
            f"but got {shorten_value(value)} of type {type(value).__name__}"
        )
    return fingerprint(value)


def pair_ids(groups: list[Optional[int]], context: LabelContext, modality: str) -> torch.Tensor:
    """(batch, 3) int64: fingerprints of the text, of the item and of the group, -100 in rows that are no pair."""
    rows = []
    texts, items = ((context.fingerprints or {}).get(part, [None] * len(groups)) for part in ("text", modality))
    for group, text, item in zip(groups, texts, items, strict=True):
        is_pair = group is not None and text is not None and item is not None
        rows.append([text, item, group] if is_pair else [-100] * 3)
    return torch.tensor(rows, dtype=torch.int64)


class PairTask(Protocol):
    """A task about pairs of a text and an item of another modality, such as [`Retrieval`] and [`Matching`]."""

    name: str
    modality: str


class Pairs(NamedTuple):
    """
    The matching texts and items of some rows.

    Args:
        texts, items: the distinct ones, sorted.
        numbers: for each pair, the place of its text times the number of items, plus the place of its item; sorted.
    """

    texts: torch.Tensor
    items: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor) -> "Pairs":
        """
        The matching pairs of rows.

        A text matches an item if some row holds both, or if their rows name the same group. This is not transitive:
        with the rows (a, 1), (a, 2) and (b, 2), the text b does not match the item 1.

        Args:
            ids (rows, 3): from [`pair_ids`].
        """
        rows = ids[ids[:, 0] != -100]
        texts, text = rows[:, 0].unique(return_inverse=True)
        items, item = rows[:, 1].unique(return_inverse=True)
        grouped = rows[:, 2] >= 0
        groups, group = rows[grouped, 2].unique(return_inverse=True)
        # Each text of a group with each item of the same group.
        of_texts = torch.stack([group, text[grouped]], 1).unique(dim=0)
        of_items = torch.stack([group, item[grouped]], 1).unique(dim=0)
        counts = torch.bincount(of_items[:, 0], minlength=len(groups))
        repeats = counts[of_texts[:, 0]]
        firsts = (counts.cumsum(0) - counts)[of_texts[:, 0]].repeat_interleave(repeats)
        places = torch.arange(len(firsts), device=ids.device) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
        linked = of_texts[:, 1].repeat_interleave(repeats) * len(items) + of_items[firsts + places, 1]
        return cls(texts, items, torch.cat([text * len(items) + item, linked]).unique())

    def hold(self, texts: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Whether texts belong to items, both by fingerprint and of shapes that broadcast: bool."""
        # Any number will do for unknown ones.
        text = torch.searchsorted(self.texts, texts.contiguous())
        return torch.isin(text * len(self.items) + torch.searchsorted(self.items, items.contiguous()), self.numbers)


def matching_pairs(queries: torch.Tensor, keys: torch.Tensor, pairs: Optional[Pairs] = None) -> torch.Tensor:
    """
    Whether the text of one row belongs to the item of another: (rows, others) bool; see [`Pairs.of`].

    Args:
        queries (rows, 3): as [`pair_ids`] gives them; these rows are among `keys`.
        keys (others, 3): the same for all rows.
        pairs ([`Pairs`], *optional*): Those of `keys`, if they are known already.
    """
    pairs = Pairs.of(keys) if pairs is None else pairs
    is_pair = (queries[:, None, 0] != -100) & (keys[None, :, 0] != -100)
    return pairs.hold(queries[:, 0, None], keys[None, :, 1]) & is_pair


def labels_of_pairs_left(labels: torch.Tensor, kept: dict[str, torch.Tensor], modality: str) -> torch.Tensor:
    """The labels after modality dropout: a row without its text or item is no pair."""
    return labels.masked_fill(~(kept["text"] & kept[modality])[:, None], -100)


def may_mismatch(labels: torch.Tensor) -> torch.Tensor:
    """
    The texts and items of a batch that may form a mismatched pair: (batch, batch) bool, text of one row by item of
    another.

    Args:
        labels (batch, 4) int64: those of a [`Matching`] task: 1 or 0, then the columns of [`pair_ids`].
    """
    ids, is_pair = labels[:, 1:], labels[:, 0] == 1
    return ~matching_pairs(ids, ids) & is_pair[:, None] & is_pair[None]


def choose_partners(
    similarity: torch.Tensor, allowed: torch.Tensor, at_random: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One hard negative for each row (ALBEF, https://arxiv.org/abs/2107.07651, section 3.2).

    Args:
        similarity (batch, others): of the row to each of the others.
        allowed (batch, others) bool: which of them may be chosen.
        at_random: whether to draw in proportion to the softmax of the similarity, or to take the most similar one.

    Returns:
        The chosen ones, (batch,) int64, and whether there is one, (batch,) bool; without one, any number is chosen.
    """
    is_there = allowed.any(1)
    scores = similarity.masked_fill(~allowed & is_there[:, None], -torch.inf)
    chosen = torch.multinomial(scores.softmax(1), 1)[:, 0] if at_random else scores.argmax(1)
    return chosen, is_there


def pooled(stream: Stream) -> torch.Tensor:
    """(batch, width): the mean of the tokens of each row."""
    return masked_mean(stream.hidden_states, stream.mask)
