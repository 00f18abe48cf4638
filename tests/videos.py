"""Tiny videos, encoded."""

import io

import av
from PIL import Image


def make_frames(number: int, size: int = 32) -> list[Image.Image]:
    """Ever brighter."""
    return [Image.new("RGB", (size, size), (round(255 * i / max(number - 1, 1)),) * 3) for i in range(number)]


def encode(frames: list[Image.Image], container="mp4", codec="mpeg4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_image(frame)))
        output.mux(stream.encode())
    return file.getvalue()
