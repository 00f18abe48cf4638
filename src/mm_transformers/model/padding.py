"""Runs encoders so that their outputs for a row do not depend on its padding."""

from collections.abc import Callable
from typing import Optional

import torch


def leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """The length of the padding before the first token of each row, (batch,) int64; 0 for empty rows."""
    places = (attention_mask.cumsum(1) == 0).sum(1)
    return torch.where(places == attention_mask.shape[1], 0, places)


def roll_rows(x: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """
    Rotates each row of (batch, length, ...) to the left, by its own number of places (batch,), fewer than the length.

    `torch.roll` would move all rows by the same number.
    """
    places = torch.arange(x.shape[1], device=x.device) + shifts[:, None]
    # Not by `%`, which the ONNX exporter does not support for dynamic lengths.
    places = torch.where(places >= x.shape[1], places - x.shape[1], places)
    places = torch.where(places < 0, places + x.shape[1], places)
    return x.gather(1, places.reshape(*places.shape, *[1] * (x.ndim - 2)).expand_as(x))


def run_by_length(
    run: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor],
    attention_mask: torch.Tensor,
    shortest: int = 1,
) -> torch.Tensor:
    """
    Runs an encoder on rows of one length at a time, without their padding, for encoders that mix padding into rows.

    Args:
        run: takes `inputs` and `attention_mask` of some rows, and returns their tokens (rows, tokens, width).
        inputs: tensors (batch, ...); those whose second dimension is that of the mask are cut to the length.
        attention_mask (batch, length): 1 at tokens, 0 at padding, which is on the right.
        shortest: the fewest places that the encoder takes; shorter rows are padded to it, whatever is in their batch.

    Returns:
        (batch, most tokens, width), with 0 where a row has fewer tokens.
    """
    length = attention_mask.shape[1]
    places = torch.arange(1, length + 1, device=attention_mask.device)
    ends = ((attention_mask != 0) * places).amax(1).clamp(min=1).tolist()
    parts: list[torch.Tensor] = []
    rows_of_parts: list[int] = []
    for end in sorted(set(ends)):
        rows = [row for row, its_end in enumerate(ends) if its_end == end]
        index = torch.tensor(rows, device=attention_mask.device)

        def cut(x: torch.Tensor, index: torch.Tensor = index, end: int = end) -> torch.Tensor:
            x = x[index]
            if x.ndim < 2 or x.shape[1] != length:
                return x
            x = x[:, :end]
            return _pad(x, shortest - end) if end < shortest else x

        given = {name: cut(x) for name, x in inputs.items()}
        tokens = run(**given, attention_mask=cut(attention_mask))
        parts.append(tokens)
        rows_of_parts += rows
    most = max(part.shape[1] for part in parts)
    joined = torch.cat([_pad(part, most - part.shape[1]) for part in parts])
    return joined[torch.tensor(rows_of_parts, device=joined.device).argsort()]


def _pad(x: torch.Tensor, places: int) -> torch.Tensor:
    return x if places <= 0 else torch.cat([x, x.new_zeros(x.shape[0], places, *x.shape[2:])], 1)


def as_long_as(tokens: torch.Tensor, length: Optional[int]) -> torch.Tensor:
    """The tokens (batch, tokens, width), cut or padded with 0 to a length."""
    return tokens if length is None else _pad(tokens[:, :length], length - tokens.shape[1])
