"""The limits themselves: who may change them, where they hold, and that training and prediction stay within memory."""

import copy
import dataclasses
import json
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest
from child_process import run_child
from hostile_media import eps, flac, gif, picture_bytes, png, video, wav
from PIL import Image
from tiny import make_config, make_processor
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import mm_transformers
from mm_transformers import Limits, MMDataCollator, set_limits
from mm_transformers.cli.app import app
from mm_transformers.model import limits as module
from mm_transformers.model.limits import limits
from mm_transformers.training.recipe import Recipe


DOCS = Path(__file__).parents[2] / "docs" / "limits.md"


@pytest.fixture(autouse=True)
def same_limits_afterwards(monkeypatch):
    monkeypatch.setattr(module, "_current", Limits())


class TestSettings:
    def test_they_can_be_changed(self):
        assert set_limits(image_pixels=2e8, audio_seconds=5).image_pixels == 200_000_000
        assert isinstance(limits().image_pixels, int)
        assert limits().audio_seconds == 5.0
        assert limits().video_frames == Limits().video_frames

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(pixels=1), "There is no limit 'pixels'; the limits are image_pixels, kept_image_pixels"),
            (dict(image_pixels=0), "The limit image_pixels must be a number above 0, but is 0"),
            (dict(image_pixels=-1.5), "must be a number above 0"),
            (dict(image_pixels="9"), "must be a number above 0, but is '9'"),
            (dict(audio_seconds=float("nan")), "must be a number above 0"),
            (dict(audio_seconds=float("inf")), "must be a number above 0"),
            (dict(file_bytes=True), "must be a number above 0"),
        ],
    )
    def test_what_is_no_limit(self, change, message):
        with pytest.raises(ValueError, match=message):
            set_limits(**change)
        assert limits() == Limits()

    def test_the_option_of_the_command(self):
        """Before the name of the command; the command itself then fails, for want of a model."""
        result = CliRunner().invoke(app, ["--limit", "image_pixels=2e8", "--limit", "row_items=3", "predict"])
        assert "Missing argument" in result.output
        assert (limits().image_pixels, limits().row_items) == (200_000_000, 3)
        for text, message in (("a=1", "There is no limit 'a'"), ("row_items", "--limit takes a name and a number")):
            result = CliRunner().invoke(app, ["--limit", text, "predict"])
            assert result.exit_code == 2
            assert message in result.output

    def test_no_file_can_change_them(self):
        for where in ("data", "model", "training"):
            recipe = {"data": {"train": "a.csv"}, "model": {"text": "b"}, "tasks": [], "training": {"output_dir": "c"}}
            recipe[where] = {**recipe[where], "limits": {"image_pixels": 10**12}}
            with pytest.raises(ValueError, match="limits"):
                Recipe.from_dict(recipe)

    def test_the_page_of_the_docs_is_true(self):
        rows = re.findall(r"^\| `(\w+)` \| ([\d,.]+)", DOCS.read_text(), re.M)
        shown = {name: float(value.replace(",", "")) for name, value in rows}
        missing = [name for name in dataclasses.asdict(Limits()) if name not in shown]
        assert missing == [], f"add a row for each to {DOCS}"
        assert shown == dataclasses.asdict(Limits())
        assert set(re.findall(r"^ +(\w+) \(`", Limits.__doc__, re.M)) == set(shown)

    def test_exports(self):
        assert {"Limits", "set_limits"} <= set(mm_transformers.__all__)


def test_what_is_handed_to_new_processes_carries_them(monkeypatch):
    collator = MMDataCollator(make_processor(), make_config())
    set_limits(image_pixels=50)
    content = pickle.dumps(collator)
    set_limits(image_pixels=60)
    assert copy.copy(collator).media["images"].columns == pickle.loads(content).media["images"].columns == ["image"]
    assert limits().image_pixels == 60  # in the process itself, nothing is changed by the way
    monkeypatch.setattr(multiprocessing.current_process(), "_name", "SpawnProcess-1")
    pickle.loads(content)
    assert limits().image_pixels == 50


@pytest.mark.nightly
def test_workers_that_are_started_anew_have_them():
    """Not those that they would have by themselves: they import the package once more."""
    set_limits(image_pixels=50)
    collator = MMDataCollator(make_processor(), make_config())
    rows = [{"text": "a", "image": Image.new("RGB", (9, 9))}]
    loader = DataLoader(rows, batch_size=1, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(ValueError, match="has 9 x 9 pixels, more than the limit image_pixels=50"):
        next(iter(loader))


def hostile_rows(folder: Path) -> tuple[list[dict], list[str]]:
    """Rows with one hostile file each, good rows between them, and the names of the files that must be refused."""
    heavy = {
        "rgba.png": png(7000, 7000, 8, 6),
        "sixteen_bits.png": png(7000, 7000, 16),
        "progressive.jpg": picture_bytes(Image.new("RGB", (7000, 7000)), "JPEG", progressive=True),
        "animated.gif": gif(500),
        "minutes.flac": flac(590),
        "channels.wav": wav(16_000, 64, seconds=10),
    }
    refused = {
        "grey.png": png(9400, 9400), "declared.png": png(60_000, 60_000, real=False), "thin.png": png(3000, 1),
        "gone.eps": eps(), "cut.png": png(900, 900)[:200], "cut.jpg": heavy["progressive.jpg"][:4000],
        "cut.gif": heavy["animated.gif"][:50], "hertz.wav": wav(1, samples=bytes(20_000)), "hour.flac": flac(3600),
        "many.wav": wav(16_000, 65_535, samples=bytes(131_070)), "cut.flac": heavy["minutes.flac"][:30],
        "list.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n",
        "concat.mp4": b"ffconcat version 1.0\nfile a.mp4\n",
    }  # fmt: skip
    for name, content in {**heavy, **refused}.items():
        (folder / name).write_bytes(content)
    video(8192, 4320, 12, folder / "frames.mp4")
    video(2048, 2048, 12, folder / "large.mp4")
    (folder / "cut.mp4").write_bytes((folder / "large.mp4").read_bytes()[:2000])
    column = {".mp4": "video", ".wav": "audio", ".flac": "audio"}
    rows = []
    for name in [*heavy, *refused, "frames.mp4", "large.mp4", "cut.mp4"]:
        rows.append({"text": "a cat", column.get(Path(name).suffix, "image"): str(folder / name), "topic": "animals"})
        rows.append({"text": "a dog", "image": str(folder / "good.png"), "topic": "food"})
    rows.append({"text": "the cat " * 1_000_000, "topic": "animals"})
    rows.append({"text": "a cat", "image": "http://169.254.169.254/latest/meta-data", "topic": "food"})
    Image.new("RGB", (30, 20)).save(folder / "good.png")
    return rows, [*refused, "frames.mp4", "cut.mp4", "169.254.169.254"]


@pytest.mark.nightly
def test_training_and_prediction_stay_within_memory_on_a_hostile_folder(tmp_path):
    """At most 2 GB above what the same takes on honest rows; each bad file is named, and each row answered."""
    rows, refused = hostile_rows(tmp_path)
    file, honest = tmp_path / "rows.jsonl", tmp_path / "honest.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    honest.write_text("".join(json.dumps(row) + "\n" for row in rows if "good.png" in row.get("image", "")))
    child = run_child(
        f"""
        import json, time
        from pathlib import Path
        from hostile_media import model_and_processor
        from mm_transformers import MMDataCollator, MMTrainer, MMTrainingArguments
        from mm_transformers.cli.predict import Reading, run_prediction

        folder = Path({str(tmp_path)!r})
        model, processor = model_and_processor()
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")

        def run(name):
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            args = MMTrainingArguments(str(folder / "out"), max_steps=-(-len(rows) // 8), per_device_train_batch_size=8,
                                       report_to="none", save_strategy="no", probe_start=False, seed=0)
            collator = MMDataCollator(processor, model.config, on_bad_file="drop")
            MMTrainer(model, args, data_collator=collator, train_dataset=rows, eval_dataset=rows[:2]).train()
            run_prediction(str(folder / "model"), folder / name, folder / "answers.jsonl", None, 8, 0, None,
                           Reading(on_bad_file="drop"))

        run("honest.jsonl")
        tell(before=peak())
        start = time.time()
        run("rows.jsonl")
        tell(after=peak(), seconds=time.time() - start)
        """,
        seconds=560,
        gigabytes=16,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    print(child.told)
    assert child.told["after"] - child.told["before"] < 2 * 2**30
    assert [name for name in refused if name not in child.stderr] == []
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(rows)
    assert all(answer["topic"] in ("animals", "food") for answer in answers)


@pytest.mark.nightly
def test_the_page_stays_within_memory_on_hostile_uploads(tmp_path):
    """At most 2 GB above what one honest request takes; each request ends with answers or with one sentence."""
    rows, refused = hostile_rows(tmp_path)
    child = run_child(
        f"""
        import re, time
        from pathlib import Path
        from hostile_media import model_and_processor
        from mm_transformers.cli.page_answers import answers_as_html
        from mm_transformers.cli.uploads import Upload

        folder = Path({str(tmp_path)!r})
        model, processor = model_and_processor()

        def answer(name, text="a cat"):
            part = "audio" if name.endswith((".wav", ".flac")) else "image"
            row = {{"text": text, part: Upload(name, (folder / name).read_bytes())}}
            return answers_as_html(model, processor, row, ["topic"], ("text", "image", "audio"))

        answer("good.png")
        tell(before=peak())
        shown, slowest = {{}}, 0.0
        for path in sorted(folder.iterdir()):
            if path.suffix in (".png", ".jpg", ".gif", ".eps", ".wav", ".flac"):
                start = time.time()
                page = answer(path.name)
                slowest = max(slowest, time.time() - start)
                shown[path.name] = "%" in re.sub("<style.*?</style>", "", page, flags=re.S)
        start = time.time()
        answer("good.png", "the cat " * 1_000_000)
        tell(after=peak(), slowest=max(slowest, time.time() - start), shown=shown)
        """,
        seconds=560,
        gigabytes=16,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    print({name: value for name, value in child.told.items() if name != "shown"})
    assert child.told["after"] - child.told["before"] < 2 * 2**30
    assert child.told["slowest"] < 120
    wanted = {row["image"] if "image" in row else row.get("audio", "") for row in rows}
    for path in map(Path, wanted):
        if path.name in child.told["shown"]:
            assert child.told["shown"][path.name] is (path.name not in refused), path.name
