"""
Builds a data set of captions and pictures from the stamps of Tux Paint; nothing is downloaded here.

A row is a picture, its caption, and the folder that it comes from (animals, food, town, ...). The splits share no
caption, no drawing in two colours, and no picture and its mirror image.

    apt install tuxpaint-stamps-default librsvg2-bin
    python build_dataset.py --output_dir stamps_data                   # train.parquet, validation.parquet, ...
    python build_dataset.py --output_dir stamps_data --seed 1          # another split of the same pictures
    python build_dataset.py --output_dir stamps_table --format csv     # train.csv, ..., and the picture files
    python build_dataset.py --output_dir stamps_hard --variant hard    # captions that do not name the object

From Python, `load_split("stamps_data/all.parquet", seed=3)` makes another split in a second.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from real_data import (
    COLOURS,
    InputError,
    add_split_arguments,
    caption_key,
    describe,
    draw_files,
    find_twins,
    join_families,
    remove_cells,
    split_rows,
    write,
)


STAMPS_DIR = Path("/usr/share/tuxpaint/stamps")
# Column -> the language's code in the caption files.
LANGUAGES = {"german": "de", "french": "fr", "spanish": "es", "japanese": "ja"}
# Folders that are merged into another class, because they have too few pictures for one of their own.
MERGED = {"sports": "hobbies"}
# Folders of fewer than 13 captioned pictures; "military" and "medical" do not fit another class either.
LEFT_OUT = {"cartoon", "medical", "military", "naturalforces"}
# The largest height and width of a picture, in pixels.
SIZE = 224
# What a masked word becomes in the hard captions.
MASK = "something"

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "category": datasets.Value("string"),
        "name": datasets.Value("string"),
        "family": datasets.Value("string"),
        **{column: datasets.Value("string") for column in LANGUAGES},
    }
)
POOL_FEATURES = datasets.Features({**FEATURES, "hard_text": datasets.Value("string")})


@dataclass
class Stamp:
    """
    Args:
        name: path below the folder of stamps, without the ending, e.g. "animals/birds/crow".
        file: the picture, PNG or SVG.
        text: English caption.
        category: class.
        translations: column name -> caption in that language, `None` where there is none.
    """

    name: str
    file: Path
    text: str
    category: str
    translations: dict[str, str | None]


def read_stamps(folder: Path) -> list[Stamp]:
    """
    All captioned stamps, sorted by name. Of a stamp that is there as SVG and as PNG, the SVG is taken, as Tux Paint
    does. `x_mirror` and `x_flip` have no caption of their own, but that of `x`.
    """
    files = {file.with_suffix(""): file for ending in ("png", "svg") for file in sorted(folder.rglob(f"*.{ending}"))}
    if not files:
        raise InputError(f"{folder} holds no stamps; get them by: apt install tuxpaint-stamps-default")
    stamps = []
    for stem, file in sorted(files.items()):
        top = stem.relative_to(folder).parts[0]
        caption_file = next((path for path in _caption_files(stem) if path.is_file()), None)
        if caption_file is None or top in LEFT_OUT:
            continue
        text, *others = caption_file.read_text(encoding="utf-8").splitlines()
        captions = dict(re.findall(r"^([\w@]+)\.utf8=\s*(\S.*?)\s*$", "\n".join(others), flags=re.MULTILINE))
        stamps.append(
            Stamp(
                name=stem.relative_to(folder).as_posix(),
                file=file,
                text=text.strip(),
                category=MERGED.get(top, top),
                translations={column: captions.get(code) for column, code in LANGUAGES.items()},
            )
        )
    return stamps


def _caption_files(stem: Path) -> list[Path]:
    return [stem.with_name(name + ".txt") for name in (stem.name, re.sub(r"(_mirror|_flip)+$", "", stem.name))]


def stem_key(name: str) -> str:
    """The same for names within one top folder that differ in numbers, colour, and `_mirror` or `_flip` only."""
    words = re.split(r"[\W_]+", re.sub(r"\d+", " ", name.rsplit("/", 1)[-1].casefold()))
    kept = [word for word in words if word and word not in COLOURS | {"mirror", "flip", "left", "right"}]
    return f"{name.split('/')[0]}/{' '.join(kept)}" if kept else name


def hard_caption(text: str, name: str) -> str:
    """
    The caption with every word masked that is in the path of the stamp, by its first five letters, case apart.

    The path names the object, so the caption no longer does: "A red apple." at "food/fruit/apple_red" becomes
    "A something." Masked words in a row become one. Stop words stay, and so does what the path does not say.
    """
    path = re.sub(r"[\W\d_]+", "", name.casefold())

    def mask(match: re.Match) -> str:
        word = match[0].casefold()
        named = len(word) > 2 and word not in ENGLISH_STOP_WORDS and word[:5] in path
        return MASK if named else match[0]

    return re.sub(rf"{MASK}(?:\W+{MASK})+", MASK, re.sub(_WORD, mask, text))


_WORD = r"[^\W_]+(?:['’][^\W_]+)*"


def build_pool(folder: Path = STAMPS_DIR, size: int = SIZE) -> datasets.Dataset:
    """
    All rows, with families and both kinds of captions, before any split; nothing is missing yet.

    Raises:
        InputError: the stamps or `rsvg-convert` are not installed.
    """
    stamps = read_stamps(folder)
    pictures = draw_files([stamp.file for stamp in stamps], size)
    families = join_families(
        [stamp.name for stamp in stamps],
        [[caption_key(stamp.text) for stamp in stamps], [stem_key(stamp.name) for stamp in stamps]],
        find_twins(pictures),
    )
    rows = [
        {
            "text": stamp.text,
            "hard_text": hard_caption(stamp.text, stamp.name),
            "image": {"bytes": pictures[i], "path": None},
            "category": stamp.category,
            "name": stamp.name,
            "family": families[i],
            **stamp.translations,
        }
        for i, stamp in enumerate(stamps)
    ]
    return datasets.Dataset.from_list(rows, features=POOL_FEATURES)


def load_split(
    pool: datasets.Dataset | str | Path,
    seed: int = 0,
    variant: str = "plain",
    missing_images: float | Mapping[str, float] = 0.1,
    missing_texts: float | Mapping[str, float] = 0.05,
    missing_labels: float = 0.05,
) -> datasets.DatasetDict:
    """
    Args:
        pool: what `build_pool` gives, or the path of `all.parquet`.
        seed: seeds the split and the choice of what is missing.
        variant: "plain", or "hard": the captions do not name the object (`hard_caption`).
        missing_images: share of rows without a picture, in every split, or split -> share. Rows that lack it at a
            share lack it at every larger one.
        missing_texts: the same for captions; no row lacks both.
        missing_labels: share of training rows without a label. Validation and test rows have theirs.

    Returns:
        "train", "validation" and "test", with the columns of `FEATURES`.

    Raises:
        ValueError: the variant is unknown, or a share is not between 0 and 1.

    Example:
        >>> data = load_split("stamps_data/all.parquet", seed=3, missing_images=0.3)
    """
    if variant not in ("plain", "hard"):
        raise ValueError(f"variant must be 'plain' or 'hard', but is {variant!r}.")
    if not isinstance(pool, datasets.Dataset):
        pool = datasets.Dataset.from_parquet(str(pool), features=POOL_FEATURES)
    if variant == "hard":
        pool = pool.remove_columns("text").rename_column("hard_text", "text")
    else:
        pool = pool.remove_columns("hard_text")
    pool = pool.select_columns(list(FEATURES)).cast(FEATURES).shuffle(seed=seed)
    split = np.array(split_rows(pool["family"], pool["category"], seed))
    data = datasets.DatasetDict()
    for name in ("train", "validation", "test"):
        data[name] = pool.select(np.flatnonzero(split == name))
    return remove_cells(data, seed, missing_images, missing_texts, missing_labels, "category")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps_dir", type=Path, default=STAMPS_DIR, help="folder of stamps (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("stamps_data"), help="where to write (%(default)s)")
    parser.add_argument("--variant", choices=["plain", "hard"], default="plain", help="captions (%(default)s)")
    add_split_arguments(parser)
    args = parser.parse_args(arguments)
    pool_file = args.output_dir / "all.parquet"
    try:
        if not pool_file.is_file():
            args.output_dir.mkdir(parents=True, exist_ok=True)
            build_pool(args.stamps_dir).to_parquet(pool_file)
        data = load_split(
            pool_file, args.seed, args.variant, args.missing_images, args.missing_texts, args.missing_labels
        )
    except (InputError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    write(data, args.output_dir, args.format)
    print(describe(data, "category"))
    print(f"Wrote {args.output_dir}.")


if __name__ == "__main__":
    main()
