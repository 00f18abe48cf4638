"""The size of the pictures that a vision encoder reads, beside the size that it was pretrained on."""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .encoder_classes import arguments_of, check_class, class_options, encoder_part, without_random_skips
from .messages import one_line, shortened


def own_size(config: PreTrainedConfig) -> Optional[tuple[int, int]]:
    """Height and width of the pictures that an encoder was made for; `None` if its config has none."""
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)) and len(size) >= 2:
        return int(size[-2]), int(size[-1])
    return (size, size) if isinstance(size, int) else None


def size_options(encoder: PreTrainedModel, config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict[str, bool]:
    """
    The options of a forward pass for pictures of another size: position embeddings are interpolated.

    There are none if a side is no multiple of the patch: the encoder refuses it then, instead of dropping the rim.
    """
    cls: Any = encoder.__class__
    size, patch = tuple(pixel_values.shape[-2:]), getattr(config, "patch_size", None) or 1
    patches = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    is_usual = own_size(config) in (None, size)
    fits = all(side % part == 0 for side, part in zip(size, patches, strict=True))
    takes = "interpolate_pos_encoding" in arguments_of(cls)
    return {"interpolate_pos_encoding": True} if takes and fits and not is_usual else {}


def size_of(image_processor: Any) -> Optional[tuple[int, int]]:
    """Height and width of the pictures that an image processor makes; `None` if they depend on the picture."""
    if getattr(image_processor, "do_center_crop", False):
        size = getattr(image_processor, "crop_size", None)
    else:
        size = getattr(image_processor, "size", None) if getattr(image_processor, "do_resize", False) else None
    sides = [dict(size or {}).get(side) for side in ("height", "width")]
    # A broken file may hold anything; then the image processor raises its own error at the first picture.
    return (sides[0], sides[1]) if all(type(side) is int and side > 0 for side in sides) else None


def set_size(image_processor: Any, size: int | Sequence[int]) -> None:
    """
    Makes an image processor give pictures of this size. The rim that it crops keeps its share.

    Args:
        size: height and width; one number for squares.

    Raises:
        ValueError: one sentence, if it is no size, or the image processor has another kind of size.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"image_size must be a whole number of pixels, or height and width, but is {shortened(size)}.")
    wanted = {"height": sides[0], "width": sides[1]}
    known = dict(getattr(image_processor, "size", None) or {})
    before = {name: value for name, value in known.items() if value}
    if getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None):
        crop = dict(image_processor.crop_size)
        factor = max(wanted[side] / crop[side] for side in wanted)
        image_processor.size = type(image_processor.size)(
            **{name: math.ceil(value * factor) for name, value in before.items()}
        )
        image_processor.crop_size = type(image_processor.crop_size)(**wanted)
    elif set(before) == {"height", "width"}:
        image_processor.size = type(image_processor.size)(**wanted)
    elif set(before) == {"shortest_edge"} and sides[0] == sides[1]:
        image_processor.size = type(image_processor.size)(shortest_edge=sides[0])
    else:
        raise ValueError(
            f"{type(image_processor).__name__} has the size {before}, which image_size={shortened(size)} cannot "
            "replace: set the size of processor.image_processor yourself."
        )


def check_size(config: PreTrainedConfig, image_processor: Any) -> None:
    """
    Checks that a vision encoder reads pictures of the size that an image processor makes.

    Raises:
        ValueError: one sentence, if it does not.
    """
    size = size_of(image_processor)
    if size is None or own_size(config) in (None, size):
        return
    key = (config.to_json_string(), size)
    if key not in _PROBLEMS:
        _PROBLEMS[key] = _problem(config, size)
    if _PROBLEMS[key] is not None:
        made, own = (" x ".join(map(str, sides)) for sides in (size, own_size(config) or ()))
        raise ValueError(
            f"The vision encoder ({config.model_type!r}) reads no pictures of {made} pixels, which the image processor "
            f"makes ({_PROBLEMS[key]}): leave image_size at {own}, or choose another encoder."
        )


_PROBLEMS: dict[tuple[str, tuple[int, int]], Optional[str]] = {}


def _problem(config: PreTrainedConfig, size: tuple[int, int]) -> Optional[str]:
    """The error of the encoder at such a picture, without memory for weights; `None` if it reads it."""
    config = without_random_skips(type(config).from_dict(config.to_dict()))
    cls: Any = check_class(config, "vision")
    with torch.device("meta"), torch.no_grad():
        encoder = encoder_part(cls._from_config(config, **class_options(cls)), "vision").eval()
        error = _error_at(encoder, size)
        # Some encoders fail on the meta device at every size; then the first batch will tell.
        unknown = error is not None and _error_at(encoder, own_size(config) or size) is not None
    return None if error is None or unknown else one_line(error).rstrip(".")


def _error_at(encoder: PreTrainedModel, size: tuple[int, int]) -> Optional[Exception]:
    pixels = torch.zeros(1, getattr(encoder.config, "num_channels", 3), *size)
    try:
        encoder(pixel_values=pixels, **size_options(encoder, encoder.config, pixels))
    except Exception as error:
        return error
    return None
