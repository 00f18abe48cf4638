"""
Builds a data set of emoji with a shift of style: training on Google's drawings, testing on another artist's.

A row is a keyword, a picture of an emoji that carries it, and the group of the emoji in Unicode. The splits share no
keyword, no emoji, and no two that differ in colour, direction, skin tone or gender only. The split "test" has the other
artist's drawings, "same_style" the same rows in Google's.

    apt install fonts-noto-color-emoji librsvg2-bin
    npm install emojibase-data@17 emoji-emotion@3 openmoji@17
    python build_styles.py --npm_dir node_modules --output_dir emoji_styles           # train.parquet, ...
    python build_styles.py --npm_dir node_modules --output_dir emoji_styles --seed 1  # another split

From Python, `load_split("emoji_styles/all.parquet", seed=3)` makes another split in a few seconds.
"""

import argparse
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import datasets


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from real_data import (
    InputError,
    add_split_arguments,
    caption_key,
    describe,
    draw_files,
    find_twins,
    import_script,
    join_families,
    remove_cells,
    split_rows,
    write,
)


build_dataset = import_script(Path(__file__).with_name("build_dataset.py"))

LANGUAGES = build_dataset.LANGUAGES
# Style -> npm package, and where it has the picture of code points like "1F468-200D-1F33E".
STYLES = {
    "openmoji": ("openmoji@17", "openmoji/color/svg/{}.svg"),
    "twitter": ("emoji-datasource-twitter@16", "emoji-datasource-twitter/img/twitter/64/{}.png"),
}
# Height and width of the pictures, in pixels; Twitter's have 64.
SIZE = 96

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "group": datasets.Value("string"),
        "name": datasets.Value("string"),
        "family": datasets.Value("string"),
        "title": datasets.Value("string"),
        **{column: datasets.Value("string") for column in LANGUAGES},
    }
)
# One row per emoji: its keywords, its pictures in both styles.
POOL_FEATURES = datasets.Features(
    {
        **{column: kind for column, kind in FEATURES.items() if column not in ("text", "image", "name")},
        "hexcode": datasets.Value("string"),
        "keywords": datasets.List(datasets.Value("string")),
        "style": datasets.Value("string"),
        "noto": datasets.Image(),
        "other": datasets.Image(),
    }
)


def picture_file(npm_dir: Path, style: str, hexcode: str) -> Path | None:
    """The picture of an emoji in that style, `None` if there is none; files may lack the variation selector."""
    names = [hexcode, hexcode.replace("-FE0F", ""), f"{hexcode}-FE0F"]
    files = [npm_dir / STYLES[style][1].format(name.lower() if style == "twitter" else name) for name in names]
    return next((file for file in files if file.is_file()), None)


def build_pool(npm_dir: Path, style: str = "openmoji", font: str | None = None, size: int = SIZE) -> datasets.Dataset:
    """
    All emoji that have a group, keywords, and a drawing in both styles, with their families, before any split.

    Raises:
        InputError: the font, an npm package or `rsvg-convert` is not installed.
    """
    try:
        noto = build_dataset.load_font(font)
        emoji = build_dataset.read_emoji(npm_dir)
    except build_dataset.InputError as error:
        raise InputError(str(error)) from error
    package, pattern = STYLES[style]
    if not (npm_dir / pattern).parent.is_dir():
        raise InputError(
            f"{(npm_dir / pattern).parent} is missing; get it by: npm install --prefix {npm_dir.parent} {package}"
        )
    unknown_flag = build_dataset.draw(noto, build_dataset.UNKNOWN_FLAG, size)
    drawn = [
        (item, picture, file)
        for item in emoji
        if (file := picture_file(npm_dir, style, item.hexcode)) is not None
        and (picture := build_dataset.draw(noto, item.variants[0], size)) not in (None, unknown_flag)
    ]
    emoji, pictures, files = (list(column) for column in zip(*drawn, strict=True))
    others = draw_files(files, size)
    families = join_families(
        [item.hexcode for item in emoji],
        [[build_dataset.family_of(item.hexcode) for item in emoji], [caption_key(item.name) for item in emoji]],
        find_twins(pictures) + find_twins(others),
    )
    rows = [
        {
            "hexcode": item.hexcode,
            "keywords": item.keywords,
            "style": style,
            "noto": {"bytes": pictures[i], "path": None},
            "other": {"bytes": others[i], "path": None},
            "group": item.group,
            "family": families[i],
            "title": item.name,
            **item.translations,
        }
        for i, item in enumerate(emoji)
    ]
    return datasets.Dataset.from_list(rows, features=POOL_FEATURES)


def share_keywords(keywords: list[list[str]], splits: list[str], seed: int) -> list[list[str]]:
    """
    The keywords that each emoji keeps: a keyword of several splits is left to one of them, chosen at random.

    Args:
        keywords: of each emoji.
        splits: the split of each emoji.
    """
    places: dict[str, set[str]] = {}
    for words, split in zip(keywords, splits, strict=True):
        for word in words:
            places.setdefault(word.casefold(), set()).add(split)
    owner = {word: random.Random(f"{seed}/{word}").choice(sorted(found)) for word, found in places.items()}
    return [
        [word for word in words if owner[word.casefold()] == split]
        for words, split in zip(keywords, splits, strict=True)
    ]


def load_split(
    pool: datasets.Dataset | str | Path,
    seed: int = 0,
    rows: int | None = 1500,
    keywords: int = 2,
    missing_images: float | Mapping[str, float] = 0.1,
    missing_texts: float | Mapping[str, float] = 0.05,
    missing_labels: float = 0.05,
) -> datasets.DatasetDict:
    """
    Args:
        pool: what `build_pool` gives, or the path of `all.parquet`.
        seed: seeds the split, the keywords and the choice of what is missing.
        rows: at most so many training rows; `None` for all.
        keywords: at most so many rows per emoji.
        missing_images: share of rows without a picture, in every split, or split -> share.
        missing_texts: the same for keywords; no row lacks both.
        missing_labels: share of training rows without a label. The other rows have theirs.

    Returns:
        "train" and "validation" in the style of Noto, "test" in the other style, and "same_style": the rows of
        "test", with the same parts missing, in the style of Noto. Columns as in `FEATURES`.

    Raises:
        ValueError: a share is not between 0 and 1.

    Example:
        >>> data = load_split("emoji_styles/all.parquet", seed=3, rows=500)
    """
    if not isinstance(pool, datasets.Dataset):
        pool = datasets.Dataset.from_parquet(str(pool), features=POOL_FEATURES)
    # Files as they are, decoded when a row is read.
    pool = pool.cast_column("noto", datasets.Image(decode=False)).cast_column("other", datasets.Image(decode=False))
    split = split_rows(pool["family"], pool["group"], seed)
    kept = share_keywords(pool["keywords"], split, seed)
    tables: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for emoji, words, name in zip(pool, kept, split, strict=True):
        chosen = random.Random(f"{seed}/{emoji['hexcode']}").sample(words, min(keywords, len(words)))
        tables[name] += [{**emoji, "text": word} for word in chosen]
    data = datasets.DatasetDict()
    for name, table in tables.items():
        random.Random(f"{seed}/{name}").shuffle(table)
        styled = [
            _row(row, "other" if name == "test" else "noto") for row in table[: rows if name == "train" else None]
        ]
        data[name] = datasets.Dataset.from_list(styled, features=FEATURES)
    data = remove_cells(data, seed, missing_images, missing_texts, missing_labels, "group")
    data["same_style"] = _in_noto(data["test"], tables["test"])
    return data


def _row(emoji: dict, picture: str) -> dict:
    style = emoji["style"] if picture == "other" else "noto"
    row = {column: emoji[column] for column in FEATURES if column in emoji}
    return {**row, "image": emoji[picture], "name": f"{style}/{emoji['hexcode']}"}


def _in_noto(test: datasets.Dataset, emoji: list[dict]) -> datasets.Dataset:
    """The rows of the test split, made from these emoji, in the style of Noto."""
    table = test.cast_column("image", datasets.Image(decode=False)).to_list()
    for row, item in zip(table, emoji, strict=True):
        row["name"] = f"noto/{item['hexcode']}"
        row["image"] = None if row["image"] is None else item["noto"]
    return datasets.Dataset.from_list(table, features=FEATURES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm_dir", type=Path, default=Path("node_modules"), help="folder that npm installed into")
    parser.add_argument("--font", help="NotoColorEmoji.ttf, if it is not in the usual place")
    parser.add_argument("--style", choices=STYLES, default="openmoji", help="drawings of the test split (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("emoji_styles"), help="where to write (%(default)s)")
    parser.add_argument("--rows", type=int, default=1500, help="at most so many training rows (%(default)s)")
    parser.add_argument("--keywords", type=int, default=2, help="at most so many rows per emoji (%(default)s)")
    add_split_arguments(parser)
    args = parser.parse_args(arguments)
    pool_file = args.output_dir / "all.parquet"
    try:
        if not pool_file.is_file():
            pool = build_pool(args.npm_dir, args.style, args.font)
            args.output_dir.mkdir(parents=True, exist_ok=True)
            pool.to_parquet(pool_file)
        data = load_split(
            pool_file, args.seed, args.rows, args.keywords, args.missing_images, args.missing_texts, args.missing_labels
        )
    except (InputError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    write(data, args.output_dir, args.format)
    print(describe(data, "group"))
    print(f"Wrote {args.output_dir}.")


if __name__ == "__main__":
    main()
