"""Turns whatever a table holds in its image column into RGB pictures."""

import contextlib
import io
import os
import warnings
from collections.abc import Hashable
from typing import Any

from .files import content_key, content_of, describe, fetch, is_url, not_there


class ImageError(ValueError):
    """An image that cannot be used; the message says which and why, in one sentence."""


def image_key(image: Any) -> Hashable:
    """Equal for two cells that surely hold the same image: the same object, path or bytes."""
    return content_key(content_of(image))


def load_image(image: Any):
    """
    An RGB `PIL.Image.Image`.

    Transparent pixels are laid on white, 16-bit grey is scaled to 8 bits, of animations the first frame is taken, and
    pictures are turned as their EXIF orientation, if it can be read, says.

    Args:
        image: a `PIL.Image.Image`; a path or http(s) address; the bytes of an image file; a dict with "bytes" or
            "path" (what `datasets.Image(decode=False)` gives); or an array or tensor, (height, width), (height, width,
            channels) or (channels, height, width), of uint8, uint16, or floats from 0 to 1.

    Raises:
        ImageError: if there is no such file, it is no image, it is cut short, it is empty, or it is so large that it
            looks like an attack (more than `PIL.Image.MAX_IMAGE_PIXELS` pixels).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = describe(image, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _open(content_of(image))
            if 0 in picture.size:
                raise ImageError(f"{name} has no pixels (its size is {picture.size[0]} x {picture.size[1]})")
            if getattr(picture, "n_frames", 1) > 1:
                picture.seek(0)
            picture.load()
            # Broken EXIF data do not make the picture useless.
            with contextlib.suppress(Exception):
                picture = ImageOps.exif_transpose(picture)
            return _to_rgb(picture)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(not_there(image, "image")) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that are allowed (PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read") from error
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read ({reason})") from error


def _open(image: Any):
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if is_url(image):
        # Not by `transformers.image_utils.load_image`: it waits for ever, takes an error page for a broken image, and
        # lays what is transparent on black.
        return Image.open(io.BytesIO(fetch(image)))
    if isinstance(image, (str, os.PathLike)):
        return Image.open(image)
    if hasattr(image, "shape"):
        return _from_array(image)
    raise ImageError(
        "an image must be a PIL image, a path, bytes, an array or a dict with 'bytes' or 'path', but is of type "
        f"{type(image).__name__}"
    )


def _from_array(array: Any):
    import numpy as np
    from PIL import Image

    array = np.asarray(array.cpu() if hasattr(array, "cpu") else array)
    shape = array.shape
    if array.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ImageError(
            f"the image array has the shape {tuple(shape)}, not (height, width[, channels]) or (channels, height, "
            "width)"
        )
    if array.size == 0:
        raise ImageError(f"the image array has no pixels (its shape is {shape})")
    if (
        array.dtype != bool
        and not np.issubdtype(array.dtype, np.integer)
        and not np.issubdtype(array.dtype, np.floating)
    ):
        raise ImageError(f"an image array must hold integers, floats or truth values, but is of {array.dtype}")
    if array.dtype == np.uint16:
        array = array // 257
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError("an image array of floats must lie between 0 and 1; divide it by 255, or make it uint8")
        array = array * 255 + 0.5
    elif array.dtype == bool:
        array = array * 255
    elif array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 255):
        raise ImageError(f"an image array of {array.dtype} must lie between 0 and 255")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _to_rgb(picture):
    import numpy as np
    from PIL import Image

    if picture.mode.startswith("I"):
        # 16 bits per pixel, in whatever byte order; Pillow would clip them to 255.
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    elif picture.mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all():
            raise ImageError("an image of floats must not hold NaN or infinity")
        picture = Image.fromarray((values * (255 if values.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
