"""Pictures, sounds, videos and texts of strangers: bounded in memory and time, and nothing else is opened or run."""

import io
import os
import struct
import subprocess
from fractions import Fraction

import numpy as np
import PIL.GifImagePlugin
import PIL.Image
import pytest
import torch
from child_process import run_child
from hostile_media import (
    eps,
    flac,
    gif,
    icon_with_run_lengths,
    large_tile,
    many_scans,
    overlapping_strips,
    picture_bytes,
    png,
    video,
    wav,
)
from tiny import make_config, make_processor

from mm_transformers import Limits, MMDataCollator, Retrieval
from mm_transformers.data.splitting import hold_out_rows
from mm_transformers.model.audio import AudioError, load_audio
from mm_transformers.model.images import ImageError, load_image
from mm_transformers.model.video import VideoError, load_frames


RATE = 16_000


@pytest.fixture
def set_limits(monkeypatch):
    def change(**values):
        monkeypatch.setattr("mm_transformers.model.limits._current", Limits(**values))

    return change


def picture(width=90, height=60, seed=0, channels=3):
    """Smooth, so that shrinking it in one way or another makes little difference."""
    values = np.random.default_rng(seed).uniform(0, 255, (4, 6, channels)).astype(np.uint8)
    made = PIL.Image.fromarray(values[..., 0] if channels == 1 else values)
    return made.resize((width, height), PIL.Image.Resampling.BICUBIC)


class TestPictures:
    def test_ghostscript_is_not_started(self, monkeypatch, tmp_path):
        """Nor any other program: only listed formats are opened."""
        monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
        path = tmp_path / "a.png"
        path.write_bytes(eps())
        for source in (path, eps()):
            with pytest.raises(ImageError, match="is not an image that Pillow can read as PNG, JPEG"):
                load_image(source)

    @pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (101, 1)])
    def test_thin_pictures_are_refused(self, size):
        """Resized to a shortest side of 224 pixels, they would be huge."""
        for source in (png(*size), PIL.Image.new("L", size), np.zeros(size, np.uint8)):
            with pytest.raises(
                ImageError, match="so the ratio of its sides is more than the limit image_aspect_ratio=100"
            ):
                load_image(source)
        assert load_image(png(100, 1)).size == (100, 1)

    def test_declared_pixels_are_bounded_before_anything_is_decoded(self):
        """The data are not there: what looked at them would say that the file is cut short."""
        message = "has 8,000 x 8,000 pixels, more than the limit image_pixels=50,000,000; to change it, use set_limits"
        with pytest.raises(ImageError, match=message):
            load_image(png(8000, 8000, real=False))
        with pytest.raises(ImageError, match=message):
            load_image(np.broadcast_to(np.uint8(0), (8000, 8000)))
        with pytest.raises(ImageError, match="more than 4 for each pixel of the limit image_pixels"):
            load_image(np.broadcast_to(np.float64(0), (50_000, 50_000, 3)))
        with pytest.raises(ImageError, match="cannot be read"):  # it is not the size that is wrong
            load_image(png(4000, 4000, real=False))

    @pytest.mark.parametrize(
        "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]
    )
    def test_large_pictures_are_shrunk_and_look_the_same(self, mode, set_limits):
        if mode in ("I;16", "I", "F"):
            grey = np.asarray(picture(channels=1))
            values = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32), "F": grey / np.float32(255)}
            made = PIL.Image.fromarray(values[mode])
        elif mode == "PA":
            made = picture(channels=4).convert("RGBA").quantize(32).convert("PA")
        else:
            made = picture(channels=4).convert("RGB" if mode not in ("LA", "RGBA") else "RGBA").convert(mode)
        whole = load_image(made)
        assert whole.size == (90, 60)
        set_limits(kept_image_pixels=900)
        small = load_image(made)
        assert small.mode == "RGB"
        assert 700 < small.width * small.height <= 900
        assert small.width / small.height == pytest.approx(1.5, abs=0.1)
        expected = np.asarray(whole.resize(small.size, PIL.Image.Resampling.BOX), int)
        assert np.abs(np.asarray(small, int) - expected).mean() < (40 if mode == "1" else 8)

    def test_pictures_that_are_kept_are_the_same_bit_for_bit(self, set_limits):
        contents = [picture_bytes(picture(), "JPEG"), picture_bytes(picture()), gif(3, (90, 60))]
        set_limits(kept_image_pixels=90 * 60)
        for content in contents:
            expected = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
            assert np.array_equal(np.asarray(load_image(content)), expected)

    def test_a_shrunk_picture_is_turned_and_keeps_its_transparent_parts(self, set_limits):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        turned = picture_bytes(picture(), "JPEG", exif=exif)
        clear = picture(channels=4)
        clear.putalpha(PIL.Image.new("L", clear.size, 0))
        grey = picture_bytes(picture(channels=1), transparency=7)
        whole = load_image(turned), load_image(grey)
        set_limits(kept_image_pixels=600)
        small = load_image(turned)
        assert small.height > small.width
        difference = np.asarray(small, int) - np.asarray(whole[0].resize(small.size, PIL.Image.Resampling.BOX), int)
        assert np.abs(difference).mean() < 12
        assert (np.asarray(load_image(clear)) == 255).all()
        assert load_image(grey).size < whole[1].size

    def test_a_picture_as_it_was_read_is_not_copied_again(self):
        read = load_image(picture_bytes(picture()))
        assert load_image(read) is read

    def test_what_is_no_file_is_not_opened(self, tmp_path):
        """A pipe would never end, and nor would a device."""
        pipe = tmp_path / "pipe.png"
        os.mkfifo(pipe)
        for path in (pipe, "/dev/zero"):
            for read, error in ((load_image, ImageError), (lambda x: load_audio(x, RATE), AudioError),
                                (lambda x: load_frames(x, 2), VideoError)):  # fmt: skip
                with pytest.raises(error, match="it is a device or a pipe, not a file"):
                    read(str(path))
        rows = [{"text": f"a{i}", "image": path} for i in range(4) for path in ("/dev/zero", "/dev/null", str(pipe))]
        hold_out_rows(rows, 0.3)

    def test_large_files_are_refused(self, tmp_path, set_limits):
        path = tmp_path / "a.png"
        with open(path, "wb") as file:
            file.truncate(2**40)  # a hole
        with pytest.raises(ImageError, match=r"has 1,099,511,627,776 bytes, more than the limit file_bytes="):
            load_image(path)
        hold_out_rows(
            [{"text": f"a{i}", "image": str(path)} for i in range(4)] + [{"text": "b", "image": None}] * 9, 0.5
        )
        set_limits(file_bytes=10)
        for read, error in ((load_image, ImageError), (lambda x: load_audio(x, RATE), AudioError)):
            with pytest.raises(error, match="has 11 bytes, more than the limit file_bytes=10"):
                read(b"12345678901")

    def test_only_the_first_frame_is_looked_at(self, monkeypatch):
        """An animation may have thousands."""
        content = gif(3)
        monkeypatch.setattr(PIL.GifImagePlugin.GifImageFile, "n_frames", property(lambda _: pytest.fail("all")))
        assert load_image(content).size == (64, 64)
        second = PIL.Image.open(io.BytesIO(content))
        second.seek(1)
        assert np.array_equal(np.asarray(load_image(second)), np.asarray(load_image(content)))

    def test_a_picture_is_not_coded_many_times(self, set_limits):
        """Each scan, and each strip, is decoded: a file of 1 MB would take minutes."""
        for content, what in ((many_scans(300), r"30\d scans"), (overlapping_strips(300), "150 layers")):
            with pytest.raises(ImageError, match=f"it has {what}, more than the limit image_scans=100; to change it"):
                load_image(content)
        assert load_image(many_scans(50)).size == load_image(overlapping_strips(100)).size == (64, 64)
        with pytest.raises(
            ImageError, match="it has tiles of 20,000 x 20,000 pixels, more than the limit image_pixels"
        ):
            load_image(large_tile(20_000))
        assert load_image(large_tile(64)).size == (64, 64)
        # What looks like scans in other places is none: thumbnails, and videos after the end.
        plain = picture_bytes(picture(), "JPEG", quality=95, progressive=True, comment=b"\xff\xda" * 200)
        assert load_image(plain + b"\xff\xda" * 200).size == (90, 60)
        # Nor are scans hidden: by a marker that decoders skip, or by an end within a segment.
        scans = many_scans(300)
        for hidden in (b"\xff\xfe\0\4\xff\xd9", b"\xff\x01\xff\xff", b"\xff\xd0\xff\xff"):
            place = scans.rindex(b"\xff\xda", 0, 600)
            with pytest.raises(ImageError, match="more than the limit image_scans"):
                load_image(scans[:place] + hidden + scans[place:])

    def test_slow_formats_are_bounded(self, set_limits, tmp_path):
        """Their decoders are written in Python."""
        rows = [b"qoif" + struct.pack(">II", 1200, 900) + b"\3\0", b"P1 1200 900 ", b"P2 1200 900 255 ",
                b"P3 1200 900 255 ", b"P5 1200 900 254 ", b"P6 1200 900 254 ",
                b"P2 9 9 255 " + b" " * 19_000_000]  # fmt: skip
        run_lengths = struct.pack("<IiiHHIIiiII", 40, 1200, 900, 1, 8, 1, 0, 0, 0, 256, 0)
        rows.append(b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + run_lengths + bytes(1024) + b"\0\0" * 99)
        for content in rows:
            with pytest.raises(ImageError, match="slow to decode, more than the limit slow_image_pixels=1,000,000"):
                load_image(content)
        with pytest.raises(ImageError, match="an icon with run-length encoding"):
            load_image(icon_with_run_lengths())
        for content in (b"P3 3 1 255 " + b"7 " * 9, b"P6 1200 900 255\n" + bytes(3 * 1200 * 900),
                        picture_bytes(picture(), "BMP"), picture_bytes(picture(), "ICO")):  # fmt: skip
            load_image(content)

    def test_pictures_of_a_row_are_few(self):
        collator = MMDataCollator(make_processor(), make_config())
        rows = [{"text": "a", "image": [picture(seed=i) for i in range(101)]}]
        with pytest.raises(ValueError, match="column 'image': there are 101 items, more than the limit row_items=100"):
            collator(rows)
        with pytest.raises(ValueError, match="there are 101 images, more than the limit row_items=100"):
            make_processor()(text=["a"], images=[rows[0]["image"]])
        drop = MMDataCollator(make_processor(), make_config(), on_bad_file="drop")
        assert drop([*rows, {"text": "b"}])["image_index"].tolist() == [[-1], [-1]]
        assert drop.num_bad_files == 1

    def test_pixels_of_a_row_are_bounded(self, set_limits):
        """All ways to read a row; rows within the limit stay as they are, bit for bit."""
        big, small = picture_bytes(picture(90, 60), "JPEG"), picture(30, 20)
        rows = [{"text": "a", "image": [big] * 3 + [small]}, {"text": "b", "image": [big] * 2}]
        whole = np.asarray(load_image(big))
        set_limits(row_pixels=2 * 90 * 60 + 600, kept_image_pixels=90 * 60)
        read, _ = MMDataCollator(make_processor(), make_config()).media["images"].read(rows, ["0", "1"])
        assert sum(one.width * one.height for one in read[0]) <= 2 * 90 * 60 + 600
        assert [one.size for one in read[0]] == [(65, 43)] * 3 + [(30, 20)]
        assert all(np.array_equal(np.asarray(one), whole) for one in read[1])
        assert read[1][0] is read[1][1]
        # The processor, given the files, reads them in the same way.
        processor = make_processor()
        inputs = processor(text=["a", "b"], images=[row["image"] for row in rows])
        assert inputs["image_index"].tolist() == [[0, 0, 0, 1], [2, 2, -1, -1]]
        same = processor(text=["a", "b"], images=read)["pixel_values"]
        assert np.array_equal(inputs["pixel_values"], same)

    def test_pictures_of_a_batch_are_resized_as_they_are_read(self, set_limits):
        """Beyond the limit: the same tensors and the same hashes, bit for bit, from the collator and the processor."""
        files = [picture_bytes(picture(90 + i, 60, seed=i)) for i in range(4)]
        frames = [np.asarray(picture(50, 40, seed=i)) for i in range(3)]
        rows = [
            {"text": "a red cat", "image": [files[0], files[1]], "video": np.stack(frames)},
            {"text": "b", "image": files[2:]},
            {"text": "c", "image": files[0], "video": np.stack(frames[::-1])},
        ]
        config = make_config(tasks=[Retrieval("find")])
        collator = MMDataCollator(make_processor(), config)
        cells = {"images": [row["image"] for row in rows], "videos": [row.get("video") for row in rows]}
        whole = [collator(rows), make_processor()(text=["a", "b", "c"], **cells)]
        set_limits(batch_pixels=90 * 60 + 1)  # the first picture is kept, all others are not
        calls, processor = [], make_processor()
        process = processor.process_pictures
        processor.process_pictures = lambda pictures, **options: (
            calls.append(len(pictures)) or process(pictures, **options)
        )
        few = [MMDataCollator(processor, config)(rows), processor(text=["a", "b", "c"], **cells)]
        assert calls[:3] == [1, 1, 1]
        assert max(calls) == 3  # the frames of one video
        for one, other in zip(whole, few, strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - {"labels"}:
                assert torch.equal(one[name], other[name]), name
        assert torch.equal(whole[0]["labels"]["find"], few[0]["labels"]["find"])

    def test_pictures_of_different_sizes_in_a_large_batch(self, set_limits):
        set_limits(batch_pixels=90 * 60)
        processor = make_processor()
        processor.image_processor.do_resize = False
        with pytest.raises(ValueError, match="pictures of different sizes"):
            processor(text=["a", "b"], images=[picture(90, 60), picture(60, 90)])

    @pytest.mark.slow
    def test_a_batch_of_many_large_pictures_takes_little_memory(self):
        done = run_child(
            """
            from hostile_media import png
            from tiny import make_config, make_processor
            from mm_transformers import MMDataCollator, set_limits

            set_limits(kept_image_pixels=1_000_000, batch_pixels=8_000_000)
            content = [png(1000, 1000 - i) for i in range(64)]
            collator = MMDataCollator(make_processor(), make_config())
            collator([{"text": "a", "image": content[:1]}])
            before = peak()
            batch = collator([{"text": "a", "image": content[i : i + 4]} for i in range(0, 64, 4)])
            tell(taken=peak() - before, number=len(batch["pixel_values"]))
            """
        )
        assert done.told["number"] == 64, done.stderr
        assert done.told["taken"] < 100 * 2**20  # all at full size would take 256 MB

    @pytest.mark.slow
    def test_a_row_of_many_large_pictures_takes_little_memory(self):
        done = run_child(
            """
            from hostile_media import png
            from tiny import make_config, make_processor
            from mm_transformers import MMDataCollator, set_limits

            set_limits(kept_image_pixels=1_000_000, row_pixels=8_000_000)
            content = [png(1000, 1000 - i) for i in range(60)]
            collator = MMDataCollator(make_processor(), make_config())
            collator([{"text": "a", "image": content[:1]}])
            before = peak()
            batch = collator([{"text": "a", "image": content}])
            tell(taken=peak() - before, number=len(batch["pixel_values"]))
            """
        )
        assert done.told["number"] == 60, done.stderr
        assert done.told["taken"] < 120 * 2**20  # all at full size would take 180 MB twice


class TestSounds:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lambda: wav(1, samples=bytes(20_000)), "1 Hz is below the limit lowest_sampling_rate=1,000"),
            (
                lambda: wav(2**31 - 1, samples=bytes(20_000)),
                "2,147,483,647 Hz is above the limit highest_sampling_rate",
            ),
            (lambda: wav(8000, 65_535, samples=bytes(131_070)), "cannot be read"),
            (lambda: flac(3600), "lasts 3,600.0 s, longer than the limit audio_seconds=600.0; to change it"),
            (lambda: wav(0), "cannot be read"),
        ],
    )
    def test_the_header_is_judged(self, content, message):
        content = content()
        for source in (content, {"bytes": content, "path": None}):
            with pytest.raises(AudioError, match=message):
                load_audio(source, RATE)

    def test_a_header_that_lies_about_its_length(self):
        content = bytearray(wav(16_000, seconds=0.1))
        content[40:44] = struct.pack("<I", 2**31)
        assert len(load_audio(bytes(content), RATE)) == 1600
        silence = bytearray(flac(1))
        silence[18 + 8 : 18 + 8] = b""
        stream_info = int.from_bytes(silence[18:26], "big")
        silence[18:26] = (stream_info | (2**36 - 1)).to_bytes(8, "big")
        with pytest.raises(AudioError, match="longer than the limit audio_seconds"):
            load_audio(bytes(silence), RATE)

    def test_samples_of_all_channels_count(self, set_limits):
        set_limits(audio_samples=1000)
        with pytest.raises(AudioError, match="has 1,200 samples, more than the limit audio_samples=1,000"):
            load_audio(wav(16_000, 3, samples=bytes(2 * 1200)), RATE)
        for array in (np.zeros(1001), np.zeros((2, 501)), [0.0] * 1001, np.broadcast_to(np.float32(0), (3, 10**9))):
            with pytest.raises(AudioError, match="more than the limit audio_samples|longer than the limit"):
                load_audio(array, RATE, source_rate=RATE)

    def test_resampling_is_bounded(self, set_limits):
        clip = np.zeros(4000, np.float32)
        cell = {"bytes": wav(8000, seconds=0.5), "path": None, "cast": {"sampling_rate": 2**31}}
        with pytest.raises(AudioError, match="above the limit highest_sampling_rate"):
            load_audio(cell, RATE)
        with pytest.raises(AudioError, match="above the limit highest_sampling_rate"):  # of a stranger's processor
            load_audio(clip, 10**9, source_rate=8000)
        set_limits(audio_samples=5000)
        with pytest.raises(AudioError, match="has 8,000 samples, more than the limit audio_samples=5,000"):
            load_audio(clip, RATE, source_rate=8000)

    def test_many_channels_are_averaged(self):
        pytest.importorskip("soundfile")
        assert load_audio(flac(1, RATE, 8), RATE).shape == (RATE,)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    video(64, 48, 20, path)
    return path


class TestVideos:
    def test_limits(self, clip, set_limits, tmp_path):
        for change, message in (
            (
                dict(video_frame_pixels=3000),
                "has frames of 64 x 48 pixels, more than the limit video_frame_",
            ),
            (dict(video_frames=10), "has 20 frames, more than the limit video_frames=10"),
            (
                dict(video_pixels=60_000),
                "has 20 frames of 64 x 48 pixels, in total more than the limit video_pixels=60,",
            ),
            (dict(video_seconds=0.5), "lasts 1 s, longer than the limit video_seconds=0.5"),
            (dict(kept_frames=3), "4 frames are requested, more than the limit kept_frames=3"),
            (dict(file_bytes=100), "bytes, more than the limit file_bytes=100"),
        ):
            set_limits(**change)
            with pytest.raises(VideoError, match=message):
                load_frames(clip, 4)
        for frames in (np.zeros((11, 8, 8, 3), np.uint8), [picture()] * 11):
            set_limits(video_frames=10)
            with pytest.raises(VideoError, match="has 11 frames, more than the limit video_frames=10"):
                load_frames(frames, 4)
            set_limits(kept_frames=10)
            with pytest.raises(VideoError, match="11 frames are requested, more than the limit kept_frames=10"):
                load_frames(frames, 10**9)

    def test_pixels_of_all_frames_are_bounded(self, tmp_path, set_limits):
        """Also where the file does not say how many frames there are."""
        video(64, 48, 20, tmp_path / "a.mkv")
        set_limits(video_pixels=20 * 64 * 48)
        assert len(load_frames(tmp_path / "a.mkv", 4)) == 4
        set_limits(video_pixels=20 * 64 * 48 - 1)
        with pytest.raises(
            VideoError, match="the frames of .* have in total more pixels than the limit video_pixels=61,"
        ):
            load_frames(tmp_path / "a.mkv", 4)

    def test_a_frame_is_not_coded_many_times(self):
        av = pytest.importorskip("av")
        for scans in (300, 20):
            file = io.BytesIO()
            with av.open(file, "w", format="matroska") as container:
                stream = container.add_stream("mjpeg", rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
                container.start_encoding()
                packet = av.Packet(many_scans(scans))
                packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 1000), 0, 0
                container.mux(packet)
            if scans == 20:
                assert len(load_frames(file.getvalue(), 2)) == 1
            else:
                with pytest.raises(
                    VideoError, match=r"a frame of .* has 30\d scans, more than the limit image_scans=100"
                ):
                    load_frames(file.getvalue(), 2)

    def test_pixels_of_all_kept_frames_are_bounded(self, clip, set_limits):
        set_limits(row_pixels=4000)
        for given in (clip, [picture()] * 20):
            frames = load_frames(given, 4)
            assert len(frames) == 4
            assert 3000 < sum(frame.width * frame.height for frame in frames) <= 4000

    def test_frames_are_shrunk(self, clip, set_limits):
        set_limits(kept_frame_pixels=1000)
        frames = load_frames(clip, 4)
        assert [frame.size for frame in frames] == [(36, 27)] * 4

    def test_a_file_that_names_other_files_is_not_opened(self, clip, tmp_path):
        """As playlists do: they would open any file of the machine, and addresses."""
        playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n"
        texts = {"a.m3u8": playlist, "b.mp4": playlist, "c.mp4": "ffconcat version 1.0\nfile a.mp4\n"}
        for name, text in texts.items():
            path = clip.parent / name
            path.write_text(text)
            for source in (path, text.encode()):
                with pytest.raises(VideoError, match="cannot be read"):
                    load_frames(source, 2)

    def test_a_size_that_changes_within_the_stream(self, tmp_path, set_limits):
        """The frames before are taken or not, but no large one is decoded."""
        content = b""
        for i, (width, height) in enumerate([(64, 48), (320, 240)]):
            video(width, height, 5, tmp_path / f"{i}.ts")
            content += (tmp_path / f"{i}.ts").read_bytes()
        assert {frame.size for frame in load_frames(content, 10)} == {(64, 48), (320, 240)}
        set_limits(video_frame_pixels=4000)
        try:
            sizes = {frame.size for frame in load_frames(content, 10)}
        except VideoError:
            sizes = set()
        assert sizes <= {(64, 48)}

    @pytest.mark.parametrize("said", [7, 1_000, 80_000])
    def test_a_header_that_lies_about_its_frames(self, tmp_path, said):
        path = tmp_path / "a.avi"
        video(64, 48, 20, path, "mpeg4")
        content = bytearray(path.read_bytes())
        place = content.index(b"strhvids"[:4]) + 8 + 32
        content[place : place + 4] = struct.pack("<I", said)
        frames = load_frames(bytes(content), 4)
        assert len(frames) == 4
