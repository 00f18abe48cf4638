"""Converts the cells of a video column into a few frames."""

import io
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Optional

from .downloads import fetch, is_url
from .file_contents import UnreadableFile, cast_of, check_file, content_key, content_of, describe, not_there
from .images import ImageError, load_image, pixels_for_each
from .label_cells import shorten
from .limits import limits, named


# The allowed containers, by FFmpeg's names. Others, such as playlists, name further files to open.
CONTAINERS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "ogg",
    "flv", "asf", "gif", "h264", "hevc", "obu", "ivf", "mxf", "nut", "apng", "yuv4mpegpipe", "wav", "mp3", "flac",
)  # fmt: skip
# Decoders of JPEG pictures with other names, by FFmpeg's names.
_OTHER_JPEG = {"amv", "avrn", "mxpeg", "sp5x", "tdsc", "thp"}


class VideoError(ValueError):
    """A video that cannot be used; the message names it and the reason, in one sentence."""


def video_key(video: Any) -> Hashable:
    """Equal for two cells with the same video for certain: the same object, path or bytes."""
    return content_key(video, content_of(video))


def load_frames(video: Any, num_frames: int, fetch: Callable[[str], bytes] = fetch) -> list[Any]:
    """
    At most `num_frames` RGB `PIL.Image.Image`s: the middle frames of equally long parts of the video, in order.

    Frames of more than `kept_frame_pixels` of the [`Limits`] are shrunk to that size.

    Args:
        video: a path, `file://` or http(s) address; the bytes of a video file, also as base64 or `data:` address; a
            dict with "bytes" or "path" (as from `datasets.Video(decode=False)`), and perhaps
            `"cast": {"stream_index": 1}` for the stream of that feature; or the frames themselves: a list of images for
            [`load_image`], an array (frames, height, width, channels), or a decoder of `datasets.Video`.
        num_frames (`int`): The number of frames; a video with fewer gives all.
        fetch: turns an http(s) address into bytes, or raises `OSError` or `ValueError`.

    Raises:
        VideoError: if there is no such file, it is no readable video, it has no frames, or it exceeds one of the
            [`Limits`].
        ImportError: if the extra `video` is needed and not installed.
    """
    name, content = describe(video, "video"), content_of(video)
    if isinstance(content, (str, bytes, os.PathLike)):
        return _read(content, name, num_frames, fetch, cast_of(video).get("stream_index"))
    has_items = (
        hasattr(content, "__len__") and hasattr(content, "__getitem__") and getattr(content, "shape", None) != ()
    )
    if isinstance(content, Mapping) or not has_items:
        raise VideoError(
            "a video must be a path, bytes, a list of frames or a dict with 'bytes' or 'path', but is of type "
            f"{type(content).__name__}"
        )
    if len(content) == 0:
        raise VideoError(f"{name} has no frames")
    _check_frames(len(content), num_frames, name)
    frames = []
    numbers = sample_evenly(len(content), num_frames)
    most_pixels = pixels_for_each([content[number] for number in numbers])
    for number in numbers:
        try:
            frames.append(load_image(content[number], fetch, most_pixels))
        except ImageError as error:
            raise VideoError(f"frame {number:,} of {name} cannot be used: {error}") from error
    return frames


def sample_evenly(total: int, wanted: int) -> list[int]:
    """The numbers of the frames in the middle of `wanted` equally long parts; all if there are not as many."""
    return list(range(total)) if total <= wanted else [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def _check_frames(total: int, wanted: int, name: str) -> None:
    if total > limits().video_frames:
        raise VideoError(f"{name} has {total:,} frames, more than {named('video_frames')}")
    if min(total, wanted) > limits().kept_frames:
        raise VideoError(f"{name}: {min(total, wanted):,} frames are requested, more than {named('kept_frames')}")


def _read(
    content: Any, name: str, num_frames: int, fetch: Callable[[str], bytes], stream_index: Optional[int] = None
) -> list[Any]:
    # Not by `transformers.video_utils.load_video`: it fails where the container does not say how many frames it has
    # (WebM, Matroska), and where there are fewer than wanted.
    try:
        import av
    except ImportError as error:
        raise ImportError("Reading videos needs `av`: pip install mm-transformers[video]") from error
    if is_url(content):
        try:
            content = fetch(content)
        except (OSError, ValueError) as error:
            raise VideoError(f"{name} cannot be fetched ({error})") from error
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        check_file(content)
        source: Any = io.BytesIO(content) if isinstance(content, bytes) else os.fspath(content)
        with av.open(source, options=options) as container:
            if not container.streams.video:
                raise VideoError(f"{name} has no pictures, only other streams")
            stream: Any = container.streams.video[0] if stream_index is None else container.streams[stream_index]
            if stream.type != "video":
                raise VideoError(f"stream {stream_index} of {name} has no pictures")
            _check_header(container, stream, name)
            # The decoder itself refuses frames that grow in the middle of the stream.
            stream.codec_context.options = {"max_pixels": str(limits().video_frame_pixels)}
            total = stream.frames if stream.frames > 0 else _count(container, stream, name)
            frames, reached = _take(container, stream, total, num_frames, name)
            if reached < total and len(frames) < min(total, num_frames):
                frames, _ = _take(container, stream, reached, num_frames, name)  # there are fewer than in the header
    except FileNotFoundError:
        raise VideoError(not_there(content, "video")) from None
    except UnreadableFile as error:
        raise VideoError(f"{name} cannot be read ({error})") from error
    except VideoError:
        raise
    except Exception as error:  # av's own errors derive from many: OSError, ValueError, EOFError, ...
        raise VideoError(f"{name} cannot be read ({shorten(' '.join(str(error).split()))})") from error
    if not frames:
        raise VideoError(f"{name} has no frames")
    return frames


def _check_header(container: Any, stream: Any, name: str) -> None:
    seconds = (container.duration or 0) / 1e6
    if seconds > limits().video_seconds:
        raise VideoError(f"{name} lasts {seconds:,.0f} s, longer than {named('video_seconds')}")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits().video_frame_pixels:
        raise VideoError(f"{name} has frames of {width:,} x {height:,} pixels, more than {named('video_frame_pixels')}")
    if stream.frames * width * height > limits().video_pixels:
        raise VideoError(
            f"{name} has {stream.frames:,} frames of {width:,} x {height:,} pixels, in total more than "
            f"{named('video_pixels')}"
        )


def _decoded(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """The frames, as long as their pixels are within the limit. Frames that are not shown are decoded, too."""
    in_packets = in_frames = 0
    context = stream.codec_context
    for packet in container.demux(stream):
        if "jpeg" in context.name or context.name in _OTHER_JPEG:
            num_scans = bytes(packet).count(b"\xff\xda")
            if num_scans > limits().image_scans:
                raise VideoError(f"a frame of {name} has {num_scans:,} scans, more than {named('image_scans')}")
        frames = packet.decode()
        in_packets += context.width * context.height if packet.size else 0
        in_frames += sum(frame.width * frame.height for frame in frames)
        if max(in_packets, in_frames) > limits().video_pixels:
            raise VideoError(f"the frames of {name} have in total more pixels than {named('video_pixels')}")
        yield from frames


def _count(container: Any, stream: Any, name: str) -> int:
    """The number of frames of a file without this number in its header."""
    total = 0
    for _ in _decoded(container, stream, name):
        total += 1
        _check_frames(total, 0, name)
    return total


def _take(container: Any, stream: Any, total: int, num_frames: int, name: str) -> tuple[list[Any], int]:
    """The wanted frames of this total, and the number of decoded frames."""
    _check_frames(total, num_frames, name)
    container.seek(0)
    wanted = set(sample_evenly(total, num_frames))
    frames: list[Any] = []
    number = -1
    for number, frame in enumerate(_decoded(container, stream, name)):
        if number in wanted:
            frames.append(_picture(frame, min(limits().kept_frame_pixels, limits().row_pixels // len(wanted))))
        if len(frames) == len(wanted):
            break
    return frames, number + 1


def _picture(frame: Any, most_pixels: int) -> Any:
    share = min(1.0, (most_pixels / (frame.width * frame.height)) ** 0.5)
    size = (
        {} if share == 1 else {"width": max(1, int(frame.width * share)), "height": max(1, int(frame.height * share))}
    )
    picture = frame.to_image(**size)
    # Turned as in players: phones turn the display, not the pixels.
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return picture.rotate(90 * turns, expand=True) if turns else picture
