"""The scripts in `examples/`, run as users run them: no font, no npm and no network needed."""

import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scripts import EXAMPLES, import_script, run
from tiny import TEXT_ENCODERS, VISION_ENCODERS, make_image, make_image_processor, make_tokenizer
from transformers import AutoModel

from mm_transformers import MMTransformerForMultiTask, MMTransformerProcessor


BUILD, TRAIN, FINETUNE = EXAMPLES / "emoji/build_dataset.py", EXAMPLES / "emoji/train.py", EXAMPLES / "finetune.py"


# build_dataset.py

build_dataset = import_script(BUILD)
FONT = next((path for path in build_dataset.FONT_PATHS if Path(path).is_file()), None)

GROUPS = ["smileys & emotion", "people & body", "components", "animals & nature"]
TONES = ["1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"]
# hexcode -> name, group, keywords. "hand" belongs to two groups; U+1FAE9 is newer than Debian 12's font.
EMOJI = {
    "1F600": ("grinning face", 0, ["cheerful", "face"]),
    "1F620": ("angry face", 0, ["anger", "face", "mad"]),
    "1F610": ("neutral face", 0, ["face", "meh"]),
    "1FAE3": ("face with peeking eye", 0, ["face", "hand"]),
    "1F44B": ("waving hand", 1, ["hand", "hello"]),
    "1F3C3": ("person running", 1, ["run"]),
    "1F3C3-200D-2642-FE0F": ("man running", 1, ["man", "run"]),
    "1F3C3-200D-2640-FE0F": ("woman running", 1, ["run", "woman"]),
    "1F3FB": ("light skin tone", 2, ["skin"]),
    "1F436": ("dog face", 3, ["dog", "face", "pet"]),
    "1F431": ("cat face", 3, ["cat", "face", "pet"]),
}


def character(hexcode: str) -> str:
    return "".join(chr(int(code, 16)) for code in hexcode.split("-"))


@pytest.fixture
def npm_dir(tmp_path: Path) -> Path:
    """A `node_modules` folder, small, but in the form of emojibase-data 17 and emoji-emotion 3."""
    folder = tmp_path / "node_modules"
    for language in ("en", "de", "fr", "es", "zh"):
        entries = [{"label": "regional indicator A", "hexcode": "1F1E6", "emoji": character("1F1E6"), "type": 1}]
        for hexcode, (name, group, keywords) in EMOJI.items():
            entry = {"label": f"{name} ({language})", "hexcode": hexcode, "emoji": character(hexcode), "group": group}
            if language == "en":
                entry |= {"label": name, "tags": keywords}
            if hexcode == "1F44B":
                skins = [f"{hexcode}-{tone}" for tone in TONES]
                entry["skins"] = [{"hexcode": skin, "emoji": character(skin), "group": group} for skin in skins]
            entries.append(entry)
        path = folder / "emojibase-data" / language / "data.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(entries), encoding="utf-8")
    messages = {"groups": [{"key": name, "message": name, "order": i} for i, name in enumerate(GROUPS)]}
    (folder / "emojibase-data/en/messages.json").write_text(json.dumps(messages), encoding="utf-8")
    (folder / "emoji-emotion").mkdir()
    (folder / "emoji-emotion/index.js").write_text(
        "/**\n * @type {Array<Info>}\n */\nexport const emojiEmotion = [\n"
        "  {\n    name: 'grinning',\n    emoji: '\U0001f600',\n    polarity: 3\n  },\n"
        "  {name: 'angry', emoji: '\U0001f620', polarity: -3},\n"
        "  {name: 'neutral_face', emoji: '\U0001f610\ufe0f', polarity: 0}\n]\n",
        encoding="utf-8",
    )
    return folder


def test_inputs_are_read(npm_dir):
    emoji = {item.hexcode: item for item in build_dataset.read_emoji(npm_dir)}
    assert set(emoji) == set(EMOJI) - {"1F3FB"}  # no loose skin tones, no loose letters
    wave = emoji["1F44B"]
    assert (wave.name, wave.group, wave.keywords) == ("waving hand", "people & body", ["hand", "hello"])
    assert wave.variants == [character(code) for code in ["1F44B", *(f"1F44B-{tone}" for tone in TONES)]]
    assert wave.translations == {
        "german": "waving hand (de)", "french": "waving hand (fr)", "spanish": "waving hand (es)",
        "chinese": "waving hand (zh)",
    }  # fmt: skip
    polarity = {hexcode: (item.polarity, item.polarity_class) for hexcode, item in emoji.items()}
    assert polarity["1F600"] == (3, "positive")
    assert polarity["1F620"] == (-3, "negative")
    assert polarity["1F610"] == (0, "neutral")  # a variation selector makes no difference
    assert polarity["1F436"] == (None, None)


@pytest.mark.parametrize("missing", ["emojibase-data", "emoji-emotion"])
def test_a_missing_package_is_told(npm_dir, tmp_path, missing):
    (npm_dir / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(build_dataset.InputError, match=f"npm install --prefix {tmp_path} {missing}@"):
        build_dataset.read_emoji(npm_dir)


@pytest.mark.skipif(FONT is None, reason="needs the font (apt install fonts-noto-color-emoji)")
def test_a_missing_npm_folder_is_told_in_one_line(tmp_path):
    done = run(BUILD, cwd=tmp_path, ok=False)
    assert done.stderr.count("\n") == 1
    assert "node_modules/emojibase-data/en/messages.json is missing" in done.stderr
    assert "npm install --prefix . emojibase-data@17" in done.stderr
    assert not (tmp_path / "emoji_data").exists()


def test_a_missing_font_is_told_in_one_line(tmp_path):
    done = run(BUILD, "--font", tmp_path / "none.ttf", cwd=tmp_path, ok=False)
    assert done.stderr.count("\n") == 1
    assert "apt install fonts-noto-color-emoji" in done.stderr
    assert not (tmp_path / "emoji_data").exists()


def test_a_list_of_polarities_in_another_form_is_told(npm_dir):
    (npm_dir / "emoji-emotion/index.js").write_text("export default makeList('emoji')\n")
    with pytest.raises(build_dataset.InputError, match=r"emoji-emotion@3"):
        build_dataset.read_emoji(npm_dir)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F44B", "1F44B-1F3FD"),  # skin tone
        ("1F3C3", "1F3C3-200D-2642"),  # gender, with and without variation selector
        ("1F3C3", "1F3C3-200D-2640-FE0F"),
        ("1F3C3", "1F3C3-1F3FF-200D-2640-FE0F-200D-27A1-FE0F"),  # direction
        ("1F468-200D-1F680", "1F469-1F3FB-200D-1F680"),  # man and woman astronaut
        ("1F466", "1F467"),  # boy and girl
    ],
)
def test_one_family(one, other):
    assert build_dataset.family_of(one) == build_dataset.family_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2640", "2642"),  # the signs themselves
        ("27A1", "2B05"),  # the arrows themselves
        ("1F468", "1F466"),  # man and boy
        ("1F9D1-200D-1F680", "1F9D1-200D-1F692"),  # astronaut and firefighter
        ("1F1E9-1F1EA", "1F1EB-1F1F7"),  # flags
    ],
)
def test_two_families(one, other):
    assert build_dataset.family_of(one) != build_dataset.family_of(other)


def test_equal_pictures_join_their_families():
    pictures = {"A": b"1", "B": b"2", "C": b"1", "D-1F3FB": b"2", "D": b"3", "E": b"3", "F": b"4"}
    families = build_dataset.merge_families(pictures)
    together = {}
    for hexcode, family in families.items():
        together.setdefault(family, set()).add(hexcode)
    assert sorted(map(sorted, together.values())) == [["A", "C"], ["B", "D", "D-1F3FB", "E"], ["F"]]


@given(
    strata=st.dictionaries(st.text("abcdef", min_size=1, max_size=6), st.sampled_from(["x", "y", "z"]), max_size=60),
    seed=st.integers(0, 10),
)
def test_every_family_gets_one_split(strata, seed):
    split_of = build_dataset.split_families(strata, seed)
    assert set(split_of) == set(strata)
    assert set(split_of.values()) <= {"train", "validation", "test"}
    # It does not matter in which order the families come.
    assert split_of == build_dataset.split_families(dict(reversed(strata.items())), seed)


def test_splits_have_the_same_share_of_every_stratum():
    strata = {f"{stratum}{i}": stratum for stratum, size in {"large": 200, "small": 20}.items() for i in range(size)}
    split_of = build_dataset.split_families(strata, seed=1)
    counts = Counter((strata[family], split) for family, split in split_of.items())
    assert counts == {
        ("large", "train"): 140, ("large", "validation"): 20, ("large", "test"): 40,
        ("small", "train"): 14, ("small", "validation"): 2, ("small", "test"): 4,
    }  # fmt: skip
    assert split_of != build_dataset.split_families(strata, seed=2)


@pytest.mark.slow
@pytest.mark.skipif(FONT is None, reason="needs the font (apt install fonts-noto-color-emoji)")
def test_the_data_set_is_built(npm_dir, tmp_path):
    run(BUILD, "--npm_dir", npm_dir, "--output_dir", tmp_path / "data", "--size", 40, cwd=tmp_path)
    data = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "validation", "test"}
    rows = [{**row, "split": split} for split, part in data.items() for row in part]
    pairs = Counter(
        (keyword, name) for hexcode, (name, group, keywords) in EMOJI.items() if group != 2 for keyword in keywords
    )
    assert Counter((row["text"], row["name"]) for row in rows) == pairs
    assert {row["split"] for row in rows if "running" in row["name"]} in ({"train"}, {"validation"}, {"test"})
    groups = {keyword: {EMOJI[h][1] for h in EMOJI if keyword in EMOJI[h][2]} for keyword, _ in pairs}
    for row in rows:
        assert row["ambiguous"] == (len(groups[row["text"]]) > 1)
        picture = row["image"]
        assert (picture.mode, picture.size) == ("RGB", (40, 40))
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert len(picture.getcolors(1600)) > 20  # in colour, and not an empty box
    by_name = {row["name"]: row for row in rows}
    assert by_name["angry face"]["polarity"] == -3
    assert by_name["dog face"]["polarity"] is None
    assert by_name["dog face"]["german"] == "dog face (de)"


@pytest.mark.skipif(FONT is None, reason="needs the font (apt install fonts-noto-color-emoji)")
def test_emoji_that_the_font_lacks_are_left_out():
    font = build_dataset.load_font(None)
    assert build_dataset.draw(font, "\U0001f600", 32) is not None
    assert build_dataset.draw(font, "\U000e0fff", 32) is None  # not assigned
    assert build_dataset.draw(font, "\U0001f600\u200d\U0001f436", 32) is None  # two emoji side by side


# train.py

train = import_script(TRAIN)


@pytest.fixture
def emoji_data(tmp_path: Path) -> Path:
    """Ten red or green pictures per split, in the form that build_dataset.py writes."""
    folder = tmp_path / "emoji_data"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = []
        for i in range(10):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 40), "red" if i % 2 else "green").save(buffer, format="PNG")
            row = dict.fromkeys(build_dataset.FEATURES, "x")
            polarity = None if i % 3 else 1.0
            rows.append({
                **row, "text": f"word{i}", "image": {"bytes": buffer.getvalue(), "path": None}, "ambiguous": i < 4,
                "group": "symbols" if i % 2 else "objects", "polarity": polarity,
                "polarity_class": None if polarity is None else "positive",
            })  # fmt: skip
        datasets.Dataset.from_list(rows, features=build_dataset.FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.slow
def test_train_reports_every_model(emoji_data, tmp_path):
    out = tmp_path / "results"
    done = run(
        TRAIN, "--data_dir", emoji_data, "--output_dir", out, "--steps", 2, "--seeds", 2, "--workers", 0, cwd=tmp_path
    )
    report = json.loads((out / "results.json").read_text())
    assert report["rows"] == {"group": 10, "group_ambiguous": 4, "polarity": 4}
    accuracy = report["accuracy"]
    assert [len(row["group"]) for row in accuracy.values()] == [2, 2, 2, 2, 1]
    # Every row of a polarity is positive, half of the rows belong to each group.
    assert accuracy["always the commonest class"] == {"group": [0.5], "group_ambiguous": [0.5], "polarity": [1.0]}
    assert all(name in done.stdout for name in ("keyword alone", "picture alone", "±"))
    assert (out / "results.png").stat().st_size > 10_000
    model = MMTransformerForMultiTask.from_pretrained(out / "model")
    assert list(model.config.get_tasks()["group"].labels) == ["objects", "symbols"]


@pytest.mark.slow
def test_train_takes_pretrained_encoders(emoji_data, encoders, tmp_path):
    out = tmp_path / "results"
    run(
        TRAIN, "--data_dir", emoji_data, "--output_dir", out, "--steps", 1, "--seeds", 1, "--workers", 0,
        "--text", encoders / "text", "--vision", encoders / "vision", "--modalities", "fused", "text", cwd=tmp_path,
    )  # fmt: skip
    assert MMTransformerForMultiTask.from_pretrained(out / "model").config.text_config.model_type == "bert"


def test_train_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--data_dir", str(tmp_path / "none")])
    assert "python build_dataset.py" in capsys.readouterr().err


def test_shuffled_pictures_are_never_those_of_their_row():
    rows = datasets.Dataset.from_dict({"image": list(range(50)), "text": [str(i) for i in range(50)]})
    shuffled = train.shuffle_pictures(rows, seed=0)
    assert list(shuffled["text"]) == list(rows["text"])
    assert sorted(shuffled["image"]) == list(range(50))
    assert all(a != b for a, b in zip(shuffled["image"], rows["image"], strict=True))


def test_moved_pictures_keep_their_middle():
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (24, 24, 40, 40))
    for _ in range(20):
        moved = train.move_at_random(picture)
        assert moved.size == picture.size
        xs, ys = zip(*[(i % 64, i // 64) for i, p in enumerate(moved.get_flattened_data()) if p[1] < 128], strict=True)
        assert abs(sum(xs) / len(xs) - 31.5) < 64 * 0.06 * 1.2 + 1
        assert abs(sum(ys) / len(ys) - 31.5) < 64 * 0.06 * 1.2 + 1
        assert 0.8 * (1 - 0.15) ** 2 < len(xs) / 16**2 < 1.2 * (1 + 0.15) ** 2


# finetune.py

finetune = import_script(FINETUNE)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Path:
    """Folders of a tiny BERT and a tiny ViT, as a download from the Hub would leave them."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(folder / "vision")
    make_image_processor().save_pretrained(folder / "vision")
    return folder


def make_rows(folder: Path, count: int = 12) -> list[dict]:
    """Rows with labels of four kinds, of which some are missing, and pictures in `folder / "pictures"`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        make_image(i).save(folder / "pictures" / f"{i}.png")
        rows.append({
            "text": f"the {'red' if i % 2 else 'green'} dog", "image": f"pictures/{i}.png" if i % 4 else None,
            "topic": None if i == 3 else ["animals", "food", "travel"][i % 3], "stars": None if i == 2 else i % 5 + 1,
            "score": None if i == 1 else i / 4, "tags": None if i == 5 else ["red", "small"][: i % 3],
        })  # fmt: skip
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            cells = {name: "|".join(cell) if isinstance(cell, list) else cell for name, cell in row.items()}
            writer.writerow(cells)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def common(encoders: Path, out: Path) -> list:
    return [
        "--text", encoders / "text", "--vision", encoders / "vision", "--num_fusion_layers", 1, "--output_dir", out,
        "--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu", "--report_to", "none", "--disable_tqdm",
        "True", "--save_steps", 1, "--do_train", "--do_eval",
    ]  # fmt: skip


def check_checkpoint(folder: Path, tasks: list[str]) -> MMTransformerForMultiTask:
    """The checkpoint answers a row with and a row without a picture."""
    model, processor = MMTransformerForMultiTask.from_pretrained(folder), MMTransformerProcessor.from_pretrained(folder)
    inputs = processor(text=["the red dog", "the green dog"], images=[make_image(), None])
    with torch.no_grad():
        answers = model.decode(model(**inputs))
    assert [list(answer) for answer in answers] == [tasks, tasks]
    return model


@pytest.mark.slow
def test_finetune_on_csv(encoders, tmp_path):
    rows = make_rows(tmp_path / "data")
    train_file = write_csv(tmp_path / "data/train.csv", rows)
    test_file = write_csv(tmp_path / "data/test.csv", rows[:5])
    out = tmp_path / "out"
    command = [
        *common(encoders, out), "--train_file", train_file, "--validation_file", train_file, "--test_file", test_file,
        "--do_predict", "--tasks", "topic:classification,stars:classification,score:regression,tags:multi_label",
    ]  # fmt: skip
    done = run(FINETUNE, *command, cwd=tmp_path)
    assert "'topic': 3 labels inferred from the training rows: animals, food, travel." in done.stderr
    tasks = check_checkpoint(out, ["topic", "stars", "score", "tags"]).config.get_tasks()
    assert tasks["stars"].labels == ["1", "2", "3", "4", "5"]
    # An empty cell of a CSV file is a missing label, so no row says that no tag holds.
    assert tasks["tags"].labels == ["red", "small"]
    metrics = json.loads((out / "all_results.json").read_text())
    assert {"eval_topic_accuracy", "eval_score_mae", "eval_tags_f1", "train_loss", "predict_stars_accuracy"} <= set(
        metrics
    )
    assert (metrics["train_samples"], metrics["eval_samples"], metrics["predict_samples"]) == (12, 12, 5)
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 5
    assert answers[0]["topic"]["label"] in ["animals", "food", "travel"]


@pytest.fixture
def run_finetune(tmp_path, monkeypatch, caplog):
    """Runs the script in this process, which saves the seconds of its imports; returns what it logged."""

    def run_here(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        caplog.clear()
        finetune.main()
        return caplog.text

    return run_here


@pytest.mark.slow
def test_finetune_on_json_lines(encoders, tmp_path, run_finetune):
    rows = make_rows(tmp_path / "data")
    for row in rows:
        row["caption"] = row.pop("text")
        image = row.pop("image")
        row["photo"] = [image, "pictures/1.png"] if image else []
    train_file = write_jsonl(tmp_path / "rows.jsonl", rows)
    tasks = [
        {"kind": "classification", "name": "subject", "column": "topic", "labels": ["travel", "food", "animals"]},
        {"kind": "multi_label", "name": "tags", "loss_weight": 0.5},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    logged = run_finetune(
        *common(encoders, tmp_path / "out"), "--train_file", train_file, "--image_root", tmp_path / "data",
        "--text_column", "caption", "--image_column", "photo", "--tasks", tmp_path / "tasks.json",
        "--max_train_samples", 8, "--validation_fraction", 0.25, "--fusion_type", "bottleneck",
    )  # fmt: skip
    assert "3 of 12 training rows are held out" in logged
    config = check_checkpoint(tmp_path / "out", ["subject", "tags"]).config
    assert config.fusion_type == "bottleneck"
    assert config.get_tasks()["subject"].labels == ["travel", "food", "animals"]
    assert config.get_tasks()["tags"].loss_weight == 0.5
    metrics = json.loads((tmp_path / "out/all_results.json").read_text())
    assert (metrics["train_samples"], metrics["eval_samples"]) == (8, 3)


@pytest.mark.slow
def test_finetune_on_an_image_folder(encoders, tmp_path, run_finetune):
    for split, count in {"train": 12, "validation": 4}.items():
        folder = tmp_path / "photos" / split
        rows = make_rows(folder, count)
        for i, row in enumerate(rows):
            row["file_name"] = f"pictures/{i}.png"
            del row["image"], row["tags"]
        write_csv(folder / "metadata.csv", rows)
    command = [
        *common(encoders, tmp_path / "out"), "--dataset_name", tmp_path / "photos", "--tasks",
        "topic:classification,score:regression",
    ]  # fmt: skip
    run_finetune(*command)
    check_checkpoint(tmp_path / "out", ["topic", "score"])
    assert json.loads((tmp_path / "out/all_results.json").read_text())["eval_samples"] == 4

    # The same command again goes on where training stopped.
    command[command.index("--max_steps") + 1] = 3
    assert f"Resuming from {tmp_path / 'out/checkpoint-2'}" in run_finetune(*command)
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.slow
def test_finetune_labels_words(encoders, tmp_path, run_finetune):
    rows = [
        {"text": "the red dog", "image": None, "colours": "O COLOUR O"},
        {"text": "a cat", "image": None, "colours": "O O"},
    ]
    train_file = write_csv(tmp_path / "train.csv", rows * 4)
    run_finetune(
        *common(encoders, tmp_path / "out"), "--train_file", train_file, "--tasks", "colours:token_classification",
        "--test_file", train_file, "--do_predict",
    )  # fmt: skip
    model = check_checkpoint(tmp_path / "out", ["colours"])
    assert model.config.get_tasks()["colours"].labels == ["COLOUR", "O"]
    answers = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [len(answer["colours"]) for answer in answers] == [3, 2] * 4


@pytest.mark.slow
def test_finetune_knows_all_labels_and_measures_the_trained_model(encoders, tmp_path, run_finetune):
    rows = [{"text": "the red dog", "image": None, "mood": mood} for mood in ["None", "NA", "null", *"abcdefg"]]
    train_file = write_csv(tmp_path / "train.csv", rows)
    command = [
        *common(encoders, tmp_path / "out"), "--train_file", train_file, "--tasks", "mood:classification",
        "--validation_fraction", 0.5, "--max_train_samples", 1,
    ]  # fmt: skip
    run_finetune(*command)
    model = check_checkpoint(tmp_path / "out", ["mood"])
    assert model.config.get_tasks()["mood"].labels == ["NA", "None", *"abcdefg", "null"]
    measured = json.loads((tmp_path / "out/eval_results.json").read_text())["eval_mood_loss"]
    command.remove("--do_train")
    run_finetune(*command)
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["eval_mood_loss"] == pytest.approx(measured)
    command[command.index("--output_dir") + 1] = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="elsewhere holds no model to measure; add --do_train to train one"):
        run_finetune(*command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text_column", "caption"], "have no column 'caption'; set --text_column to one of 'text', 'image'"),
        (
            ["--image_column", "photo"],
            "have no column 'photo'; set --image_column (or --video_column) to one of 'text', 'image'",
        ),
        (["--tasks", "mood:classification"], "have no column 'mood' for task 'mood'"),
        (["--tasks", "topic"], "--tasks must read 'name:kind,name:kind,...'"),
        (["--tasks", "topic:sorting"], "Unknown task kind 'sorting'"),
        (["--tasks", "score:classification"], "numbers that are not whole"),
        (["--validation_file", "rows.xlsx"], "must end in one of .csv, .json, .jsonl, .parquet"),
        (["--validation_file", "none.csv"], "none.csv does not exist"),
        (["--dataset_name", "photos"], "either --train_file or --dataset_name"),
    ],
)
def test_finetune_says_what_is_wrong(tmp_path, monkeypatch, options, message):
    train_file = write_csv(tmp_path / "train.csv", make_rows(tmp_path))
    arguments = ["--train_file", str(train_file), "--tasks", "topic:classification", *options]
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--text", "t", "--vision", "v", "--output_dir", "o", *arguments])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(ValueError, match=r".") as error:
        finetune.main()
    assert message in str(error.value)
