"""Converts the cells of an image column into RGB pictures."""

import contextlib
import functools
import io
import math
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from .downloads import fetch, is_url
from .file_contents import UnreadableFile, cast_of, check_file, content_key, content_of, describe, not_there
from .image_work import check_icon, check_work
from .label_cells import shorten
from .limits import limits, named
from .messages import listed


# The allowed formats, by Pillow's names. Others are refused: for example, reading EPS runs a program.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "DIB", "ICO",
)  # fmt: skip


class ImageError(ValueError):
    """An image that cannot be used; the message names it and the reason, in one sentence."""


def image_key(image: Any) -> Hashable:
    """Equal for two cells with the same image for certain: the same object, path or bytes."""
    return content_key(image, content_of(image))


def pixels_for_each(images: Sequence[Any]) -> Optional[int]:
    """
    The most pixels that each image of a row may keep, so that the row fits into the limit `row_pixels`.

    `None` if it fits already. Of large files only the headers are read.

    Args:
        images: as in [`load_image`].
    """
    most, kept = limits().row_pixels, limits().kept_image_pixels
    if len(images) * kept <= most or sum(min(declared_pixels(image, kept), kept) for image in images) <= most:
        return None
    return max(1, most // len(images))


@dataclass(frozen=True)
class ProcessedPictures:
    """
    A picture, or the frames of a video, as the image processor returns them.

    Args:
        pixel_values (`torch.Tensor`): (frames, channels, height, width) float32.
        digest (`bytes`): The hashes of the pictures before processing, one after the other, to compare pictures.
    """

    pixel_values: Any
    digest: bytes = b""

    @property
    def frames(self) -> "list[ProcessedPictures]":
        """Each frame of a video alone."""
        return [ProcessedPictures(frame[None]) for frame in self.pixel_values]


def num_pixels(item: Any) -> int:
    """Pixels of a picture, or of all pictures of a list, in memory."""
    return sum(picture.width * picture.height for picture in (item if isinstance(item, list) else [item]))


def declared_pixels(image: Any, unknown: int = 0) -> int:
    """
    The number of pixels of an image, without decoding it.

    Args:
        unknown: the number for addresses, and for what cannot be opened.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.width * image.height
    if hasattr(image, "shape"):
        return math.prod(sorted(image.shape)[-2:])  # without the channels
    try:
        content = content_of(image)
        if isinstance(content, (bytes, str, os.PathLike)) and not is_url(content):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with _open(content, fetch) as picture:
                    return picture.width * picture.height
    except Exception:  # `load_image` raises the error
        pass
    return unknown


def check_resized(image: Any, image_processor: Any) -> None:
    """
    Checks the size that an image processor gives a picture. A shortest edge does not bound the longest one.

    Args:
        image (`PIL.Image.Image`): The picture.
        image_processor: With a `size`, or `None`.

    Raises:
        ImageError: one sentence, if it is larger than `image_pixels`.
    """
    size = dict(getattr(image_processor, "size", None) or {})
    side = size.get("shortest_edge") or 0
    if "longest_edge" in size or not getattr(image_processor, "do_resize", False):
        return
    shorter, longer = sorted(image.size)
    if side * side * longer > limits().image_pixels * shorter:
        raise ImageError(
            f"an image {longer / shorter:.0f} times as long as wide, whose shortest edge becomes {side:,} pixels, has "
            f"more than {named('image_pixels')}"
        )


def load_image(image: Any, fetch: Callable[[str], bytes] = fetch, most_pixels: Optional[int] = None) -> Any:
    """
    An RGB `PIL.Image.Image`.

    Transparent pixels are laid on white, and 16-bit grey is scaled to 8 bits. Of an animation, the first frame is
    taken. Pictures are turned by their EXIF orientation, if it can be read. Pictures of more than `kept_image_pixels`
    of the [`Limits`] are shrunk to that size.

    Args:
        image: a `PIL.Image.Image`; a path, `file://` or http(s) address; the bytes of an image file, also as base64 or
            `data:` address; a dict with "bytes" or "path" (as from `datasets.Image(decode=False)`), and perhaps
            `"cast": {"mode": "L"}` for the mode of that feature; or an array or tensor, (height, width), (height,
            width, channels) or (channels, height, width), of truth values, uint8, uint16, other integers from 0 to 255,
            or floats from 0 to 1. Channels are grey, grey and alpha, RGB, or RGBA.
        fetch: turns an http(s) address into bytes, or raises `OSError` or `ValueError`.
        most_pixels (`int`, *optional*): Fewer than `kept_image_pixels`, as from [`pixels_for_each`].

    Raises:
        ImageError: if there is no such file, it is no image, it is cut short or empty, or the value of white is
            unclear. Also if it has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, which looks like an attack.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = describe(image, "image")
    most = min(limits().kept_image_pixels, most_pixels or limits().kept_image_pixels)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF data, in several lines
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            content = content_of(image)
            picture = _open(content, fetch)
            _check_size(picture, name)
            if _is_read(picture) and not _is_large(picture, most):
                return picture
            check_work(picture)
            if picture.tell() != 0:  # not `n_frames`, for which Pillow goes through all frames
                picture.seek(0)
            if picture is not content and _is_large(picture, most):
                picture.draft(None, _kept_size(picture, most))  # JPEG files can be decoded at a fraction of their size
            picture.load()
            _check_size(picture, name)  # the file may hold another size than it declares
            # Broken EXIF data do not make the picture useless.
            with contextlib.suppress(Exception):
                picture = ImageOps.exif_transpose(picture)
            if _is_large(picture, most):
                picture = _shrunk(_eight_bits_of(picture), most)
            mode = cast_of(image).get("mode")
            if mode is not None:
                picture = _eight_bits_of(picture).convert(mode)
            return _to_rgb(_eight_bits_of(picture))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(not_there(image, "image")) from error
    except UnreadableFile as error:
        raise ImageError(f"{name} cannot be read ({error})") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels that are allowed (PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read as {listed(FORMATS, 'or')}") from error
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError, ...
        reason = shorten(" ".join(str(error).split())) or type(error).__name__
        raise ImageError(f"{name} cannot be read ({reason})") from error


@functools.cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(image: Any, fetch: Callable[[str], bytes]) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if is_url(image):
        # Not by `transformers.image_utils.load_image`: it waits forever, reports an error page as a broken image, and
        # lays transparent pixels on black.
        image = fetch(image)
    if isinstance(image, (bytes, str, os.PathLike)):
        if isinstance(image, str) and image.startswith("data:"):
            raise FileNotFoundError
        check_file(image)
        check_icon(image)
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats())
    if hasattr(image, "shape"):
        return _from_array(image)
    raise ImageError(
        "an image must be a PIL image, a path, bytes, an array or a dict with 'bytes' or 'path', but is of type "
        f"{type(image).__name__}"
    )


def _check_size(picture: Any, name: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels (its size is {width} x {height})")
    if width * height > limits().image_pixels:
        raise ImageError(f"{name} has {width:,} x {height:,} pixels, more than {named('image_pixels')}")
    if max(width, height) > limits().image_aspect_ratio * min(width, height):
        raise ImageError(
            f"{name} has {width:,} x {height:,} pixels, so the ratio of its sides is more than "
            f"{named('image_aspect_ratio')}"
        )


def _is_read(picture: Any) -> bool:
    """Whether a picture has the form of the results of [`load_image`], so that no copy is needed."""
    from PIL import Image

    is_plain = type(picture) is Image.Image and picture.mode == "RGB" and not picture.info
    return is_plain and not getattr(picture, "_exif", None)


def _is_large(picture: Any, most: int) -> bool:
    return picture.width * picture.height > most


def _kept_size(picture: Any, most: int) -> tuple[int, int]:
    share = (most / (picture.width * picture.height)) ** 0.5
    return max(1, int(picture.width * share)), max(1, int(picture.height * share))


def _shrunk(picture: Any, most: int) -> Any:
    """The picture, of at most 8 bits per channel, shrunk to this number of pixels."""
    from PIL import Image

    if picture.mode == "PA" or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode in ("1", "P", "HSV"):  # their values cannot be averaged
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    return picture.resize(_kept_size(picture, most), Image.Resampling.BICUBIC, reducing_gap=2.0)


def _from_array(array: Any) -> Any:
    import numpy as np
    from PIL import Image

    array = array.cpu() if hasattr(array, "cpu") else array
    if np.prod(array.shape, dtype=object) > 4 * limits().image_pixels:  # it may be a view that is small in memory
        shape = " x ".join(f"{side:,}" for side in array.shape)
        raise ImageError(f"the image array has {shape} values, more than 4 for each pixel of {named('image_pixels')}")
    array = np.asarray(array)
    shape = array.shape
    if array.ndim == 3 and shape[-1] not in (1, 2, 3, 4) and shape[0] in (1, 2, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (2, 3, 4)):
        raise ImageError(
            f"the image array has the shape {tuple(shape)}, not (height, width[, channels]) or (channels, height, "
            "width)"
        )
    if array.size == 0:
        raise ImageError(f"the image array has no pixels (its shape is {shape})")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _from_sixteen_bits(array, "an image array of uint16")
    elif np.issubdtype(array.dtype, np.integer):
        array = array if array.dtype == np.uint8 else _from_integers(array, f"an image array of {array.dtype}")
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(
                "an image array of floats must lie between 0 and 1; divide it by 255, or convert it to uint8"
            )
        scaled = np.empty(array.shape, np.uint8)
        for rows, into in zip(_in_blocks(array), _in_blocks(scaled), strict=True):
            into[...] = (rows * 255 + 0.5).astype(np.uint8)
        array = scaled
    else:
        raise ImageError(f"an image array must hold integers, floats or truth values, but is of {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _in_blocks(array: Any) -> list[Any]:
    """Views of its rows, a few at a time."""
    return [array[start : start + 256] for start in range(0, len(array), 256)]


def _from_sixteen_bits(values: Any, what: str) -> Any:
    """Scales to 8 bits, unless so little of the range is used that white must be another number."""
    if 0 < values.max() < 2**12:
        raise ImageError(
            f"{what} has no value above {int(values.max()):,}, so 65,535 cannot be white: scale it to uint8 by the "
            "value of white"
        )
    return values // 257


def _from_integers(values: Any, what: str) -> Any:
    """Converts integers of a type without a defined white."""
    if not (values.min() >= 0 and values.max() <= 255):
        raise ImageError(f"{what} must lie between 0 and 255")
    if values.max() == 1:
        raise ImageError(
            f"{what} holds only 0 and 1, so the value of white is not known: convert it to bool, or to uint8 from 0 "
            "to 255"
        )
    return values


def _eight_bits_of(picture: Any) -> Any:
    """The picture itself, if it has 8 bits or less per channel."""
    import numpy as np
    from PIL import Image

    if picture.mode.startswith("I"):
        # Pillow would clip these to 255.
        values = np.asarray(picture)
        is_sixteen = (
            picture.mode != "I" or picture.format == "PNG" or (values.min() >= 0 and 2**12 <= values.max() < 2**16)
        )
        scale = _from_sixteen_bits if is_sixteen else _from_integers
        grey = scale(values, f"an image of mode {picture.mode!r}").astype(np.uint8)
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255  # white, as transparent pixels are
        return Image.fromarray(grey)
    if picture.mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all():
            raise ImageError("an image of floats must not hold NaN or infinity")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 255 or 1 < high < 16:
            raise ImageError(
                f"an image of floats must lie between 0 and 1, or 0 and 255, but holds values from {low:g} to {high:g}"
            )
        return Image.fromarray((values * (255 if high <= 1 else 1)).round().astype(np.uint8))
    return picture


def _to_rgb(picture: Any) -> Any:
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
