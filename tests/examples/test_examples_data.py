"""The builders of real data sets in `examples/`, on small folders made here: no stamps, no font, no npm needed."""

import csv
import io
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scripts import EXAMPLES, run


sys.path.insert(0, str(EXAMPLES))
import real_data


BUILD_STAMPS, BUILD_STYLES = EXAMPLES / "stamps/build_dataset.py", EXAMPLES / "emoji/build_styles.py"
stamps = real_data.import_script(BUILD_STAMPS)
styles = real_data.import_script(BUILD_STYLES)

CLASSES = ("animals", "clothes", "food")


def drawing(seed: int, colours: tuple = ((200, 30, 30), (30, 30, 200), (20, 20, 20)), size: int = 64) -> Image.Image:
    """Blocks at random, transparent around them; the same seed draws the same blocks in any colours."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, len(colours) + 1, (8, 8))
    blocks[0] = blocks[-1] = 1  # so that what is drawn has the same height and width in all
    pixels = np.array([*((*colour, 255) for colour in colours), (0, 0, 0, 0)], dtype=np.uint8)[blocks]
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def add_stamp(folder: Path, name: str, picture: Image.Image, caption: str | None = None, **others: str) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture))
    if caption is not None:
        lines = [caption, *(f"{code}.utf8={text}" for code, text in others.items())]
        path.with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def stamps_dir(tmp_path_factory) -> Path:
    """Twenty stamps that have nothing in common in each of three classes, some twins, and what must be left out."""
    folder = tmp_path_factory.mktemp("stamps")
    for i, category in enumerate(CLASSES):
        for j in range(20):
            word = "".join(random.Random(f"{i}/{j}").choices("abcdefghijklmnopqrstuvwxyz", k=9))
            add_stamp(folder, f"{category}/{word}", drawing(100 * i + j), f"A {word}.", de=f"Ein {word}.", ja="あ")
    crow = drawing(1000)
    add_stamp(folder, "animals/birds/crow", crow, "A crow.", de="Eine Krähe.", en_GB="A crow.")
    add_stamp(folder, "animals/birds/crow_mirror", ImageOps.mirror(drawing(1000)))  # has no caption of its own
    # Found by the caption alone: other drawings, other classes.
    add_stamp(folder, "animals/spider", drawing(1001), "A spider.")
    add_stamp(folder, "clothes/spooky", drawing(1002), "a  SPIDER!")
    add_stamp(folder, "clothes/hats/one", drawing(1003), "A red hat.")
    add_stamp(folder, "clothes/hats/two", drawing(1004), "A blue hat.")
    # By the file's name alone.
    add_stamp(folder, "food/pear-1", drawing(1005), "Eat it.")
    add_stamp(folder, "food/fruit/green_pear2", drawing(1006), "Sweet and juicy.")
    # By the picture alone: mirrored, in other colours, enlarged.
    add_stamp(folder, "food/muffin", drawing(1007), "Something to eat.")
    add_stamp(folder, "food/cupcake", ImageOps.mirror(drawing(1007)), "Baked yesterday.")
    add_stamp(folder, "clothes/coat", drawing(1008), "Keeps you warm.")
    recoloured = drawing(1008, colours=((30, 200, 200), (200, 200, 30), (20, 20, 90)), size=96)
    add_stamp(folder, "clothes/jacket", recoloured, "With four buttons.")
    # Left out: no caption, and a folder that is no class.
    add_stamp(folder, "animals/nameless", drawing(1009))
    add_stamp(folder, "military/sword", drawing(1010), "A long sword.")
    return folder


@pytest.fixture(scope="module")
def pool(stamps_dir) -> datasets.Dataset:
    return stamps.build_pool(stamps_dir)


def undecoded(rows: datasets.Dataset, column: str = "image") -> list[dict | None]:
    return rows.cast_column(column, datasets.Image(decode=False))[column]


# real_data.py


def test_twins_share_a_family_and_others_do_not(pool):
    members: dict[str, set[str]] = {}
    for name, family in zip(pool["name"], pool["family"], strict=True):
        members.setdefault(family, set()).add(name)
    assert sorted(sorted(names) for names in members.values() if len(names) > 1) == [
        ["animals/birds/crow", "animals/birds/crow_mirror"],
        ["animals/spider", "clothes/spooky"],
        ["clothes/coat", "clothes/jacket"],
        ["clothes/hats/one", "clothes/hats/two"],
        ["food/cupcake", "food/muffin"],
        ["food/fruit/green_pear2", "food/pear-1"],
    ]
    assert len(pool) == 3 * 20 + 12


@pytest.mark.parametrize("flip", [lambda picture: picture, ImageOps.mirror, ImageOps.flip])
@pytest.mark.parametrize("size", [40, 64, 200])
def test_twins_are_found_in_any_size_and_direction(flip, size):
    pictures = [png(drawing(seed).convert("RGB")) for seed in range(6)]
    pictures.append(png(flip(drawing(3, size=size)).convert("RGB")))
    assert real_data.find_twins(pictures) == [(3, 6)]


def test_discs_of_different_things_are_no_twins():
    """Coins, planets and balls have the same outline."""
    rows, columns = np.ogrid[:64, :64]
    mask = Image.fromarray((255 * ((rows - 31.5) ** 2 + (columns - 31.5) ** 2 < 31**2)).astype(np.uint8))
    discs = []
    for seed in range(4):
        disc = Image.new("RGB", (64, 64), "white")
        blocks = np.random.default_rng(seed).integers(60, 140, (5 + seed, 5 + seed, 3)).astype(np.uint8)
        disc.paste(Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST), mask=mask)
        discs.append(png(disc))
    assert real_data.find_twins(discs) == []


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))),
            st.lists(st.integers(0, 4), min_size=n, max_size=n),
        )
    )
)
def test_families_are_the_connected_components(case):
    n, pairs, keys = case
    names = [f"{i:02}" for i in range(n)]
    families = real_data.join_families(names, [[f"key {key}" for key in keys]], pairs)
    links = pairs + [(i, j) for i in range(n) for j in range(n) if keys[i] == keys[j]]
    i, j = zip(*links, strict=True)
    _, components = connected_components(coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)
    # A family is called by the first name of its component.
    assert families == [names[components.tolist().index(component)] for component in components]


@pytest.mark.parametrize("seed", range(5))
def test_no_family_and_no_caption_is_on_both_sides_of_a_split(pool, seed):
    data = stamps.load_split(pool, seed, missing_texts=0)
    sizes = {name: len(part) / len(pool) for name, part in data.items()}
    assert sizes == pytest.approx({"train": 0.6, "validation": 0.2, "test": 0.2}, abs=0.04)
    assert sorted(name for part in data.values() for name in part["name"]) == sorted(pool["name"])
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(data[one]["family"]) & set(data[other]["family"])
        captions = [{text.casefold() for text in data[name]["text"]} for name in (one, other)]
        assert not captions[0] & captions[1]
    for category, count in Counter(pool["category"]).items():
        assert data["test"]["category"].count(category) == pytest.approx(count / 5, abs=2)


def test_seeds_give_different_splits_and_one_seed_the_same(pool, tmp_path):
    tests = [set(stamps.load_split(pool, seed)["test"]["name"]) for seed in range(4)]
    assert all(tests[i] != tests[j] for i in range(4) for j in range(i))
    pool.to_parquet(tmp_path / "all.parquet")
    again = stamps.load_split(tmp_path / "all.parquet", 2)
    for name, part in stamps.load_split(pool, 2).items():
        assert undecoded(part) == undecoded(again[name])
        assert part.remove_columns("image").to_list() == again[name].remove_columns("image").to_list()


def test_a_large_family_is_not_always_in_the_same_split():
    families = ["large"] * 20 + [f"single {i}" for i in range(80)]
    where = {real_data.split_rows(families, ["a", "b"] * 50, seed)[0] for seed in range(20)}
    assert where == {"train", "validation", "test"}


@pytest.mark.parametrize(("images", "texts", "labels"), [(0.1, 0.05, 0.05), (0, 0, 0), (0.7, 0.3, 1), (1, 0, 0.5)])
def test_the_shares_are_missing_and_no_row_is_left_empty(pool, images, texts, labels):
    data = stamps.load_split(pool, 0, "plain", images, texts, labels)
    for name, part in data.items():
        has_image = [image is not None for image in undecoded(part)]
        has_text = [text is not None for text in part["text"]]
        assert has_image.count(False) == round(images * len(part))
        assert has_text.count(False) == pytest.approx(texts * len(part), abs=1)
        assert all(map(any, zip(has_image, has_text, strict=True)))
        assert part["category"].count(None) == (round(labels * len(part)) if name == "train" else 0)


def test_missing_pictures_by_split_are_nested(pool):
    little, much = (stamps.load_split(pool, 0, missing_images={"test": share}) for share in (0.3, 0.7))
    assert all(None not in undecoded(much[name]) for name in ("train", "validation"))
    without = [{i for i, image in enumerate(undecoded(data["test"])) if image is None} for data in (little, much)]
    assert without[0] < without[1]
    assert little["test"]["name"] == much["test"]["name"]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (dict(missing_images=1.5), "missing_images must be between 0 and 1, but is 1.5."),
        (dict(missing_labels=-0.1), "missing_labels must be between 0 and 1, but is -0.1."),
        (dict(missing_images=0.6, missing_texts=0.5), "must not exceed 1 together"),
        (dict(variant="easy"), "variant must be 'plain' or 'hard', but is 'easy'."),
    ],
)
def test_wrong_options_are_told(pool, shares, message):
    with pytest.raises(ValueError, match=message):
        stamps.load_split(pool, **shares)


# stamps/build_dataset.py


def test_stamps_are_read(pool):
    rows = {row["name"]: row for row in pool.remove_columns("image").to_list()}
    crow = rows["animals/birds/crow"]
    assert (crow["text"], crow["german"], crow["french"], crow["category"]) == (
        "A crow.", "Eine Krähe.", None, "animals",
    )  # fmt: skip
    assert rows["animals/birds/crow_mirror"]["text"] == "A crow."
    assert {row["category"] for row in rows.values()} == set(CLASSES)
    assert "animals/nameless" not in rows


def test_pictures_are_on_white_and_not_enlarged(pool):
    picture = pool[pool["name"].index("animals/birds/crow")]["image"]
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    expected = Image.new("RGBA", (64, 64), "white")
    expected.alpha_composite(drawing(1000))
    assert picture.tobytes() == expected.convert("RGB").tobytes()


def test_large_pictures_keep_their_shape(tmp_path):
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "wide.png")
    (picture,) = real_data.draw_files([tmp_path / "wide.png"], 224)
    assert Image.open(io.BytesIO(picture)).size == (224, 112)


@pytest.mark.parametrize(
    ("text", "name", "hard"),
    [
        ("A crow.", "animals/birds/crow", "A something."),
        ("A red apple.", "food/fruit/apple_red", "A something."),
        ("A pair of open scissors.", "household/scissors_small", "A pair of open something."),
        ("Two hats and the box.", "clothes/hats/t_box", "Two something and the something."),
        ("A hat worn by a student.", "clothes/mortarboard", "A hat worn by a student."),
        ("A wizard’s hat!", "clothes/hats/wizardhat", "A something!"),
    ],
)
def test_hard_captions_do_not_name_the_object(text, name, hard):
    assert stamps.hard_caption(text, name) == hard


def test_the_hard_variant_differs_in_its_captions_only(pool):
    plain, hard = (stamps.load_split(pool, 1, variant) for variant in ("plain", "hard"))
    for name, part in plain.items():
        assert part["name"] == hard[name]["name"]
        assert [text is None for text in part["text"]] == [text is None for text in hard[name]["text"]]
        assert undecoded(part) == undecoded(hard[name])
    assert hard["train"]["text"].count("A something.") > len(hard["train"]) / 2


@pytest.mark.skipif(shutil.which("rsvg-convert") is None, reason="needs rsvg-convert (apt install librsvg2-bin)")
def test_svg_is_drawn_and_goes_before_png(tmp_path):
    add_stamp(tmp_path, "animals/ant", drawing(0), "An ant.")
    (tmp_path / "animals/ant.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10"><rect width="10" height="10" fill="red"/></svg>'
    )
    picture = stamps.build_pool(tmp_path, size=100)[0]["image"]
    assert picture.size == (100, 50)
    assert (picture.getpixel((25, 25)), picture.getpixel((75, 25))) == ((255, 0, 0), (255, 255, 255))
    (tmp_path / "animals/ant.svg").write_text("no picture")
    with pytest.raises(real_data.InputError, match=r"ant\.svg cannot be drawn"):
        stamps.build_pool(tmp_path)


def test_what_is_not_installed_is_told(tmp_path, monkeypatch):
    with pytest.raises(real_data.InputError, match="apt install tuxpaint-stamps-default"):
        stamps.build_pool(tmp_path)
    add_stamp(tmp_path, "animals/ant", drawing(0), "An ant.")
    (tmp_path / "animals/ant.svg").write_text("<svg/>")
    monkeypatch.setattr(real_data.shutil, "which", lambda name: None)
    with pytest.raises(real_data.InputError, match="apt install librsvg2-bin"):
        stamps.build_pool(tmp_path)


def test_the_script_writes_parquet_and_csv(stamps_dir, tmp_path):
    stamps.main(["--stamps_dir", str(stamps_dir), "--output_dir", str(tmp_path / "data")])
    data = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "validation", "test"}  # all.parquet is no split
    expected = stamps.load_split(tmp_path / "data/all.parquet", 0)
    assert {name: part["name"] for name, part in data.items()} == {
        name: part["name"] for name, part in expected.items()
    }
    stamps.main(["--stamps_dir", str(stamps_dir), "--output_dir", str(tmp_path / "table"), "--format", "csv"])
    for name, part in expected.items():
        with open(tmp_path / f"table/{name}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["text"] or None for row in rows] == part["text"]
        assert [row["category"] or None for row in rows] == part["category"]
        for row, image in zip(rows, undecoded(part), strict=True):
            assert (tmp_path / "table" / row["image"]).read_bytes() == image["bytes"] if image else row["image"] == ""


@pytest.mark.slow
def test_no_stamps_are_told_in_one_line(tmp_path):
    done = run(BUILD_STAMPS, "--stamps_dir", tmp_path / "none", cwd=tmp_path, ok=False)
    assert done.stderr.count("\n") == 1
    assert "apt install tuxpaint-stamps-default" in done.stderr


# emoji/build_styles.py

GROUPS = ("animals & nature", "food & drink")
# The first of thirty code points in a row, all of them emoji with a picture of their own.
FIRST = {"animals & nature": 0x1F400, "food & drink": 0x1F345}


@pytest.fixture(scope="module")
def npm_dir(tmp_path_factory) -> Path:
    """A `node_modules` folder in the form of emojibase-data, emoji-emotion and emoji-datasource-twitter."""
    folder = tmp_path_factory.mktemp("npm") / "node_modules"
    entries = [
        {"hexcode": f"{first + i:X}", "emoji": chr(first + i), "label": f"{GROUPS[order]} {chr(97 + i % 26)}{i}x",
         "group": order, "tags": ["everywhere", f"in {GROUPS[order]}", f"only {first + i}", f"once {first + i}"]}
        for order, first in enumerate(FIRST.values())
        for i in range(30)
    ]  # fmt: skip
    # Words, no letters or numbers: names that differ in a number only are twins.
    for entry, word in zip(entries, random.Random(0).sample(WORDS, len(entries)), strict=True):
        entry["label"] = word
    for language in ("en", "de", "fr", "es", "zh"):
        path = folder / "emojibase-data" / language / "data.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(entries), encoding="utf-8")
    messages = {"groups": [{"order": order, "message": name} for order, name in enumerate(GROUPS)]}
    (folder / "emojibase-data/en/messages.json").write_text(json.dumps(messages), encoding="utf-8")
    (folder / "emoji-emotion").mkdir()
    (folder / "emoji-emotion/index.js").write_text("export const emojiEmotion = []\n")
    pictures = folder / "emoji-datasource-twitter/img/twitter/64"
    pictures.mkdir(parents=True)
    for entry in entries[1:]:  # the first is not drawn in this style
        (pictures / f"{entry['hexcode'].lower()}.png").write_bytes(png(drawing(10_000 + ord(entry["emoji"]))))
    return folder


WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in ("aro", "elu", "imo") for c in ("t", "s", "p")]


@pytest.fixture(scope="module")
def style_pool(npm_dir) -> datasets.Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(styles.build_dataset, "load_font", lambda path: None)
        patch.setattr(
            styles.build_dataset, "draw", lambda font, emoji, size: png(drawing(ord(emoji[0])).convert("RGB"))
        )
        return styles.build_pool(npm_dir, "twitter")


@pytest.mark.parametrize("seed", range(3))
def test_styles_share_no_keyword_and_no_family(style_pool, seed):
    data = styles.load_split(style_pool, seed, missing_images=0, missing_texts=0, missing_labels=0)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for column in ("text", "family"):
            assert not set(data[one][column]) & set(data[other][column])
    pictures = {
        column: dict(zip(style_pool["hexcode"], undecoded(style_pool, column), strict=True))
        for column in ("noto", "other")
    }
    for name, part in data.items():
        style, column = ("twitter", "other") if name == "test" else ("noto", "noto")
        for row, image in zip(part["name"], undecoded(part), strict=True):
            folder, hexcode = row.split("/")
            assert (folder, image["bytes"]) == (style, pictures[column][hexcode]["bytes"])
    assert len(style_pool) == 2 * 30 - 1
    assert max(Counter(data["train"]["name"]).values()) == 2


def test_the_same_style_has_the_rows_of_the_test(style_pool):
    data = styles.load_split(style_pool, 0, missing_images=0.3, missing_texts=0.2)
    for column in ("text", "group", "family", "title", "german"):
        assert data["test"][column] == data["same_style"][column]
    test, same = undecoded(data["test"]), undecoded(data["same_style"])
    assert [image is None for image in test] == [image is None for image in same]
    assert all(one["bytes"] != other["bytes"] for one, other in zip(test, same, strict=True) if one)


def test_training_rows_and_keywords_are_limited(style_pool):
    data = styles.load_split(style_pool, 0, rows=10, keywords=1)
    assert len(data["train"]) == 10
    assert max(Counter(data["test"]["name"]).values()) == 1


@given(st.lists(st.tuples(st.lists(st.sampled_from("abcAB"), unique=True), st.sampled_from("xyz"))), st.integers(0, 9))
def test_each_keyword_is_kept_in_one_split(emoji, seed):
    keywords, splits = [words for words, _ in emoji], [split for _, split in emoji]
    kept = styles.share_keywords(keywords, splits, seed)
    owners: dict[str, set[str]] = {}
    for words, split in zip(kept, splits, strict=True):
        for word in words:
            owners.setdefault(word.casefold(), set()).add(split)
    assert set(owners) == {word.casefold() for words in keywords for word in words}
    assert all(len(owner) == 1 for owner in owners.values())
    for words, before, split in zip(kept, keywords, splits, strict=True):
        assert words == [word for word in before if split in owners[word.casefold()]]


def test_a_missing_style_is_told(npm_dir, monkeypatch):
    monkeypatch.setattr(styles.build_dataset, "load_font", lambda path: None)
    with pytest.raises(
        real_data.InputError, match=r"openmoji/color/svg is missing; get it by: npm install .* openmoji@17"
    ):
        styles.build_pool(npm_dir, "openmoji")


def test_the_styles_are_written(style_pool, tmp_path):
    folder = tmp_path / "styles"
    folder.mkdir()
    style_pool.to_parquet(folder / "all.parquet")
    styles.main(["--output_dir", str(folder), "--seed", "1", "--rows", "20", "--missing_images", "0.2"])
    expected = styles.load_split(style_pool, 1, rows=20, missing_images=0.2)
    assert set(expected) == {"train", "validation", "test", "same_style"}
    for name, part in expected.items():
        written = datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(tmp_path / "cache"))
        assert undecoded(written) == undecoded(part)
        assert written.remove_columns("image").to_list() == part.remove_columns("image").to_list()
    # `load_dataset` must not take the same style for a part of the test split.
    data = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in data.items()} == {
        name: len(expected[name]) for name in ("train", "validation", "test")
    }
