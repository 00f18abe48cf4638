"""How much of what strangers send is read: the one list of limits."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
    """
    Bounds on pictures, sounds, videos, texts, files and downloads. What exceeds one is refused in one sentence, or
    shortened where the entry says so. Change them by [`set_limits`].

    Args:
        image_pixels (`int`): Pixels of a picture as its file declares them.
        kept_image_pixels (`int`): Pixels of a picture in memory; larger pictures are shrunk while they are read.
        image_aspect_ratio (`int`): The longer side of a picture, divided by the shorter.
        audio_seconds (`float`): Seconds of one sound.
        video_seconds (`float`): Seconds of one video.
        video_frames (`int`): Frames of one video.
        file_bytes (`int`): Bytes of one file of a picture, sound or video.
        text_characters (`int`): Characters of one text cell that are tokenised.
        download_bytes (`int`): Bytes of one download.
        download_seconds (`float`): Seconds of one download, in all.
        recipe_bytes (`int`): Bytes of a recipe.
        config_parameters (`int`): Parameters of a model that is built from a config.
        config_layers (`int`): The largest number of layers, stages or blocks in the config of an encoder.
        request_seconds (`float`): Seconds of one request to the demo page.
        request_words (`int`): Words of a text in one request to the demo page; later words are left out.
        upload_bytes (`int`): Bytes of one upload to the demo page.
    """

    image_pixels: int = 50_000_000
    kept_image_pixels: int = 2048 * 2048
    image_aspect_ratio: int = 100
    audio_seconds: float = 600.0
    video_seconds: float = 3600.0
    video_frames: int = 100_000
    file_bytes: int = 256 * 2**20
    text_characters: int = 1_000_000
    download_bytes: int = 64 * 2**20
    download_seconds: float = 30.0
    recipe_bytes: int = 2**20
    config_parameters: int = 100_000_000_000
    config_layers: int = 300
    request_seconds: float = 60.0
    request_words: int = 2_000
    upload_bytes: int = 32 * 2**20


_current = Limits()


def limits() -> Limits:
    """The limits of this process."""
    return _current


def set_limits(**changes: Any) -> Limits:
    """
    Changes limits of this process, and of the loader workers that it starts.

    Args:
        changes: fields of [`Limits`].

    Returns:
        The limits from now on.

    Raises:
        TypeError: if there is no such limit.

    Example:

    ```python
    >>> set_limits(image_pixels=200_000_000).image_pixels
    200000000
    ```
    """
    global _current
    _current = dataclasses.replace(_current, **changes)
    return _current
