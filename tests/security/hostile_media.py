"""Files that strangers may send: small, but huge once they are read."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image


def png(width: int, height: int, depth: int = 8, kind: int = 0, real: bool = True) -> bytes:
    """
    A PNG of zeros.

    Args:
        depth, kind: bits per channel and type of colour, as the header has them.
        real: whether its data are there.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    row = bytes(1 + (width * bits + 7) // 8)
    packer, parts = zlib.compressobj(9), []
    for _ in range(height if real else 0):
        parts.append(packer.compress(row))
    data = b"".join([*parts, packer.flush()])
    palette = _chunk(b"PLTE", bytes(768)) if kind == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + palette + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def wav(rate: int = 16_000, channels: int = 1, seconds: float = 1.0, bits: int = 16, samples: bytes | None = None):
    """A WAV whose header says what it is told to say."""
    size = bits // 8 * channels
    data = bytes(int(rate * seconds) * size) if samples is None else samples
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * size) % 2**32, size % 2**16, bits)
    content = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(content)) + content


def flac(seconds: float, rate: int = 44_100, channels: int = 1) -> bytes:
    """Silence: about 7 kB per minute."""
    import soundfile

    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, channels, format="FLAC") as writer:
        block = np.zeros((rate, channels), "int16")
        for _ in range(int(seconds)):
            writer.write(block)
    return file.getvalue()


def many_scans(scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG, one scan of which is repeated."""
    content = picture_bytes(PIL.Image.new("L", size), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def overlapping_strips(strips: int, size: int = 64) -> bytes:
    """A TIFF of one bit per pixel, whose strips are half the picture each, and in the same place of the file."""
    tags = [(256, 4, 1, size), (257, 4, 1, size), (258, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, strips, 134), (277, 3, 1, 1), (278, 4, 1, size // 2),
            (279, 4, strips, 134 + 4 * strips)]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    head += bytes(134 - len(head))
    data = 134 + 8 * strips
    lengths = struct.pack("<I", size * size // 16) * strips
    return head + struct.pack("<I", data) * strips + lengths + bytes(size * size // 8)


def large_tile(side: int) -> bytes:
    """A TIFF of 64 x 64 pixels in one tile of many, whose data are cut short."""
    data = zlib.compress(bytes(9999))
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 200), (325, 4, 1, len(data))]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return head + bytes(200 - len(head)) + data


def icon_with_run_lengths() -> bytes:
    """An icon of 16 x 16 pixels, which holds a BMP of 6000 x 6000."""
    bmp = struct.pack("<IiiHHIIiiII", 40, 6000, 12000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024) + b"\xff\0" * 99
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 8, len(bmp), 22) + bmp


def gif(frames: int, size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    pictures = [PIL.Image.new("L", size, 255 * (i % 2)) for i in range(frames)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(out) (w) file\nshowpage\n"


def video(width: int, height: int, frames: int, path: Path, codec: str = "libx264") -> None:
    """A video of one colour."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(frames):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def picture_bytes(picture: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def model_and_processor():
    """A tiny model of texts, pictures and sounds, and its processor, in a process that measures its memory."""
    from tiny import make_feature_extractor, make_image_processor, make_model, make_tokenizer

    from mm_transformers import Classification, MMTransformerProcessor, set_limits

    set_limits(encoded_seconds=1)  # the tiny encoder makes thousands of tokens of a second
    model = make_model(audio="wav2vec2", tasks=[Classification("topic", labels=["animals", "food"])])
    return model, MMTransformerProcessor(make_image_processor(), make_tokenizer(), make_feature_extractor())
