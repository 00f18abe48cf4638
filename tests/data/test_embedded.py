"""The embedded data set: its tables, its limits, and what separates its splits."""

import hashlib
import io
import itertools
import os
import platform
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import datasets
import numpy as np
import PIL
import pytest
from PIL import Image

from mm_transformers.data.embedded import (
    GRID,
    SENSES,
    TASK_LABELS,
    TRANSLATIONS,
    best_possible_accuracy,
    draw_row_specs,
    load_demo_dataset,
)
from mm_transformers.data.embedded.brush import Variant
from mm_transformers.data.embedded.drawing import SCENES, draw_picture, drawing_variants
from mm_transformers.data.embedded.wording import remark_pool, write_message


SIZES = dict(train_size=30, validation_size=20, test_size=20)
DRAWINGS = "14a97dc550792dbe30d9cc183ee807517e4b1387e7534e58915369163ddc4352"
# The rules once more, as one would tell them: word, place, topic.
TOPICS = """
    bill nature animals, bill town money, stock nature animals, stock town money, buck nature animals, buck town money,
    crane nature animals, crane town technology, bug nature animals, bug town technology, web nature animals,
    web town technology, bank nature nature, bank town money, branch nature nature, branch town money,
    mint nature nature, mint town money, bulb nature nature, bulb town technology, range nature nature,
    range town technology, plant nature nature, plant town technology
"""


def sentiment_of(remark: str, state: str) -> str:
    if remark == "factual":
        return "neutral"
    if state == "ruined":
        return "negative"
    return "positive" if remark == "cheerful" else "neutral"


@pytest.fixture(scope="module")
def small():
    return load_demo_dataset(**SIZES)


def stored_bytes(rows: datasets.Dataset) -> list[bytes]:
    return [image["bytes"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]]


def guess_by_counting(seen: list, labels: list) -> float:
    """Accuracy of the most frequent label given what is seen."""
    table = defaultdict(Counter)
    for key, label in zip(seen, labels, strict=True):
        table[key][label] += 1
    return sum(counts.most_common(1)[0][1] for counts in table.values()) / len(labels)


def test_labels_follow_the_rules():
    topics = {tuple(entry.split()[:2]): entry.split()[2] for entry in TOPICS.split(",")}
    assert {(cell.word, cell.place) for cell in GRID} == set(topics)
    for cell in GRID:
        labels = {name: cell.labels[name] for name in TASK_LABELS}
        assert labels == {
            "sentiment": sentiment_of(cell.remark, cell.state),
            "topic": topics[cell.word, cell.place],
            "intent": cell.intent,
        }
    # 24 senses, 4 slots of remarks, 3 intents, 2 states
    assert len(GRID) == len(set(GRID)) == 24 * 4 * 3 * 2


def test_every_sense_has_its_own_german_noun():
    for word, senses in SENSES.items():
        first, second = senses.values()
        assert first.topic != second.topic, word
        assert first.german != second.german, word
        assert all(s.german.split()[0] in ("der", "die", "das") for s in senses.values())
        assert all(re.match(r"le |la |l'", s.french) for s in senses.values())


def test_translations_carry_the_sense_and_the_intent():
    """Written out by hand for one word, and for all of them by what distinguishes the forms."""
    crane = {(cell.place, cell.intent): cell.labels for cell in GRID if cell.word == "crane"}
    assert {key: labels["german"] for key, labels in crane.items()} == {
        ("nature", "statement"): "Das ist der Kranich.", ("town", "statement"): "Das ist der Kran.",
        ("nature", "question"): "Ist das der Kranich?", ("town", "question"): "Ist das der Kran?",
        ("nature", "request"): "Der Kranich, bitte.", ("town", "request"): "Der Kran, bitte.",
    }  # fmt: skip
    bulb = {(cell.place, cell.intent): cell.labels["french"] for cell in GRID if cell.word == "bulb"}
    assert bulb["town", "statement"] == "C'est l'ampoule."
    assert bulb["town", "request"] == "L'ampoule, s'il vous plaît."
    assert bulb["nature", "question"] == "Est-ce le bulbe ?"
    for cell in GRID:
        for language in TRANSLATIONS:
            text = cell.labels[language]
            assert getattr(cell.sense, language).lower() in text.lower()
            assert text.endswith("?") == (cell.intent == "question")
            assert text[0].isupper()


@pytest.mark.slow
def test_limits_match_closed_forms_and_counts_over_random_rows():
    limits = best_possible_accuracy()
    assert limits == {
        # From the text: 1/2 for the half that is cheerful, 1/2 for gloomy, 1 for factual. From the picture: fine is
        # positive in 2 of 4, ruined is negative in 3 of 4. Negative and neutral are 3 of 8 each.
        "sentiment": {"text": 5 / 8, "image": 5 / 8, "both": 1.0, "majority": 3 / 8},
        # Two topics to each word and to each place, four in all.
        "topic": {"text": 1 / 2, "image": 1 / 2, "both": 1.0, "majority": 1 / 4},
        "intent": {"text": 1.0, "image": pytest.approx(1 / 3), "both": 1.0, "majority": pytest.approx(1 / 3)},
        # 12 words with 2 nouns each in 3 forms; only the two cranes have one noun in French.
        "german": {"text": 1 / 2, "image": pytest.approx(1 / 36), "both": 1.0, "majority": pytest.approx(1 / 72)},
        "french": {"text": 13 / 24, "image": pytest.approx(1 / 36), "both": 1.0, "majority": pytest.approx(1 / 36)},
    }

    # Independently: factors drawn at random, the best guess from each part learnt by counting, and tried on other rows.
    rng = random.Random(0)
    senses = [tuple(entry.split()) for entry in TOPICS.split(",")]

    def draw_rows() -> list[tuple[dict, dict]]:
        rows = []
        for _ in range(30_000):
            word, place, topic = rng.choice(senses)
            remark = rng.choices(["cheerful", "gloomy", "factual"], [2, 1, 1])[0]
            state, intent = rng.choice(["fine", "ruined"]), rng.choice(TASK_LABELS["intent"])
            text, image = (word, remark, intent), (place, state)
            labels = {"sentiment": sentiment_of(remark, state), "topic": topic, "intent": intent}
            rows.append(({"text": text, "image": image, "both": (text, image), "majority": None}, labels))
        return rows

    training, others = draw_rows(), draw_rows()
    for task, view in itertools.product(TASK_LABELS, ("text", "image", "both", "majority")):
        table = defaultdict(Counter)
        for seen, labels in training:
            table[seen[view]][labels[task]] += 1
        hits = [table[seen[view]].most_common(1)[0][0] == labels[task] for seen, labels in others]
        assert np.mean(hits) == pytest.approx(limits[task][view], abs=0.01), (task, view)


@pytest.mark.parametrize(("split", "size"), [("train", 4032), ("train", 4000), ("validation", 576), ("test", 1152)])
def test_splits_keep_to_the_limits(split, size):
    cells = [spec.cell for spec in draw_row_specs(split, size, seed=3)]
    assert len(cells) == size
    for task, limit in best_possible_accuracy().items():
        answers = [cell.labels[task] for cell in cells]
        for view, seen in (
            ("text", [(cell.word, cell.remark, cell.intent) for cell in cells]),
            ("image", [(cell.place, cell.state) for cell in cells]),
            ("majority", [None for _ in cells]),
        ):
            assert guess_by_counting(seen, answers) == pytest.approx(limit[view], abs=0.01), (task, view)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_even_knowing_every_row_one_part_cannot_beat_its_limit(split):
    """Minimal pairs: a table of all messages (or all drawings) of the split with their labels is no help."""
    specs = draw_row_specs(split, 2 * len(GRID), seed=5)
    limits = best_possible_accuracy()
    for task in ("sentiment", "topic", "german", "french"):
        answers = [spec.cell.labels[task] for spec in specs]
        assert guess_by_counting([spec.text_seed for spec in specs], answers) == limits[task]["text"]
        if task in TASK_LABELS:  # a drawing appears with four words, so a table of drawings tells which twelfth it is
            assert guess_by_counting([spec.image_seed for spec in specs], answers) == limits[task]["image"]


def test_columns_and_their_types(small):
    assert list(small) == ["train", "validation", "test"]
    assert {name: len(rows) for name, rows in small.items()} == {"train": 30, "validation": 20, "test": 20}
    expected = {"image": datasets.Image(), "text": datasets.Value("string")}
    for name, rows in small.items():
        assert rows.features == datasets.Features(
            expected | {column: datasets.Value("string") for column in (*TASK_LABELS, *TRANSLATIONS)}
        )
        assert rows.split == name
        for row in rows:
            assert row["image"].mode == "RGB"
            assert row["image"].size == (64, 64)
            assert all(row[task] in labels for task, labels in TASK_LABELS.items())
        assert all(data.startswith(b"\x89PNG") for data in stored_bytes(rows))


def test_labels_of_the_rows_agree_with_their_words(small):
    """Read back from the text alone: the ambiguous word and the intent."""
    for row in itertools.chain(*small.values()):
        [word] = set(re.findall(r"\w+", row["text"])) & set(SENSES)
        assert row["topic"] in {sense.topic for sense in SENSES[word].values()}
        intent = "question" if "?" in row["text"] else "statement"
        if re.search(r"\bplease\b|\bPlease\b", row["text"]):
            intent = "request"
        assert row["intent"] == intent


def test_every_label_is_in_each_split():
    for split, size in (("train", 4032), ("validation", 576), ("test", 1152)):
        specs = draw_row_specs(split, size, seed=0)
        for task, labels in TASK_LABELS.items():
            assert {spec.cell.labels[task] for spec in specs} == set(labels)


def test_same_seed_same_bytes(small):
    random.seed(1)  # global random state must not matter
    np.random.seed(1)
    again = load_demo_dataset(**SIZES)
    for name, rows in small.items():
        assert stored_bytes(rows) == stored_bytes(again[name])
        assert rows.remove_columns("image").to_list() == again[name].remove_columns("image").to_list()


def test_same_bytes_in_another_process():
    script = (
        "import hashlib\n"
        "from mm_transformers.data.embedded import draw_row_specs, render_image, render_text\n"
        "digest = hashlib.sha256()\n"
        "for spec in draw_row_specs('test', 40, seed=2):\n"
        "    digest.update(render_text(spec).encode() + render_image(spec, 32) + repr(spec.cell.labels).encode())\n"
        "result = digest.hexdigest()\n"
    )
    here: dict[str, str] = {}
    exec(script, here)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script + "print(result)"]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.strip() == here["result"]


@pytest.mark.skipif(
    PIL.__version__ != "12.3.0" or platform.machine() != "x86_64", reason="Other libraries may round differently."
)
def test_the_drawings_stay_the_same():
    """The figures of the demo in the docs are of these very pictures: after a change, run it again."""
    digest = hashlib.sha256()
    for setting, state, layout, style in itertools.product(SCENES, ("fine", "ruined"), range(4), range(3)):
        picture = draw_picture(setting, state, Variant(style, layout, style), random.Random(layout), 32)
        digest.update(picture.tobytes())
    assert digest.hexdigest() == DRAWINGS


def test_other_seed_other_rows(small):
    other = load_demo_dataset(**SIZES, seed=1)
    for name in small:
        assert not set(stored_bytes(small[name])) & set(stored_bytes(other[name]))
        assert list(small[name]["text"]) != list(other[name]["text"])


def test_test_split_holds_out_wordings_and_drawings():
    assert not set(drawing_variants(False)) & set(drawing_variants(True))
    for remark in ("cheerful", "gloomy", "factual"):
        assert not set(remark_pool(remark, False)) & set(remark_pool(remark, True))

    def carriers(held_out: bool) -> set[str]:
        rng = random.Random(0)
        factors = itertools.product(("cheerful", "gloomy", "factual"), TASK_LABELS["intent"], range(700))
        return {write_message("thing", remark, intent, rng, held_out) for remark, intent, _ in factors}

    training, held_out = carriers(False), carriers(True)
    assert not training & held_out
    words = [{w.lower() for text in texts for w in re.findall(r"\w+", text)} for texts in (training, held_out)]
    assert words[1] <= words[0], "a held-out wording uses a word that training never shows"

    # The splits do draw from them.
    specs = {split: draw_row_specs(split, 576, seed=0) for split in ("train", "validation", "test")}
    assert {split: {spec.held_out for spec in rows} for split, rows in specs.items()} == {
        "train": {False},
        "validation": {False},
        "test": {True},
    }


def test_wording_is_the_same_whatever_the_picture():
    """Paired rows differ in the picture and share the message, to the letter."""
    data = load_demo_dataset(train_size=1, validation_size=576, test_size=1, image_size=8)["validation"]
    topics, sentiments = defaultdict(set), defaultdict(set)
    for row in data:
        topics[row["text"]].add(row["topic"])
        sentiments[row["text"]].add(row["sentiment"])
    assert all(len(found) == 2 for found in topics.values())
    assert any(len(found) == 2 for found in sentiments.values())


@pytest.mark.parametrize("image_size", [32, 100])
def test_image_size_is_honoured(image_size):
    rows = load_demo_dataset(train_size=4, validation_size=1, test_size=1, image_size=image_size)["train"]
    assert {row["image"].size for row in rows} == {(image_size, image_size)}


def test_larger_pictures_show_the_same_drawing():
    variant = drawing_variants(False)[0]
    for setting, state in itertools.product(SCENES, ("fine", "ruined")):
        small, large = (draw_picture(setting, state, variant, random.Random(7), size) for size in (48, 192))
        reduced = np.asarray(large.reduce(4), float)
        other = draw_picture(setting, state, variant, random.Random(8), 48)
        same, different = (np.abs(np.asarray(picture, float) - reduced).mean() for picture in (small, other))
        assert same < 0.6 * different, (setting, state)


def test_pictures_of_one_kind_vary():
    for setting, state in itertools.product(SCENES, ("fine", "ruined")):
        drawn = set()
        for seed in range(4):
            rng = random.Random(seed)
            drawn.add(draw_picture(setting, state, rng.choice(drawing_variants(False)), rng, 32).tobytes())
        assert len(drawn) == 4


@pytest.mark.parametrize("name", ["train_size", "validation_size", "test_size", "image_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be a positive integer, but is {value}.$"):
        load_demo_dataset(**{**SIZES, name: value})


def test_stored_file_is_the_picture(small):
    [data] = stored_bytes(small["train"].select([0]))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(small["train"][0]["image"]))
