"""The list of all limits for inputs from strangers."""

import dataclasses
import math
import multiprocessing
import numbers
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
    """
    Bounds on pictures, sounds, videos, texts, files and downloads. What exceeds one is refused in one sentence, unless
    the entry says otherwise. Change them by [`set_limits`].

    Args:
        image_pixels (`int`): Pixels of a picture, as its file declares them.
        kept_image_pixels (`int`): Pixels of a picture in memory. Larger pictures are shrunk while they are read.
        image_aspect_ratio (`int`): The longer side of a picture, divided by the shorter.
        image_scans (`int`): How often the file of a picture may code it: scans of a JPEG, overlapping strips of a TIFF.
        slow_image_pixels (`int`):
            Pixels of a picture whose decoder is written in Python: QOI, PNM as text or of a rare depth, run-length BMP.
        row_items (`int`): Pictures of one row; likewise its sounds.
        row_pixels (`int`):
            Pixels in memory of all pictures of one row; likewise of all frames of its video. If there are more, the
            largest pictures are shrunk while they are read.
        batch_pixels (`int`):
            Pixels in memory of all pictures of a batch; likewise of all frames of its videos. Further ones are kept as
            the image processor resizes them.
        audio_seconds (`float`): Seconds of one sound.
        audio_samples (`int`): Samples of one sound, all channels together, before and after resampling.
        encoded_seconds (`float`):
            Seconds of a sound that reach an audio encoder without a window of its own. The rest is cut off.
        lowest_sampling_rate (`int`): The lowest sampling rate of a sound, in Hz.
        highest_sampling_rate (`int`): The highest sampling rate of a sound, in Hz.
        video_seconds (`float`): Seconds of one video.
        video_frames (`int`): Frames of one video.
        video_pixels (`int`): Pixels of all frames of a video that are decoded in one pass over it.
        video_frame_pixels (`int`): Pixels of one frame of a video, as its file declares them.
        kept_frames (`int`): Frames of one video in memory.
        kept_frame_pixels (`int`): Pixels of one frame in memory. Larger frames are shrunk while they are read.
        file_bytes (`int`):
            Bytes of one file of a picture, sound or video; characters of one cell of a table; bytes of a column of
            Parquet whose file is 200 times smaller.
        text_characters (`int`): Characters of one text. The rest is left out, as what exceeds `max_length` is.
        padded_tokens (`int`):
            The largest `max_length` to which a saved tokenizer may pad every text. Beyond, it pads to the longest text.
        download_bytes (`int`): Bytes of one download.
        download_seconds (`float`): Seconds of one download, in all.
        table_columns (`int`): Columns of numbers and categories of one model.
        category_values (`int`): Known values of one column of categories.
        recipe_bytes (`int`): Bytes of a recipe.
        config_layers (`int`): The largest number of layers, stages or blocks in the config of an encoder.
        request_seconds (`float`): Seconds of one request to the demo page.
        request_words (`int`): Words of a text in one request to the demo page. Later words are left out.
        request_bytes (`int`): Bytes of one request to the demo page, without uploads.
        waiting_requests (`int`): Requests to the demo page that may wait. Further ones are refused.
        upload_bytes (`int`): Bytes of one upload to the demo page.
        all_uploads_bytes (`int`): Bytes of all uploads that the demo page keeps.
        upload_seconds (`int`): Seconds for which the demo page keeps an upload.
        served_bytes (`int`): Bytes of one request to `mm-transformers serve`.
        served_rows (`int`): Rows of one request to it.
        served_values (`int`):
            Values of the JSON of one such request. A request of `served_rows` rows of `table_columns` columns and
            `row_items` files has fewer.
        served_characters (`int`): Characters of one text, or of the cell of a column, in such a request.
        served_memory (`int`):
            Bytes in memory of the pictures, videos and sounds of one such request. Four times as many may wait.
        served_pixels (`int`): Pixels of all different pictures of one such request, as their files declare them.
        served_tokens (`int`): The largest `max_new_tokens` of such a request.
        served_beams (`int`): The largest `num_beams` of such a request.

    Example:

    ```python
    >>> Limits().image_pixels
    50000000
    ```
    """

    image_pixels: int = 50_000_000
    kept_image_pixels: int = 2048 * 2048
    image_aspect_ratio: int = 100
    image_scans: int = 100
    slow_image_pixels: int = 1_000_000
    row_items: int = 100
    row_pixels: int = 32 * 2048 * 2048
    batch_pixels: int = 32 * 2048 * 2048
    audio_seconds: float = 600.0
    audio_samples: int = 64_000_000
    encoded_seconds: float = 60.0
    lowest_sampling_rate: int = 1_000
    highest_sampling_rate: int = 768_000
    video_seconds: float = 3600.0
    video_frames: int = 100_000
    video_pixels: int = 4_000_000_000
    video_frame_pixels: int = 4096 * 4096
    kept_frames: int = 256
    kept_frame_pixels: int = 1920 * 1080
    file_bytes: int = 256 * 2**20
    text_characters: int = 1_000_000
    padded_tokens: int = 2**15
    download_bytes: int = 64 * 2**20
    download_seconds: float = 30.0
    table_columns: int = 1_000
    category_values: int = 10_000
    recipe_bytes: int = 2**20
    config_layers: int = 300
    request_seconds: float = 60.0
    request_words: int = 2_000
    request_bytes: int = 2 * 2**20
    waiting_requests: int = 16
    upload_bytes: int = 32 * 2**20
    all_uploads_bytes: int = 2**30
    upload_seconds: int = 3600
    served_bytes: int = 32 * 2**20
    served_rows: int = 256
    served_values: int = 500_000
    served_characters: int = 100_000
    served_memory: int = 256 * 2**20
    served_pixels: int = 1_000_000_000
    served_tokens: int = 1024
    served_beams: int = 8


_current = Limits()


def limits() -> Limits:
    """The limits of this process."""
    return _current


def set_limits(**changes: Any) -> Limits:
    """
    Changes limits of this process, and of the loader workers that it starts. No file can change them: neither a recipe
    nor a checkpoint. On the command line, `mm-transformers --limit image_pixels=2e8 ...` does the same.

    Args:
        changes: fields of [`Limits`].

    Returns:
        The limits from now on.

    Raises:
        ValueError: if there is no such limit, or a value is no number above 0.

    Example:

    ```python
    >>> set_limits(image_pixels=200_000_000).image_pixels
    200000000
    ```
    """
    global _current
    types = {field.name: field.type for field in dataclasses.fields(Limits)}
    for name, value in changes.items():
        if name not in types:
            raise ValueError(f"There is no limit {name!r}; the limits are {', '.join(types)}.")
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and value > 0 and math.isfinite(value)):
            raise ValueError(f"The limit {name} must be a number above 0, but is {value!r}.")
        changes[name] = types[name](value)
    _current = dataclasses.replace(_current, **changes)
    return _current


def named(name: str) -> str:
    """The name of a limit in messages, with the way to change it."""
    value = getattr(_current, name)
    return f"the limit {name}={value:,}; to change it, use set_limits({name}=...) or --limit {name}=..."


class CarriedLimits:
    """Hands the limits to loader workers, which Python may start anew: an attribute of what is pickled for them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _carried, (dataclasses.asdict(_current),)


def _carried(values: dict[str, Any]) -> CarriedLimits:
    # Python gives a new process its name before it hands anything over; only later does it say who the parent is.
    if multiprocessing.current_process().name != "MainProcess":
        set_limits(**values)
    return CarriedLimits()
