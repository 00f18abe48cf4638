"""Estimates the work for decoding a picture file, beyond its number of pixels, before it is decoded."""

import io
import math
import os
import re
from typing import Any

from .file_contents import UnreadableFile
from .limits import limits, named


# Markers of JPEG that end a scan or begin a segment. Others are skipped by decoders, or are an error for them.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_SCAN, _END = 0xDA, 0xD9
# No format that is decoded in Python takes more bytes for a pixel: "65535 65535 65535\n".
_MOST_BYTES = 18
_TILE_SIZE = (322, 323)
_ICON = b"\0\0\1\0"
_RUN_LENGTHS = (1, 2)  # the codes in the header of a BMP


def check_work(picture: Any) -> None:
    """
    Checks the work for decoding an opened `PIL.Image.Image` before it is decoded.

    Raises:
        UnreadableFile: if the file codes the picture more often than the limits allow, or too much of it needs slow
            code.
    """
    file, tiles = getattr(picture, "fp", None), getattr(picture, "tile", None) or []
    if file is None or getattr(file, "closed", False):
        return
    place = file.tell()
    try:
        _check_repeats(picture, tiles, file)
        _check_slowness(picture, tiles, file)
    finally:
        file.seek(place)


def _check_repeats(picture: Any, tiles: Any, file: Any) -> None:
    # Tiles of TIFF may be larger than the picture, and are then decoded completely.
    tags = getattr(picture, "tag_v2", None) if picture.format == "TIFF" else None
    width, height = (int((tags or {}).get(tag, 0)) for tag in _TILE_SIZE)
    if width * height > limits().image_pixels:
        raise UnreadableFile(f"it has tiles of {width:,} x {height:,} pixels, more than {named('image_pixels')}")
    # Strips and tiles may overlap.
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in (tile[1] for tile in tiles))
    repeats, what = math.ceil(covered / (picture.width * picture.height)), "layers"
    if picture.format in ("JPEG", "MPO"):
        file.seek(0)
        repeats, what = count_scans(file.read()), "scans"
    if repeats > limits().image_scans:
        raise UnreadableFile(f"it has {repeats:,} {what}, more than {named('image_scans')}")


def _check_slowness(picture: Any, tiles: Any, file: Any) -> None:
    from PIL import Image

    # These decoders are written in Python: of QOI, of PNM as text or with rare depths, and of BMP with run lengths.
    if not any(tile[0] in Image.DECODERS for tile in tiles):
        return
    size = file.seek(0, os.SEEK_END)
    num_pixels = max(picture.width * picture.height, size // _MOST_BYTES)
    if num_pixels > limits().slow_image_pixels:
        raise UnreadableFile(
            f"it has {picture.width:,} x {picture.height:,} pixels and {size:,} bytes in a format that is slow to "
            f"decode, more than {named('slow_image_pixels')}"
        )


def check_icon(content: Any) -> None:
    """
    Checks the bytes or the path of a picture: Pillow decodes icons of any size and kind while it opens them.

    Raises:
        OSError: if the file cannot be opened.
        UnreadableFile: if it is an icon that holds a BMP with run lengths, which icons must not hold.
    """
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        header = file.read(6)
        if not header.startswith(_ICON):
            return
        entries = file.read(16 * int.from_bytes(header[4:6], "little"))
        for start in range(0, len(entries) - 15, 16):
            file.seek(int.from_bytes(entries[start + 12 : start + 16], "little") + 16)
            if int.from_bytes(file.read(4), "little") in _RUN_LENGTHS:
                raise UnreadableFile("it is an icon with run-length encoding, which icons must not have")


def count_scans(content: bytes) -> int:
    """The number of scans of a JPEG, up to its end. Thumbnails in its segments, and later bytes, do not count."""
    most = content.count(b"\xff\xda")
    if most <= limits().image_scans:
        return most  # or fewer, so it need not be known exactly
    count = 0
    found = _MARKER.search(content)
    while found is not None and found.group(1)[0] != _END:
        count += found.group(1)[0] == _SCAN
        place = found.end()
        found = _MARKER.search(content, place + max(2, int.from_bytes(content[place : place + 2], "big")))
    return count
