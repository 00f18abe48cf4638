"""Images of all kinds become RGB, against Pillow and numpy; what is no image is told in one sentence."""

import http.server
import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from tiny import make_image

from mm_transformers.model.images import FORMATS, ImageError, image_key, load_image


PICTURE = make_image(seed=3, size=(5, 4))
PIXELS = np.asarray(PICTURE)
GREY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12


def to_bytes(picture, format="PNG", **kwargs):
    buffer = io.BytesIO()
    picture.save(buffer, format, **kwargs)
    return buffer.getvalue()


def pixels(image):
    loaded = load_image(image)
    assert isinstance(loaded, PIL.Image.Image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


AS = f" as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def message_of(image):
    """What is said of an image that cannot be used: one sentence."""
    with pytest.raises(ImageError) as error:
        load_image(image)
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert "\n" not in message
    assert 10 < len(message) < 250
    return message


def over_white(rgb, alpha):
    """Each channel c becomes c * alpha + 255 * (1 - alpha)."""
    alpha = np.asarray(alpha, dtype=float)[..., None] / 255
    return np.asarray(rgb, dtype=float) * alpha + 255 * (1 - alpha)


class TestSources:
    def test_path_string_bytes_and_dicts_are_the_same(self, tmp_path):
        path, content = tmp_path / "a b ü.png", to_bytes(PICTURE)
        path.write_bytes(content)
        sources = [
            PICTURE, path, str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)},
            {"path": str(path)}, {"bytes": content}, {"bytes": content, "path": "not/there.png"}, PIL.Image.open(path),
        ]  # fmt: skip
        for source in sources:
            assert np.array_equal(pixels(source), PIXELS)

    @pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
    def test_formats(self, format):
        content = to_bytes(PICTURE, format)
        expected = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(pixels(content), expected)

    def test_address(self):
        """Fetched from a server on this machine; a picture that is not there is not taken for a broken one."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path == "/a.png"
                self.send_response(200 if found else 404)
                self.end_headers()
                self.wfile.write(to_bytes(PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0))) if found else b"no such page")

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert (pixels(f"{address}/a.png") == 255).all()
            message = message_of(f"{address}/b.png")
            assert message.startswith(f"image '{address}/b.png' cannot be read (")
            assert "404" in message
        finally:
            server.shutdown()
            server.server_close()
        assert message_of(f"{address}/a.png").startswith(f"image '{address}/a.png' cannot be read (")

    def test_the_picture_that_was_given_stays_as_it_is(self):
        given = PIL.Image.fromarray(GREY)
        load_image(given)
        assert given.mode == "L"
        assert np.array_equal(np.asarray(given), GREY)


class TestModes:
    def test_grey(self):
        assert np.array_equal(pixels(PIL.Image.fromarray(GREY)), np.stack([GREY] * 3, -1))

    def test_one_bit(self):
        bits = GREY > 100
        assert np.array_equal(pixels(to_bytes(PIL.Image.fromarray(bits))), np.stack([bits * np.uint8(255)] * 3, -1))

    def test_palette(self):
        picture = PICTURE.quantize(16)
        assert np.array_equal(pixels(to_bytes(picture)), np.asarray(picture.convert("RGB")))

    def test_cmyk(self):
        ink = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
        picture = PIL.Image.fromarray(ink, "CMYK")
        assert np.array_equal(pixels(to_bytes(picture, "TIFF")), np.asarray(picture.convert("RGB")))
        expected = 255 - np.minimum(255, ink[..., :3].astype(int) + ink[..., 3:])
        assert np.abs(pixels(picture).astype(int) - expected).max() <= 64  # Pillow multiplies ink where this adds it

    @settings(max_examples=30)
    @given(rgba=st_numpy.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(4))))
    def test_transparent_is_laid_on_white(self, rgba):
        expected = over_white(rgba[..., :3], rgba[..., 3])
        for image in (PIL.Image.fromarray(rgba, "RGBA"), to_bytes(PIL.Image.fromarray(rgba, "RGBA")), rgba):
            assert np.abs(pixels(image) - expected).max() <= 1

    @settings(max_examples=15)
    @given(la=st_numpy.arrays(np.uint8, (3, 2, 2)))
    def test_grey_and_alpha(self, la):
        expected = over_white(np.repeat(la[..., :1], 3, -1), la[..., 1])
        assert np.abs(pixels(to_bytes(PIL.Image.fromarray(la, "LA"))) - expected).max() <= 1

    def test_palette_with_a_transparent_colour(self):
        picture = PIL.Image.new("P", (3, 1))
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        picture.putdata([0, 1, 2])
        for content in (to_bytes(picture, transparency=1), to_bytes(picture, "GIF", transparency=1)):
            assert pixels(content).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]

    def test_palette_with_degrees_of_transparency(self):
        picture = PIL.Image.new("P", (3, 1))
        picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        picture.putdata([0, 1, 2])
        expected = over_white([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], [[255, 128, 0]])
        assert np.abs(pixels(to_bytes(picture, transparency=bytes([255, 128, 0]))) - expected).max() <= 1

    def test_rgb_and_grey_with_a_transparent_colour(self):
        picture = PIL.Image.new("RGB", (2, 1), (0, 0, 9))
        picture.putpixel((1, 0), (0, 0, 8))
        assert pixels(to_bytes(picture, transparency=(0, 0, 9))).tolist() == [[[255] * 3, [0, 0, 8]]]
        picture = PIL.Image.new("L", (2, 1), 9)
        picture.putpixel((1, 0), 8)
        assert pixels(to_bytes(picture, transparency=9)).tolist() == [[[255] * 3, [8] * 3]]

    @pytest.mark.parametrize("format", ["PNG", "TIFF", None])
    def test_sixteen_bits_are_scaled_and_not_clipped(self, format):
        values = np.array([[0, 256, 257, 32768, 65535]], dtype=np.uint16)
        picture = PIL.Image.fromarray(values)
        assert picture.mode.startswith("I;16")
        loaded = pixels(picture if format is None else to_bytes(picture, format))
        assert loaded[0, :, 0].tolist() == [0, 0, 1, 127, 255]
        assert (loaded == loaded[..., :1]).all()

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
    def test_sixteen_bits_in_any_order_of_bytes(self, mode):
        picture = PIL.Image.new(mode, (2, 1), 0xABAB)
        assert (pixels(picture) == 0xAB).all()

    @pytest.mark.parametrize(("values", "expected"), [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
    ])  # fmt: skip
    def test_floats(self, values, expected):
        picture = PIL.Image.fromarray(np.array([values], dtype=np.float32))
        assert picture.mode == "F"
        for image in (picture, to_bytes(picture, "TIFF")):
            assert pixels(image)[0, :, 0].tolist() == expected

    def test_floats_that_are_no_numbers(self):
        picture = PIL.Image.fromarray(np.array([[np.nan, 0.5]], dtype=np.float32))
        assert message_of(picture) == "an image of floats must not hold NaN or infinity"

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "PA", "RGBa", "RGBX"])
    def test_other_modes(self, mode):
        assert pixels(PIL.Image.new(mode, (3, 2))).shape == (2, 3, 3)

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_of_animations_the_first_frame_is_taken(self, format):
        frames = [PIL.Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if format == "WEBP" else {}
        content = to_bytes(frames[0], format, save_all=True, append_images=frames[1:], **options)
        opened = PIL.Image.open(io.BytesIO(content))
        assert opened.n_frames == 3
        assert (pixels(content) == (255, 0, 0)).all()
        opened.seek(2)
        assert (pixels(opened) == (255, 0, 0)).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, orientation):
        """The table of the EXIF standard: where the 0th row and the 0th column of the stored picture are to be."""
        turned = {
            1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
            6: PIXELS[::-1].transpose(1, 0, 2), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
            8: PIXELS[:, ::-1].transpose(1, 0, 2),
        }[orientation]  # fmt: skip
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(pixels(to_bytes(PICTURE, exif=exif)), turned)

    @pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage", b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"])
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_broken_exif_data_do_not_matter(self, exif):
        assert np.array_equal(pixels(to_bytes(PICTURE, exif=exif)), PIXELS)


class TestArrays:
    @settings(max_examples=40)
    @given(data=st.data(), height=st.integers(5, 9), width=st.integers(5, 9), channels=st.sampled_from([None, 1, 3]))
    def test_any_layout(self, data, height, width, channels):
        """Height and width are at least 5 here: where they are 1, 3 or 4, channels last is assumed."""
        shape = (height, width) if channels is None else (height, width, channels)
        array = data.draw(st_numpy.arrays(np.uint8, shape))
        last = array[..., None] if channels is None else array
        expected = np.repeat(last, 3, -1) if last.shape[-1] == 1 else last
        layouts = [array, torch.from_numpy(array.copy())]
        if channels is not None:
            layouts += [array.transpose(2, 0, 1), torch.from_numpy(array.transpose(2, 0, 1).copy())]
        for layout in layouts:
            assert np.array_equal(pixels(layout), expected)
        as_floats = [array / 255, (array / 255).astype(np.float32), torch.from_numpy(array / 255)]
        as_integers = [array.astype(np.uint16) * 257, array.astype(np.int64)]
        is_bright = array.max() == 0 or array.max() > 15  # otherwise, white may be another number
        for layout in [*as_floats, *(as_integers if is_bright else [])]:
            assert np.array_equal(pixels(layout), expected)

    def test_small_pictures_are_channels_last(self):
        array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
        assert np.array_equal(pixels(array), array)

    def test_truth_values(self):
        mask = GREY > 100
        assert np.array_equal(pixels(mask)[..., 0], mask * 255)
        assert np.array_equal(pixels(torch.from_numpy(mask))[..., 0], mask * 255)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_tensors(self, dtype):
        tensor = (torch.arange(256, dtype=torch.float64) / 255).reshape(16, 16).to(dtype)
        assert pixels(tensor)[..., 0].flatten().tolist() == list(range(256))

    def test_floats_are_rounded(self):
        assert pixels(np.array([[0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0]]))[0, :, 0].tolist() == [
            0, 0, 1, 255, 255,
        ]  # fmt: skip

    @pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), (5, 5, 5), (5, 6, 7), ()])
    def test_wrong_shapes(self, shape):
        for array in (np.zeros(shape), torch.zeros(shape)):
            assert message_of(array) == (
                f"the image array has the shape {shape}, not (height, width[, channels]) or (channels, height, width)"
            )

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 3), (3, 0, 5), (0, 0, 3)])
    def test_no_pixels(self, shape):
        assert message_of(np.zeros(shape, np.uint8)) == f"the image array has no pixels (its shape is {shape})"

    @pytest.mark.parametrize("value", [-0.1, 1.5, 255.0, np.nan, np.inf])
    def test_floats_out_of_range(self, value):
        array = np.full((4, 5), 0.5)
        array[1, 2] = value
        for image in (array, torch.from_numpy(array)):
            assert message_of(image) == (
                "an image array of floats must lie between 0 and 1; divide it by 255, or convert it to uint8"
            )

    @pytest.mark.parametrize("value", [-1, 256])
    def test_integers_out_of_range(self, value):
        assert message_of(np.full((4, 5), value)) == "an image array of int64 must lie between 0 and 255"

    @pytest.mark.parametrize("dtype", ["complex128", "object", "<U1", "datetime64[s]"])
    def test_arrays_of_something_else(self, dtype):
        assert message_of(np.zeros((4, 5), dtype)) == (
            f"an image array must hold integers, floats or truth values, but is of {dtype}"
        )

    def test_tensor_that_numpy_does_not_take(self):
        assert message_of(torch.zeros(4, 5, requires_grad=True)).startswith("the image (a Tensor) cannot be read (")


def png_header(width, height):
    """A PNG that claims a size, without pixels."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return chunks


class TestErrors:
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_cut_short(self, format, tmp_path):
        content = to_bytes(make_image(size=(80, 80)), format)
        path = tmp_path / "cut"
        path.write_bytes(content[: len(content) // 2])
        assert message_of(path).startswith((f"image '{path}' cannot be read (", f"image '{path}' is not an image that"))
        assert message_of(path.read_bytes()).startswith("the image (")
        opened = path.read_bytes()
        try:
            opened = PIL.Image.open(io.BytesIO(opened))
        except OSError:
            return
        # Not even at the second time, when Pillow holds half of it.
        assert message_of(opened) == message_of(opened)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "GIF"]))
    def test_damaged_files_give_a_picture_or_the_error(self, data, format):
        content = bytearray(to_bytes(PICTURE, format))
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            loaded = load_image(content)
        except ImageError:
            message_of(content)
        else:
            assert loaded.mode == "RGB"

    def test_empty_file(self, tmp_path):
        path = tmp_path / "empty.png"
        path.touch()
        assert message_of(path) == f"image '{path}' is not an image that Pillow can read{AS}"
        assert message_of(b"") == f"the image (0 bytes) is not an image that Pillow can read{AS}"
        assert (
            message_of({"bytes": b"", "path": None}) == f"the image (0 bytes) is not an image that Pillow can read{AS}"
        )
        assert message_of({"bytes": b"", "path": "a.png"}) == f"image 'a.png' is not an image that Pillow can read{AS}"

    def test_missing_file(self, tmp_path):
        path = str(tmp_path / "nowhere.jpg")
        for image in (path, Path(path), {"path": path}):
            assert message_of(image) == f"image '{path}' does not exist"
        assert message_of("") == "image '' does not exist"
        assert message_of("two\nlines.png") == r"image 'two\nlines.png' does not exist in the current folder"

    def test_text_file(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("no picture")
        assert message_of(path) == f"image '{path}' is not an image that Pillow can read{AS}"
        assert message_of(b"no picture") == f"the image (10 bytes) is not an image that Pillow can read{AS}"

    def test_folder(self, tmp_path):
        message = message_of(tmp_path)
        assert message.startswith(f"image '{tmp_path}' cannot be read (")

    @pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_000, 10_000), (65_535, 65_535)])
    def test_decompression_bomb(self, width, height):
        """Refused from twice the limit on, where Pillow raises, and already from the limit on, where it only warns."""
        assert message_of(png_header(width, height)).endswith(
            "has more than the 89,478,485 pixels that are allowed (PIL.Image.MAX_IMAGE_PIXELS)"
        )

    def test_the_limit_can_be_moved(self, monkeypatch):
        content = to_bytes(PICTURE)
        for limit in (None, 20):
            monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
            assert np.array_equal(pixels(content), PIXELS)
        for limit in (19, 5):
            monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
            assert f"more than the {limit} pixels that are allowed" in message_of(content)

    def test_no_pixels(self):
        assert message_of(PIL.Image.new("RGB", (0, 5))) == "the image (a Image) has no pixels (its size is 0 x 5)"
        assert message_of(png_header(0, 5)).startswith("the image (57 bytes) ")

    @pytest.mark.parametrize(
        "image", [None, 3, 0.5, True, ["a.png"], {}, {"bytes": None, "path": None}, bytearray(3), object]
    )
    def test_wrong_type(self, image):
        wanted = (
            "an image must be a PIL image, a path, bytes, an array or a dict with 'bytes' or 'path', but is of type "
        )
        assert message_of(image).startswith(wanted)

    def test_closed_picture(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(to_bytes(PICTURE))
        picture = PIL.Image.open(path)
        picture.close()
        assert message_of(picture).startswith("the image (a PngImageFile) cannot be read (")


class TestKeys:
    def test_same_path(self):
        key = image_key("a/b.png")
        assert key == image_key(Path("a/b.png")) == image_key({"path": "a/b.png", "bytes": None})
        assert key != image_key("a/c.png")

    @given(first=st.binary(max_size=8), second=st.binary(max_size=8))
    def test_same_bytes(self, first, second):
        assert (image_key(first) == image_key(second)) == (first == second)
        assert image_key(bytes(bytearray(first))) == image_key({"bytes": first, "path": "any name"})

    def test_same_object(self):
        array, tensor = np.zeros((4, 4)), torch.zeros(4, 4)
        images = [make_image(0), make_image(0), array, array.copy(), tensor, tensor.clone()]
        keys = [image_key(image) for image in images]
        assert len(set(keys)) == len(images)
        assert keys == [image_key(image) for image in images]

    def test_a_path_is_never_taken_for_bytes(self):
        assert image_key("a.png") != image_key(b"a.png")

    def test_a_dict_goes_by_what_it_holds(self):
        content = to_bytes(PICTURE)
        assert image_key({"bytes": content, "path": "a.png"}) == image_key({"bytes": content, "path": "b.png"})
        assert image_key({"bytes": b"1", "path": "a.png"}) != image_key({"bytes": b"2", "path": "a.png"})


def test_an_answer_cut_short_is_an_error_of_the_network():
    """Half a file, and an address that is none: told as what could not be fetched, not as a failure of this program."""
    from mm_transformers.model.downloads import fetch

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(OSError, match="IncompleteRead"):
            fetch(f"http://127.0.0.1:{server.server_port}/x")
        server.shutdown()
    for address in ("http://[bad", "http://127.0.0.1:1/a b"):
        with pytest.raises(OSError):  # noqa: PT011
            fetch(address)
