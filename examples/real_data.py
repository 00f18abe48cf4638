"""
What the builders of real data sets share: drawing, families of near-duplicates, splits, missing cells, tables.

The builders are `stamps/build_dataset.py` and `emoji/build_styles.py`; this file is no script of its own.
"""

import argparse
import importlib.util
import io
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
from PIL import Image, ImageOps
from sklearn.model_selection import StratifiedGroupKFold


class InputError(Exception):
    """Something that a script needs is not there; the message says what, and how to get it."""


def import_script(path: Path) -> ModuleType:
    """The script as a module; scripts of different folders may have the same name."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python script.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def draw_files(files: Sequence[Path], size: int) -> list[bytes]:
    """
    A PNG file for each PNG or SVG: RGB, on white, at most `size` pixels in height and width; PNGs are not enlarged.

    Raises:
        InputError: `rsvg-convert` is not installed and there are SVGs, or a file cannot be drawn.
    """
    if any(file.suffix == ".svg" for file in files) and shutil.which("rsvg-convert") is None:
        raise InputError("rsvg-convert is not installed; get it by: apt install librsvg2-bin")
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda file: _draw(file, size), files))


def _draw(file: Path, size: int) -> bytes:
    try:
        if file.suffix == ".svg":
            command = ["rsvg-convert", "--keep-aspect-ratio", "--width", str(size), "--height", str(size), str(file)]
            png = subprocess.run(command, capture_output=True, check=True).stdout
            picture = Image.open(io.BytesIO(png)).convert("RGBA")
        else:
            picture = Image.open(file).convert("RGBA")
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"{file} cannot be drawn: {error}") from error
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    drawn = Image.new("RGB", picture.size, "white")
    drawn.paste(picture, mask=picture.getchannel("A"))
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return buffer.getvalue()


# Words that tell only recoloured drawings apart.
COLOURS = {
    *("black", "blue", "bright", "brown", "colorful", "colourful", "dark", "gold", "golden", "gray", "green", "grey"),
    *("light", "orange", "pink", "purple", "red", "silver", "violet", "white", "yellow"),
}
_ARTICLES = {"a", "an", "the"}


def caption_key(text: str) -> str:
    """The same for captions that differ in case, punctuation, articles, numbers and colours only ("A red hat.")."""
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", text).casefold())
    # "The letter a." is not "The letter b.": a caption's last word is never left out.
    kept = [word for word in words[:-1] if word not in _ARTICLES | COLOURS] + words[-1:]
    return " ".join(kept) or unicodedata.normalize("NFKC", text).casefold()


# Height and width of the thumbnails that are compared, their middle part, and how alike twins are (correlations).
_THUMBNAIL, _MIDDLE = 24, slice(5, 19)
_CLEAR_EDGE = 60
_SAME_GREY, _SAME_EDGES, _SAME_MIDDLE = 0.96, 0.9, 0.5


def find_twins(pictures: Sequence[bytes]) -> list[tuple[int, int]]:
    """
    Pairs of pictures that are nearly the same, or mirror images, or nearly so but for their colours.

    Each picture is cut to what is drawn, reduced to 24 x 24 pixels, and compared with all others and their mirror
    images: the greys (same colours) or the edges (other colours) must correlate, and height by width must be alike.
    The edges of the middle must correlate too: two coins have the same outline, but are no twins.
    """
    greys, edges, ratios = [], [], []
    for picture in pictures:
        # Inverted, so that the white around the drawing is 0.
        drawn = ImageOps.invert(Image.open(io.BytesIO(picture)).convert("RGB"))
        drawn = drawn.crop(drawn.convert("L").point(lambda value: 255 * (value > 8)).getbbox())
        ratios.append(np.log(drawn.height / drawn.width))
        values = np.asarray(drawn.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=float)
        greys.append(values.mean(axis=2))
        # An edge counts as one whatever colours it is between.
        steepness = np.linalg.norm(np.stack(np.gradient(values, axis=(0, 1))), axis=(0, 3))
        edges.append(steepness.clip(max=_CLEAR_EDGE))
    stacks = [(np.stack(greys), _SAME_GREY), (np.stack(edges), _SAME_EDGES)]
    middle = np.stack(edges)[:, _MIDDLE, _MIDDLE]
    twins = np.zeros((len(pictures), len(pictures)), dtype=bool)
    for flip in (lambda stack: stack, lambda stack: stack[:, :, ::-1], lambda stack: stack[:, ::-1]):
        same = np.any([_correlation(stack, flip(stack)) > bound for stack, bound in stacks], axis=0)
        twins = twins | (same & (_correlation(middle, flip(middle)) > _SAME_MIDDLE))
    twins = twins & (np.abs(np.subtract.outer(ratios, ratios)) < 0.1)
    return [(int(i), int(j)) for i, j in np.argwhere(twins) if i < j]


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(pictures, height, width) twice -> (pictures, pictures); two flat pictures have 1."""

    def unit(stack: np.ndarray) -> np.ndarray:
        flat = stack.reshape(len(stack), -1)
        flat = flat - flat.mean(axis=1, keepdims=True)
        # One more dimension, which only flat pictures have.
        flat = np.column_stack([flat, np.where(np.abs(flat).max(axis=1) < 1, 1e6, 0)])
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    return unit(first) @ unit(second).T


def join_families(
    names: Sequence[str], keys: Iterable[Sequence[Hashable]], pairs: Iterable[tuple[int, int]]
) -> list[str]:
    """
    One family per row: that of all rows which share a key or are a pair, directly or through others.

    Args:
        names: one name per row; a family is called by the first of its names.
        keys: sequences of one key per row.
        pairs: row numbers.
    """
    parent = list(range(len(names)))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    links = list(pairs)
    for column in keys:
        first: dict[Hashable, int] = {}
        links += [(first.setdefault(key, row), row) for row, key in enumerate(column)]
    for i, j in links:
        low, high = sorted((find(i), find(j)), key=lambda row: names[row])
        parent[high] = low
    return [names[find(row)] for row in range(len(names))]


def split_rows(families: Sequence[str], labels: Sequence[str], seed: int = 0) -> list[str]:
    """
    "train" (about 60 % of the rows), "validation" or "test" (20 % each) for each row.

    No family is in two splits; the splits have about the same share of every label.
    """
    folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=seed)
    parts = [rows for _, rows in folds.split(families, labels, families)]
    # The largest families always go to the first folds, so which fold is the test split changes with the seed.
    random.Random(seed).shuffle(parts)
    split = np.full(len(families), "train", dtype=object)
    split[parts[0]] = "test"
    split[parts[1]] = "validation"
    return split.tolist()


def remove_cells(
    data: datasets.DatasetDict,
    seed: int,
    missing_images: float | Mapping[str, float],
    missing_texts: float | Mapping[str, float],
    missing_labels: float,
    label: str,
) -> datasets.DatasetDict:
    """
    Empties these shares of the cells, chosen at random; no row loses both its text and its picture.

    Args:
        missing_images: one share for all splits, or split -> share.
        missing_texts: the same.
        missing_labels: share of the training rows; the other splits keep all their labels.
        label: column of the labels.

    Raises:
        ValueError: a share is not between 0 and 1, or those of texts and pictures are more than 1 together.
    """
    emptied = datasets.DatasetDict()
    for name, part in data.items():
        images = missing_images.get(name, 0) if isinstance(missing_images, Mapping) else missing_images
        texts = missing_texts.get(name, 0) if isinstance(missing_texts, Mapping) else missing_texts
        for what, share in (("images", images), ("texts", texts), ("labels", missing_labels)):
            if not 0 <= share <= 1:
                raise ValueError(f"missing_{what} must be between 0 and 1, but is {share}.")
        if images + texts > 1:
            raise ValueError("missing_images and missing_texts must not exceed 1 together: each row keeps one of them.")
        order = random.Random(f"{seed}/{name}").sample(range(len(part)), len(part))
        without_image = order[: round(images * len(part))]
        # From the other end, so that the two do not meet; rounding up both could make them.
        without_text = order[max(len(without_image), len(part) - round(texts * len(part))) :]
        labels = missing_labels if name == "train" else 0
        without_label = random.Random(f"{seed}/{name}/labels").sample(range(len(part)), round(labels * len(part)))
        table = part.cast_column("image", datasets.Image(decode=False)).to_list()
        for column, rows in (("image", without_image), ("text", without_text), (label, without_label)):
            for row in rows:
                table[row][column] = None
        emptied[name] = datasets.Dataset.from_list(table, features=part.features)
    return emptied


def write(data: datasets.DatasetDict, folder: Path, file_format: str = "parquet") -> None:
    """
    Writes `<split>.parquet`, or `<split>.csv` and `pictures/<name>.png`.

    The column `image` of a CSV file holds paths that are relative to its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in data.items():
        if file_format == "parquet":
            part.to_parquet(folder / f"{name}.parquet")
            continue
        table = part.cast_column("image", datasets.Image(decode=False)).to_list()
        for row in table:
            if row["image"] is not None:
                path = Path("pictures") / f"{row['name']}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(row["image"]["bytes"])
                row["image"] = path.as_posix()
        features = datasets.Features({**part.features, "image": datasets.Value("string")})
        datasets.Dataset.from_list(table, features=features).to_csv(folder / f"{name}.csv")


def describe(data: datasets.DatasetDict, label: str) -> str:
    lines = []
    for name, part in data.items():
        counts = Counter(value for value in part[label] if value is not None)
        images = sum(image is not None for image in part.cast_column("image", datasets.Image(decode=False))["image"])
        lines.append(
            f"{name}: {len(part):,} rows in {len(set(part['family'])):,} families, {images:,} with a picture, "
            f"{sum(text is not None for text in part['text']):,} with a text, {sum(counts.values()):,} with a label: "
            f"{', '.join(f'{value} {count:,}' for value, count in counts.most_common())}"
        )
    return "\n".join(lines)


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seeds the split and what is missing (%(default)s)")
    for name, share, where in (("images", 0.1, ""), ("texts", 0.05, ""), ("labels", 0.05, " of the training rows")):
        parser.add_argument(
            f"--missing_{name}", type=float, default=share, help=f"share{where} without them (%(default)s)"
        )
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet", help="of the tables (%(default)s)")
