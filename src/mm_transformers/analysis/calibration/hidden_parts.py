"""The logits and vectors of rows as they are, and with parts hidden."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.functional import pad

from ...data.sources import NumberedRows, batches
from ...model.answers import evaluation_mode
from ...model.availability import group_name
from ...model.modeling_mm_transformer import MMTransformerForMultiTask
from ...model.oddness import row_vectors
from ..ablation.encoded_rows import EncodedRows


class GroupRows(NamedTuple):
    """
    The rows of one availability group.

    Args:
        numbers (rows,): the number of each row, from 0.
        natural (rows,) bool: whether the row itself is in this group; otherwise other parts of it were hidden.
        logits, labels: task -> (rows, ...), on the CPU.
        vectors: modality or `"fused"` -> (rows, width), NaN where a row lacks it.
    """

    numbers: torch.Tensor
    natural: torch.Tensor
    logits: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    vectors: dict[str, torch.Tensor]

    def chosen(self, rows: torch.Tensor) -> "GroupRows":
        """Some of the rows, by a bool or by numbers."""
        logits, labels, vectors = (
            {name: value[rows] for name, value in part.items()} for part in (self.logits, self.labels, self.vectors)
        )
        return GroupRows(self.numbers[rows], self.natural[rows], logits, labels, vectors)


def rows_by_group(
    model: MMTransformerForMultiTask,
    collator: Callable[[Any], dict[str, Any]],
    rows: NumberedRows,
    hide: bool = True,
    batch_size: int = 32,
) -> dict[str, GroupRows]:
    """
    The rows of each availability group. Each row is encoded once.

    Args:
        hide: whether a row is also in the groups of some of its parts, with its other parts hidden.
    """
    found: dict[str, list[GroupRows]] = {}
    with evaluation_mode(model), torch.no_grad():
        for numbers, of_batch in batches(rows, batch_size):
            batch = send_to_device(collator(of_batch), model.device)
            labels = {name: value.cpu() for name, value in batch.pop("labels", {}).items()}
            batch.pop("word_index", None)
            encoded = EncodedRows.of(model.model, batch)
            for group, part in _of_batch(model, encoded, labels, hide):
                found.setdefault(group, []).append(part._replace(numbers=part.numbers + numbers.start))
    return {group: _joined(parts) for group, parts in found.items()}


def _of_batch(
    model: MMTransformerForMultiTask, encoded: EncodedRows, labels: dict[str, torch.Tensor], hide: bool
) -> Iterator[tuple[str, GroupRows]]:
    names = ("text", *model.config.modalities)
    present = {name: torch.as_tensor(encoded.present(name)) for name in names}
    for kept in _subsets(names):
        has_all = torch.stack([present[name] for name in kept]).all(0)
        has_more = torch.stack([present[name] for name in names if name not in kept] or [~has_all]).any(0)
        natural = has_all & ~(has_more if len(kept) < len(names) else torch.zeros_like(has_all))
        wanted = torch.nonzero(has_all if hide else natural)[:, 0]
        if len(wanted) == 0:
            continue
        rows = dict.fromkeys(names, np.asarray(wanted))
        outputs = encoded.view(rows, frozenset(kept))
        logits = {
            name: value.float().cpu()
            for name, value in model(encoder_outputs=outputs).logits.items()
            if not model.tasks[name].compares_rows and ("text" in kept or not model.tasks[name].is_token_level)
        }
        has_text = torch.full((len(wanted),), "text" in kept, device=outputs.attention_mask.device)
        vectors = row_vectors(outputs, has_text)
        yield (
            group_name(kept),
            GroupRows(
                wanted,
                natural[wanted],
                logits,
                {name: value[wanted] for name, value in labels.items() if name in logits},
                {name: value.cpu() for name, value in vectors.items() if name in ("fused", *kept)},
            ),
        )


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(names) + 1):
        yield from combinations(names, size)


def _joined(parts: Sequence[GroupRows]) -> GroupRows:
    numbers = torch.cat([part.numbers for part in parts])
    natural = torch.cat([part.natural for part in parts])
    logits = {name: stacked_logits([part.logits[name] for part in parts]) for name in parts[0].logits}
    vectors = {name: torch.cat([part.vectors[name] for part in parts]) for name in parts[0].vectors}
    labels = {name: stacked_labels([part.labels[name] for part in parts]) for name in parts[0].labels}
    return GroupRows(numbers, natural, logits, labels, vectors)


def stacked_logits(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits of several parts, one after the other. Those of words are padded with 0 to the longest text."""
    return _stacked(parts, 0.0)


def stacked_labels(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The labels of several parts, one after the other. Those of words are padded to the longest text, as missing."""
    return _stacked(parts, torch.nan if parts[0].is_floating_point() else -100)


def _stacked(tensors: Sequence[torch.Tensor], padding: float) -> torch.Tensor:
    """Batches one after the other; those of words are padded to the longest text."""
    if tensors[0].ndim < 2 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    after = [0, 0] * (tensors[0].ndim - 2)
    return torch.cat([pad(tensor, (*after, 0, longest - tensor.shape[1]), value=padding) for tensor in tensors])
