"""Turns whatever a table holds in its video column into a few frames."""

import io
import os
from collections.abc import Hashable
from typing import Any, Optional

from .files import cast_of, content_key, content_of, describe, fetch, is_url, not_there
from .images import ImageError, load_image
from .task_base import shorten


class VideoError(ValueError):
    """A video that cannot be used; the message says which and why, in one sentence."""


def video_key(video: Any) -> Hashable:
    """Equal for two cells that surely hold the same video: the same object, path or bytes."""
    return content_key(video, content_of(video))


def load_frames(video: Any, num_frames: int) -> list[Any]:
    """
    At most `num_frames` RGB `PIL.Image.Image`s: those in the middle of equally long parts of the video, in order.

    Args:
        video: a path, `file://` or http(s) address; the bytes of a video file, also as base64 or `data:` address; a
            dict with "bytes" or "path" (what `datasets.Video(decode=False)` gives), and perhaps `"cast":
            {"stream_index": 1}` for the stream of that feature; or the frames themselves: a list of images of any kind
            that [`load_image`] takes, an array (frames, height, width, channels), or a decoder as `datasets.Video`
            gives it.
        num_frames (`int`): How many frames to take; all of a video that has fewer.

    Raises:
        VideoError: if there is no such file, it is no video that can be read, or it has no frames.
        ImportError: if the extra `video` is needed and not installed.
    """
    name, content = describe(video, "video"), content_of(video)
    if isinstance(content, (str, bytes, os.PathLike)):
        return _read(content, name, num_frames, cast_of(video).get("stream_index"))
    if not (hasattr(content, "__len__") and hasattr(content, "__getitem__")):
        raise VideoError(
            "a video must be a path, bytes, a list of frames or a dict with 'bytes' or 'path', but is of type "
            f"{type(content).__name__}"
        )
    if len(content) == 0:
        raise VideoError(f"{name} has no frames")
    frames = []
    for number in sample_evenly(len(content), num_frames):
        try:
            frames.append(load_image(content[number]))
        except ImageError as error:
            raise VideoError(f"frame {number:,} of {name} cannot be used: {error}") from error
    return frames


def sample_evenly(total: int, wanted: int) -> list[int]:
    """The numbers of the frames in the middle of `wanted` equally long parts; all if there are not as many."""
    return list(range(total)) if total <= wanted else [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def _read(content: Any, name: str, num_frames: int, stream_index: Optional[int] = None) -> list[Any]:
    # Not by `transformers.video_utils.load_video`: it fails where the container does not say how many frames it has
    # (WebM, Matroska), and where there are fewer than wanted.
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading videos needs a package more: pip install mm-transformers[video]") from error
    if is_url(content):
        try:
            content = fetch(content)
        except OSError as error:
            raise VideoError(f"{name} cannot be fetched ({error})") from error
    if not isinstance(content, bytes) and not os.path.exists(content):
        raise VideoError(not_there(content, "video"))
    try:
        with av.open(io.BytesIO(content) if isinstance(content, bytes) else os.fspath(content)) as container:
            if not container.streams.video:
                raise VideoError(f"{name} has no pictures, only other streams")
            stream: Any = container.streams.video[0] if stream_index is None else container.streams[stream_index]
            if stream.type != "video":
                raise VideoError(f"stream {stream_index} of {name} has no pictures")
            total = stream.frames or len([1 for _ in container.decode(stream)])
            container.seek(0)
            wanted = set(sample_evenly(total, num_frames))
            frames = []
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    frames.append(frame.to_image())
                if len(frames) == len(wanted):
                    break
    except VideoError:
        raise
    except Exception as error:  # av's own errors derive from many: OSError, ValueError, EOFError, ...
        raise VideoError(f"{name} cannot be read ({shorten(' '.join(str(error).split()))})") from error
    if not frames:
        raise VideoError(f"{name} has no frames")
    return frames
