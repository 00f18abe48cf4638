"""Is a row unlike the training rows? The distance of its vectors from theirs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from .availability import OTHER, modalities_in
from .embeddings import FUSED, missing_as_nan
from .fusion_layers import masked_mean
from .modalities import ENCODERS


# The share of calibration rows that count as odd.
FALSE_ALARMS = 0.01
_MOST = 65_536


class OddRow(NamedTuple):
    """
    How unlike the training rows a row is.

    Args:
        score: its largest distance, divided by the threshold of its group: above 1 it is odd.
        part: the modality with the largest distance, or `"fused"`.
    """

    score: float
    part: str

    @property
    def is_odd(self) -> bool:
        return self.score > 1


def odd_sentence(row: str, odd: OddRow) -> str:
    """The warning about an odd row."""
    part = (
        "combination of parts" if odd.part == FUSED else ENCODERS[odd.part].noun if odd.part in ENCODERS else odd.part
    )
    if not math.isfinite(odd.score):
        return f"{row}: the vectors of its {part} are not finite numbers. Do not rely on its answers."
    return (
        f"{row} is unlike the rows that the model was calibrated on: its {part} is {odd.score:.1f} times as far from "
        f"them as {1 - FALSE_ALARMS:.0%} of these rows. Do not rely on its answers."
    )


class Oddness(nn.Module):
    """
    Mahalanobis distances (https://arxiv.org/abs/1807.03888) of the mean vectors of each modality, and of the fused one.

    The covariance is that of the first principal directions, and one variance for all others
    (https://doi.org/10.1111/1467-9868.00196). The statistics are buffers, so a checkpoint holds them. They stay in
    float32: bfloat16 has too few digits for them.

    Args:
        values: `config.calibration["oddness"]`: `"parts"` (name -> `"width"`, `"rank"`, and the `"scale"` of its
            distances) and `"thresholds"` (availability group -> number).
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.parts, self.thresholds = values["parts"], values["thresholds"]
        for name, part in self.parts.items():
            self.register_buffer(f"{name}_mean", torch.zeros(part["width"], dtype=torch.float32))
            directions = torch.zeros(part["rank"], part["width"], dtype=torch.float32)
            self.register_buffer(f"{name}_directions", directions)
            self.register_buffer(f"{name}_precisions", torch.ones(part["rank"] + 1, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Oddness":
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = self._buffers[name]
            if before is not None and moved is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def distances(self, vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Part -> (batch,) float32: its distance divided by its scale; NaN where a row lacks it."""
        found = {}
        for name, part in self.parts.items():
            if name in vectors:
                of_part = (getattr(self, f"{name}_{statistic}") for statistic in ("mean", "directions", "precisions"))
                found[name] = distance(vectors[name].float(), *of_part) / part["scale"]
        return found

    def forward(self, vectors: Mapping[str, torch.Tensor], groups: Sequence[str]) -> list[OddRow]:
        distances = self.distances(vectors)
        names = list(distances)
        values = torch.stack(list(distances.values()), 1)
        has_part = torch.tensor(
            [[name == FUSED or name in modalities_in(group) for name in names] for group in groups],
            device=values.device,
        )
        # A part that a row lacks has no distance; vectors with NaN are infinitely far away.
        values = torch.where(values.isnan(), torch.where(has_part, math.inf, -1.0), values)
        largest, place = values.max(1)
        other = self.thresholds.get(OTHER)
        limits = [self.thresholds.get(group, other) or 1.0 for group in groups]
        return [
            OddRow(score / limit, names[i])
            for score, limit, i in zip(largest.tolist(), limits, place.tolist(), strict=True)
        ]


def distance(
    vectors: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor, precisions: torch.Tensor
) -> torch.Tensor:
    """
    (batch,): the Mahalanobis distance.

    Args:
        vectors (batch, width), mean (width,).
        directions (rank, width): orthonormal.
        precisions (rank + 1,): 1 / variance along each direction, and along any other.
    """
    centred = vectors - mean
    along = centred @ directions.T
    rest = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0)
    return ((along.square() * precisions[:-1]).sum(1) + rest * precisions[-1]).sqrt()


def fitted(vectors: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The mean, directions and precisions of vectors, for [`distance`].

    Args:
        vectors (rows, width): at least two.
        rank: the largest number of directions.
    """
    exact = vectors.double()
    mean = exact.mean(0)
    _, singular, directions = torch.linalg.svd(exact - mean, full_matrices=False)
    variances = singular.square() / max(len(exact) - 1, 1)
    floor = variances.sum().clamp(min=1e-12) * 1e-6
    rank = min(rank, len(exact) - 1, exact.shape[1])
    precisions = exact.new_zeros(rank + 1)
    precisions[:rank] = 1 / variances[:rank].clamp(min=floor)
    if rank < exact.shape[1]:
        precisions[rank] = 1 / (variances[rank:].sum() / (exact.shape[1] - rank)).clamp(min=floor)
    return mean.float(), directions[:rank].float(), precisions.float()


def row_vectors(outputs: Any, has_text: Optional[torch.Tensor] = None) -> dict[str, torch.Tensor]:
    """
    The mean vector of each modality, and of the fused states: name -> (batch, width), NaN where a row lacks it.

    Args:
        outputs ([`MMTransformerModelOutput`]), has_text: As in [`groups_of`].
    """
    found = {FUSED: outputs.pooler_output.float()}
    for name, stream in outputs.encoded.items():
        present = stream.present if name != "text" or has_text is None else has_text
        means = stream.row_means
        means = masked_mean(stream.hidden_states, stream.mask) if means is None else means
        found[name] = missing_as_nan(means.float(), present)
    return found


def check_oddness(values: Any) -> Optional[str]:
    """What is wrong with `config.calibration["oddness"]`; `None` if nothing is."""
    parts, thresholds = (values.get(key) if isinstance(values, dict) else None for key in ("parts", "thresholds"))
    if not isinstance(parts, dict) or not parts or not isinstance(thresholds, dict):
        return "parts and thresholds must be dicts"
    for name, part in parts.items():
        sizes = [part.get(key) for key in ("width", "rank")] if isinstance(part, dict) else [None]
        if not (isinstance(name, str) and name.isidentifier()):
            return f"{name!r} is no name of a part"
        if not all(type(size) is int and 0 <= size <= _MOST for size in sizes) or sizes[1] > sizes[0]:
            return f"width and rank of {name!r} are {sizes}"
    numbers = [*thresholds.values(), *(part.get("scale") for part in parts.values())]
    if not all(type(number) in (int, float) and 0 < number < float("inf") for number in numbers):
        return "thresholds and scales must be numbers above 0"
    return None
