"""Videos: a few frames, in order, told apart by their time."""

import io
import logging
import struct

import av
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import make_config, make_image, make_model, make_processor
from transformers import TrainingArguments, set_seed
from videos import encode, make_frames

from mm_transformers import Classification, MMDataCollator, MMTrainer, MMTransformerForMultiTask
from mm_transformers.model.streams import SinusoidalFrames
from mm_transformers.model.video import VideoError, load_frames, sample_evenly


def brightness(frames: list[Image.Image]) -> list[float]:
    return [np.asarray(frame).mean() / 255 for frame in frames]


@given(st.integers(1, 500), st.integers(1, 40))
def test_frames_lie_in_the_middle_of_equal_parts(total, wanted):
    numbers = sample_evenly(total, wanted)
    if total <= wanted:
        assert numbers == list(range(total))
    else:
        assert len(set(numbers)) == wanted
        for i, number in enumerate(numbers):  # the frame that shows at the middle of part i
            assert number <= (i + 0.5) * total / wanted < number + 1


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4")])
@pytest.mark.parametrize("total", [1, 3, 20])
def test_files_of_several_kinds(tmp_path, container, codec, total):
    """Matroska does not say how many frames it holds."""
    frames = make_frames(total)
    data = encode(frames, container, codec)
    path = tmp_path / "video"
    path.write_bytes(data)
    expected = brightness([frames[i] for i in sample_evenly(total, 4)])
    for video in (data, path, str(path), {"bytes": data, "path": None}, {"path": str(path), "bytes": None}):
        loaded = load_frames(video, 4)
        assert brightness(loaded) == pytest.approx(expected, abs=0.03)
        assert all(frame.mode == "RGB" and frame.size == (32, 32) for frame in loaded)


@pytest.mark.parametrize(
    ("matrix", "size", "white"),
    [
        ((0, 1, -1, 0), (32, 64), (slice(0, 28), slice(None))),  # a quarter turn clockwise: what was left is above
        ((0, -1, 1, 0), (32, 64), (slice(36, None), slice(None))),
        ((-1, 0, 0, -1), (64, 32), (slice(None), slice(36, None))),
        ((1, 0, 0, 1), (64, 32), (slice(None), slice(0, 28))),
    ],
)
def test_frames_are_turned_as_the_file_says(matrix, size, white):
    """By the display matrix of MP4, as phones write it."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255
    content = bytearray(encode([Image.fromarray(pixels)] * 3))
    place = content.find(b"tkhd")
    place += 4 + 4 + (20 if content[place + 4] == 0 else 32) + 16
    a, b, c, d = (value * 2**16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    for frame in load_frames(bytes(content), 2):
        assert frame.size == size
        found = np.asarray(frame.convert("L"))
        is_white = np.zeros(found.shape, bool)
        is_white[white] = True
        assert found[is_white].min() > 200
        assert np.sort(found[~is_white])[: found.size // 3].max() < 60


def test_frames_themselves(tmp_path):
    frames = make_frames(9)
    array = np.stack([np.asarray(frame) for frame in frames])
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for frame, path in zip(frames, paths, strict=True):
        frame.save(path)
    expected = brightness([frames[i] for i in (1, 4, 7)])
    for video in (frames, tuple(frames), array, paths, torch.tensor(array)):
        assert brightness(load_frames(video, 3)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "the video (a list) has no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "the video (a ndarray) has no frames"),
        ("not/there.mp4", "video 'not/there.mp4' does not exist"),
        (b"nonsense", "the video (8 bytes) cannot be read"),
        ([make_image(), "no.png"], "frame 1 of the video (a list) cannot be used: image 'no.png' does not exist"),
        (3, "a video must be a path, bytes, a list of frames or a dict with 'bytes' or 'path', but is of type int"),
    ],
)
def test_what_cannot_be_used(video, message):
    with pytest.raises(VideoError) as error:
        load_frames(video, 4)
    assert message in str(error.value)


def test_a_file_of_sound_alone():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(VideoError, match="has no pictures, only other streams"):
        load_frames(file.getvalue(), 4)


def test_pictures_and_frames_in_one_row():
    processor = make_processor()
    processor.num_frames = 3
    short, long = make_frames(2), make_frames(12)
    inputs = processor(
        text=["a", "b", "c", "d"], images=[make_image(1), None, [make_image(2), make_image(3)], None],
        videos=[short, long, None, long],
    )  # fmt: skip
    # The videos of the second and the fourth row are one.
    assert inputs["image_index"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, -1], [3, 4, 5]]
    assert inputs["frame_index"].tolist() == [[-1, 0, 1], [0, 1, 2], [-1, -1, -1], [0, 1, 2]]
    assert inputs["pixel_values"].shape[0] == 8
    expected = processor(text="a", images=[long[i] for i in (2, 6, 10)])["pixel_values"]
    assert torch.equal(inputs["pixel_values"][3:6], expected)
    assert "frame_index" not in processor(text="a", images=make_image())


def test_sinusoids_by_their_definition():
    vectors = SinusoidalFrames(8, 10)(torch.tensor([[0, 3, -1]]), torch.float32)[0]
    for i in range(5):
        for row, frame in enumerate((0, 3)):
            angle = frame / 10_000 ** (2 * i / 10)
            assert vectors[row, i] == pytest.approx(np.sin(angle), abs=1e-6)
            assert vectors[row, 5 + i] == pytest.approx(np.cos(angle), abs=1e-6)
    assert vectors[2].tolist() == [0] * 10


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_the_order_of_frames_matters_and_that_of_pictures_does_not(kind):
    model, processor = make_model(frame_embedding=kind, initializer_range=0.5), make_processor()
    frames = make_frames(4)

    def answer(**media) -> torch.Tensor:
        with torch.no_grad():
            return model(**processor(text="a cat", **media)).logits["topic"]

    assert (answer(videos=frames) - answer(videos=frames[::-1])).abs().max() > 1e-4
    torch.testing.assert_close(answer(images=frames), answer(images=frames[::-1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("with_video", [True, False])
def test_every_parameter_gets_a_gradient(kind, with_video):
    model, processor = make_model(frame_embedding=kind).train(), make_processor()
    inputs = processor(
        text=["a", "b"], images=[make_image(), None], videos=[None, make_frames(20) if with_video else None]
    )
    model(**inputs, labels={"topic": torch.tensor([0, 1])}).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if kind == "learned":
        assert (model.model.frame_embedding.weight.grad.abs().amax(1) > 0).all() == with_video


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_ragged_rows_answer_as_alone(kind):
    model, processor = make_model(frame_embedding=kind), make_processor()
    texts, images = ["a cat", "the dog", "rain", "sun"], [make_image(), None, None, [make_image(1), make_image(2)]]
    videos = [make_frames(3), make_frames(11), None, make_frames(1)]
    with torch.no_grad():
        together = model(**processor(text=texts, images=images, videos=videos)).logits["topic"]
        for i in range(4):
            alone = model(**processor(text=texts[i], images=images[i], videos=videos[i])).logits["topic"]
            torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


def test_clear_errors():
    model, inputs = make_model(), make_processor()(text="a", videos=make_frames(3))
    with pytest.raises(ValueError, match=r"frame_index must have the shape of image_index, \(1, 3\), but has \(1, 2\)"):
        model(**inputs | {"frame_index": inputs["frame_index"][:, :2]})
    with pytest.raises(ValueError, match="num_frames must be at least 1 and frame_embedding 'sinusoidal' or 'learned'"):
        make_config(frame_embedding="rotary")
    collator = MMDataCollator(make_processor(), make_config(tasks=[Classification("x", labels=["a", "b"])]))
    with pytest.raises(
        VideoError, match=r"row 0 of the batch, column 'video': the video \(a list\) has no frames; repair"
    ):
        collator([{"text": "a", "video": []}])


@pytest.mark.slow
def test_it_learns_which_way_time_runs(tmp_path, caplog):
    """Brighter or darker? A bag of frames could not tell."""

    def rows(number: int, seed: int) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, number).tolist()
        videos = []
        for label in labels:
            frames = make_frames(int(rng.integers(6, 12)))
            videos.append({"bytes": encode(frames if label else frames[::-1]), "path": None})
        columns = {"text": ["what happens"] * number, "video": videos, "dawn": labels}
        return datasets.Dataset.from_dict(columns).cast_column("video", datasets.Video(decode=False))

    set_seed(0)
    config = make_config("bert", "resnet", tasks=[Classification("dawn", labels=["no", "yes"])], initializer_range=0.1)
    processor = make_processor()
    processor.num_frames = 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with caplog.at_level(logging.ERROR):
        trainer = MMTrainer(
            MMTransformerForMultiTask(config), arguments, processing_class=processor, train_dataset=rows(96, 0)
        )
        trainer.train()
        assert trainer.evaluate(rows(48, 1))["eval_dawn_accuracy"] > 0.9


def test_frames_for_which_there_is_no_vector():
    config = make_config(frame_embedding="learned", num_frames=3, tasks=[Classification("x", labels=["a", "b"])])
    with pytest.raises(
        ValueError, match="takes 8 frames of a video, but the model has learned frame vectors for only 3: set"
    ):
        MMDataCollator(make_processor(), config)
    model = make_model(frame_embedding="learned", num_frames=3)
    with pytest.raises(ValueError, match="frame_index must be less than 3, the num_frames of the config"):
        model(**make_processor()(text="a", videos=make_frames(5)))


def test_num_frames_can_be_set_when_loading(tmp_path):
    processor = make_processor()
    processor.num_frames = 5
    processor.save_pretrained(tmp_path)
    assert type(processor).from_pretrained(tmp_path).num_frames == 5
    assert type(processor).from_pretrained(tmp_path, num_frames=3).num_frames == 3


def test_a_shared_video_is_decoded_once(monkeypatch):
    from mm_transformers.model import processing_mm_transformer as module

    calls = []
    monkeypatch.setattr(module, "load_frames", lambda video, n: calls.append(1) or load_frames(video, n))
    video = make_frames(6)
    make_processor()(text=["a", "b", "c"], videos=[video, video, None])
    assert len(calls) == 1
