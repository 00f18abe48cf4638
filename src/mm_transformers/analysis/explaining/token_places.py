"""Finds the places of tokens in the text, the pictures and the sound."""

from typing import Any, Optional

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...model.text_tokens import needed_text, tokenize


# The marks of tokenizers without offsets for a space, or for a later piece of a word.
_MARKS = ("▁", "Ġ", "##", "</w>", "@@")


def token_spans(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """
    Start and end in the text of each token; equal for tokens outside the text, such as special tokens.

    Args:
        ids: the tokens of this text, without padding.
    """
    cut = needed_text(tokenizer, text, len(ids))
    keeps_end = getattr(tokenizer, "truncation_side", "right") != "right"
    shift = len(text) - len(cut) if keeps_end else 0
    spans = _spans_in(tokenizer, cut, ids, keeps_end)
    return [(start + shift, end + shift) if start < end else (start, end) for start, end in spans]


def _spans_in(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], keeps_end: bool) -> list[tuple[int, int]]:
    if tokenizer.is_fast:
        options = {"return_offsets_mapping": True, "truncation": True, "max_length": len(ids), "verbose": False}
        encoded = tokenize(tokenizer, text, **options)
        if encoded["input_ids"] == ids:
            return [_without_spaces(text, *span) for span in encoded["offset_mapping"]]
    spans, place, step = [], len(text) if keeps_end else 0, -1 if keeps_end else 1
    # From the end that truncation keeps, since words may occur in the other part, too.
    for piece in tokenizer.convert_ids_to_tokens(ids)[::step]:
        piece = _without_marks(piece)
        is_word = piece and piece not in tokenizer.all_special_tokens
        start = -1 if not is_word else text.rfind(piece, 0, place) if keeps_end else text.find(piece, place)
        if start < 0:
            spans.append((place, place))
        else:
            spans.append((start, start + len(piece)))
            place = start if keeps_end else start + len(piece)
    return spans[::step]


def _without_marks(piece: str) -> str:
    for mark in _MARKS:
        piece = piece.replace(mark, "")
    return piece


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    """Byte-level tokens begin with the space before their word."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def patch_grid(config: PreTrainedConfig, num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """
    (rows, columns) of the patches of a picture of height x width pixels, for a vision encoder and its number of tokens.

    Tokens that are no patches (class, registers) come first.

    Raises:
        ValueError: if the tokens do not lie in a grid.
    """
    size = _patch_size(config)
    if size:
        rows, columns = height // size, width // size
        if 0 < rows * columns <= num_tokens <= rows * columns + 16:
            return rows, columns
    # Stages that merge patches: the number of tokens reveals the factor. Some pad incomplete patches.
    strides = range(1, min(height, width) + 1)
    grids = [grid for s in strides for grid in ((-(-height // s), -(-width // s)), (height // s, width // s))]
    for rows, columns in grids:
        if rows * columns == num_tokens:
            return rows, columns
    for rows, columns in grids:
        if rows * columns <= num_tokens <= rows * columns + 16:
            return rows, columns
    raise ValueError(
        f"A picture of {height} x {width} pixels cannot be coloured: the places of the {num_tokens} tokens of "
        f"{config.model_type!r} in it are not known."
    )


def sums_over_patches(config: PreTrainedConfig, pixels: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """
    (height, width) of pixels -> (rows, columns): the sum over each patch of a grid, from [`patch_grid`].

    Remaining pixels beside the last whole patch count with it, so that the total is kept.
    """
    size = _patch_size(config)
    return sums_over_parts(sums_over_parts(pixels, shape[1], size).T, shape[0], size).T


def sums_over_parts(values: torch.Tensor, num_parts: int, size: Optional[int] = None) -> torch.Tensor:
    """
    (..., length) -> (..., num_parts): the sum over each part. Each value belongs to one part.

    Args:
        size: of a part, if there are enough values for whole parts; otherwise parts are as equal as possible.
    """
    length = values.shape[-1]
    places = torch.arange(length, device=values.device)
    parts = places // size if size and length // size == num_parts else places * num_parts // length
    sums = values.new_zeros(*values.shape[:-1], num_parts)
    return sums.index_add(-1, parts.clamp(max=num_parts - 1), values)


def _patch_size(config: PreTrainedConfig) -> Optional[int]:
    size = getattr(config, "patch_size", None)
    return size if isinstance(size, int) else None


def seen_region(image_processor: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels, of the model's part of a picture: all, or a central crop."""
    crop, size = getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None) or {}
    if not getattr(image_processor, "do_center_crop", False) or not crop:
        return 0.0, 0.0, float(width), float(height)
    scale_x = scale_y = 1.0
    shortest = _of(size, "shortest_edge")
    if getattr(image_processor, "do_resize", True):
        if shortest:
            scale_x = scale_y = shortest / min(width, height)
        elif _of(size, "height"):
            scale_x, scale_y = _of(size, "width") / width, _of(size, "height") / height
    crop_width = (_of(crop, "width") or _of(crop, "shortest_edge") or width) / scale_x
    crop_height = (_of(crop, "height") or _of(crop, "shortest_edge") or height) / scale_y
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return max(left, 0.0), max(top, 0.0), min(left + crop_width, width), min(top + crop_height, height)


def _of(size: Any, name: str) -> Any:
    return size.get(name) if hasattr(size, "get") else getattr(size, name, None)


def spread_over_pixels(
    patches: np.ndarray, width: int, height: int, region: tuple[float, float, float, float]
) -> np.ndarray:
    """(rows, columns) of patches -> (height, width) of pixels: linear between the centres of patches, 0 outside."""
    left, top, right, bottom = (round(edge) for edge in region)
    size = (max(bottom - top, 1), max(right - left, 1))
    grid = torch.tensor(patches, dtype=torch.float32)[None, None]
    pixels = np.zeros((height, width), dtype=np.float32)
    inside = torch.nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    pixels[top : top + size[0], left : left + size[1]] = inside[: height - top, : width - left]
    return pixels


def over_time(config: PreTrainedConfig, relevance: np.ndarray) -> np.ndarray:
    """The relevance of an audio encoder's tokens in the order of time, one value per step."""
    if config.model_type != "audio-spectrogram-transformer":
        return relevance
    # Two tokens that are no patches, then the patches: all time steps for each frequency band.
    bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return relevance[2:].reshape(bands, -1).sum(0)
