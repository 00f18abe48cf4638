"""Fits the statistics that tell rows which are unlike the training rows."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch

from ...model.availability import OTHER
from ...model.embeddings import FUSED
from ...model.oddness import FALSE_ALARMS, Oddness, distance, fitted
from .hidden_parts import GroupRows


RANK = 32
_FEWEST = 40


def fit_oddness(
    groups: Mapping[str, GroupRows], training: Mapping[str, GroupRows] | None = None, rank: int = RANK
) -> Oddness | None:
    """
    The statistics of training rows, with thresholds by calibration rows.

    Args:
        groups: the calibration rows by availability group.
        training: rows that the model was trained on; without them the statistics are those of one of each two
            calibration rows, and the thresholds come from the other ones.

    Returns:
        `None` if there are too few rows.
    """
    known = training or {group: _half(rows, 0) for group, rows in groups.items()}
    judged = groups if training else {group: _half(rows, 1) for group, rows in groups.items()}
    parts: dict[str, dict[str, Any]] = {}
    statistics: dict[str, tuple[torch.Tensor, ...]] = {}
    for name in dict.fromkeys(name for rows in known.values() for name in rows.vectors):
        vectors, own = _distinct(known, name), _distinct(judged, name)
        if min(len(vectors), len(own)) < _FEWEST:
            continue
        statistics[name] = fitted(vectors, min(rank, len(vectors) // 4))
        scale = float(distance(own, *statistics[name]).median())
        parts[name] = {"width": vectors.shape[1], "rank": len(statistics[name][1]), "scale": max(scale, 1e-6)}
    if not parts:
        return None
    oddness = Oddness({"parts": parts, "thresholds": {}})
    for name, values in statistics.items():
        for kind, value in zip(("mean", "directions", "precisions"), values, strict=True):
            getattr(oddness, f"{name}_{kind}").copy_(value)
    scores = {group: [row.score for row in oddness(rows.vectors, [group] * len(rows.numbers)) if isfinite(row.score)]
              for group, rows in judged.items()}  # fmt: skip
    thresholds = {group: _threshold(values) for group, values in scores.items() if len(values) >= _FEWEST}
    if not any(scores.values()):
        return None
    thresholds[OTHER] = max(_threshold(values) for values in scores.values() if values)
    oddness.thresholds = thresholds
    return oddness


def _half(rows: GroupRows, which: int) -> GroupRows:
    """One of each two rows, the same ones in all groups. The choice is random: rows may alternate."""
    pairs = rows.numbers.numpy() // 2
    shifts = np.random.default_rng(0).integers(0, 2, pairs.max(initial=-1) + 1)[pairs]
    return rows.chosen((rows.numbers + torch.from_numpy(shifts)) % 2 == which)


def _distinct(groups: Mapping[str, GroupRows], name: str) -> torch.Tensor:
    """The vectors of a part. A row that is in several groups counts once, but for its fused vector."""
    found: dict[Any, torch.Tensor] = {}
    for group, rows in groups.items():
        if name in rows.vectors:
            for number, vector in zip(rows.numbers.tolist(), rows.vectors[name], strict=True):
                if bool(vector.isfinite().all()):
                    found[(number, group) if name == FUSED else number] = vector
    return torch.stack(list(found.values())) if found else torch.empty(0, 1)


def _threshold(scores: list[float]) -> float:
    ordered = sorted(scores)
    return ordered[min(int((1 - FALSE_ALARMS) * len(ordered)), len(ordered) - 1)]
