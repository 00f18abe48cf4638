"""
Builds a data set of keywords and pictures of emoji from ordinary packages; nothing is downloaded here.

A row is a keyword and an emoji that carries it, drawn with Noto Color Emoji. Many keywords belong to emoji of several
groups ("face": smileys, animals, the sun, ...), so that the keyword alone does not tell the group. The splits share no
emoji, nor two that differ in skin tone, gender or direction only.

    apt install fonts-noto-color-emoji
    npm install emojibase-data@17 emoji-emotion@3
    python build_dataset.py --npm_dir node_modules --output_dir emoji_data
"""

import argparse
import ast
import io
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from PIL import Image, ImageDraw, ImageFont


FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch, Alpine
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
)
# The font holds bitmaps of this one size; FreeType offers no other.
FONT_SIZE, GLYPH_WIDTH, GLYPH_HEIGHT = 109, 136, 128
# The letters "ZZ" as a flag: no country has it, so the font shows what it shows for all flags that it lacks.
UNKNOWN_FLAG = "\U0001f1ff\U0001f1ff"

LANGUAGES = {"german": "de", "french": "fr", "spanish": "es", "chinese": "zh"}
# The group of loose skin tones and hair styles, which are parts of emoji and not emoji.
COMPONENTS = "components"

# Which split each of ten families in a row gets: 20 % test, 10 % validation, 70 % training.
SPLIT_CYCLE = ("test", "train", "train", "validation", "train", "test", "train", "train", "train", "train")

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "image": datasets.Image(),
        "group": datasets.Value("string"),
        "polarity": datasets.Value("float32"),
        "polarity_class": datasets.Value("string"),
        "ambiguous": datasets.Value("bool"),
        "emoji": datasets.Value("string"),
        "family": datasets.Value("string"),
        "name": datasets.Value("string"),
        **{column: datasets.Value("string") for column in LANGUAGES},
    }
)


class InputError(Exception):
    """Something that the script needs is not there; the message says what, and how to get it."""


@dataclass
class Emoji:
    """
    Args:
        hexcode: code points, in hexadecimal, joined by "-".
        variants: the characters that show it: itself, and itself in each skin tone.
        keywords: English keywords.
        translations: column name -> name in that language, `None` where there is none.
        polarity: from -5 to 5, `None` where it is not known.
    """

    hexcode: str
    variants: list[str]
    name: str
    keywords: list[str]
    group: str
    translations: dict[str, str | None] = field(default_factory=dict)
    polarity: int | None = None

    @property
    def polarity_class(self) -> str | None:
        if self.polarity is None:
            return None
        return "negative" if self.polarity < 0 else "positive" if self.polarity > 0 else "neutral"


_JOINER = "200D"
_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
# Female sign, male sign, arrow to the right: after a joiner they mean a woman, a man, and facing right.
_MODIFIERS = {"2640", "2642", "27A1"}
_NEUTRAL = {
    **dict.fromkeys(["1F468", "1F469"], "1F9D1"),  # man, woman -> person
    **dict.fromkeys(["1F466", "1F467"], "1F9D2"),  # boy, girl -> child
    **dict.fromkeys(["1F474", "1F475"], "1F9D3"),  # old man, old woman -> older person
}


def family_of(hexcode: str) -> str:
    """
    The same for emoji that differ in skin tone, gender or direction only: their pictures are nearly the same, so they
    must not be on both sides of a split.
    """
    family: list[str] = []
    previous = ""
    for code in hexcode.upper().split("-"):
        is_modifier = code in _MODIFIERS and previous == _JOINER
        previous = previous if code == "FE0F" else code
        if code not in _SKIN_TONES and code not in (_JOINER, "FE0F") and not is_modifier:
            family.append(_NEUTRAL.get(code, code))
    return "-".join(family) or hexcode


def merge_families(pictures: dict[str, bytes]) -> dict[str, str]:
    """
    hexcode -> family. Emoji with the very same picture (the flags of France and of St. Martin) join their families.

    Args:
        pictures: hexcode -> the file of its picture.
    """
    joined: dict[str, str] = {}

    def find(family: str) -> str:
        while family in joined:
            family = joined[family]
        return family

    first: dict[bytes, str] = {}
    for hexcode, picture in pictures.items():
        family = find(family_of(hexcode))
        other = find(first.setdefault(picture, family))
        if other != family:
            joined[family] = other
    return {hexcode: find(family_of(hexcode)) for hexcode in pictures}


def split_families(strata: dict[str, str], seed: int) -> dict[str, str]:
    """
    Assigns each family to a split.

    Args:
        strata: family -> stratum; the splits get the same share of every stratum, as far as its size permits.
        seed: seeds the shuffling within the strata.

    Returns:
        family -> "train", "validation" or "test".
    """
    order: list[str] = []
    for stratum in sorted(set(strata.values())):
        members = sorted(family for family in strata if strata[family] == stratum)
        random.Random(f"{seed}/{stratum}").shuffle(members)
        order += members
    return {family: SPLIT_CYCLE[i % len(SPLIT_CYCLE)] for i, family in enumerate(order)}


def strata_of(emoji: list[Emoji], families: dict[str, str]) -> dict[str, str]:
    """family -> group and polarity class; of a family with several, those of the first that has a polarity."""
    strata: dict[str, str] = {}
    for item in sorted(emoji, key=lambda item: item.polarity is None):
        strata.setdefault(families[item.hexcode], f"{item.group}/{item.polarity_class}")
    return strata


def read_json(npm_dir: Path, name: str):
    path = npm_dir / name
    if not path.is_file():
        raise InputError(f"{path} is missing; get it by: npm install --prefix {npm_dir.parent} emojibase-data@17")
    return json.loads(path.read_text(encoding="utf-8"))


def read_polarity(npm_dir: Path) -> dict[str, int]:
    """Emoji (without variation selectors) -> polarity, from the list that `emoji-emotion` exports as JavaScript."""
    path = npm_dir / "emoji-emotion" / "index.js"
    if not path.is_file():
        raise InputError(f"{path} is missing; get it by: npm install --prefix {npm_dir.parent} emoji-emotion@3")
    source = path.read_text(encoding="utf-8")
    match = re.search(r"export const emojiEmotion = (\[.*\])", source, flags=re.DOTALL)
    try:
        # With its keys quoted, the list is a Python literal too.
        entries = ast.literal_eval(re.sub(r"([{,]\s*)(\w+)\s*:", r"\1'\2':", match[1]))
        return {_bare(entry["emoji"]): int(entry["polarity"]) for entry in entries}
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold the list that emoji-emotion 3.0 has; install emoji-emotion@3."
        ) from error


def read_emoji(npm_dir: Path) -> list[Emoji]:
    """All emoji that have a group and keywords, in the order of Unicode."""
    messages = read_json(npm_dir, "emojibase-data/en/messages.json")
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    polarity = read_polarity(npm_dir)
    names: dict[str, dict[str, str]] = {}
    for column, language in LANGUAGES.items():
        entries = read_json(npm_dir, f"emojibase-data/{language}/data.json")
        names[column] = {entry["hexcode"]: entry["label"] for entry in entries}
    return [
        Emoji(
            hexcode=entry["hexcode"],
            variants=[entry["emoji"], *(skin["emoji"] for skin in entry.get("skins", []))],
            name=entry["label"],
            keywords=entry["tags"],
            group=groups[entry["group"]],
            translations={column: names[column].get(entry["hexcode"]) for column in LANGUAGES},
            polarity=polarity.get(_bare(entry["emoji"])),
        )
        for entry in read_json(npm_dir, "emojibase-data/en/data.json")
        if entry.get("tags") and groups.get(entry.get("group"), COMPONENTS) != COMPONENTS
    ]


def _bare(character: str) -> str:
    return character.replace("\N{VARIATION SELECTOR-16}", "")


def load_font(path: str | None) -> ImageFont.FreeTypeFont:
    found = [Path(candidate) for candidate in ([path] if path else FONT_PATHS) if Path(candidate).is_file()]
    if not found:
        where = path or "any of the usual places"
        raise InputError(
            f"NotoColorEmoji.ttf is not in {where}; get it by: apt install fonts-noto-color-emoji "
            "(or name the file by --font)."
        )
    try:
        return ImageFont.truetype(str(found[0]), FONT_SIZE)
    except OSError as error:
        raise InputError(
            f"{found[0]} cannot be used ({error}); get it by: apt install fonts-noto-color-emoji"
        ) from error


def draw(font: ImageFont.FreeTypeFont, character: str, size: int) -> bytes | None:
    """A PNG file, RGB, `size` pixels in height and width, on white; `None` if the font does not have the emoji."""
    # What the font lacks, it shows as an empty box or as the parts of the emoji side by side.
    if font.getbbox(character) != (0, 0, GLYPH_WIDTH, GLYPH_HEIGHT):
        return None
    picture = Image.new("RGB", (GLYPH_WIDTH, GLYPH_WIDTH), "white")
    margin = (GLYPH_WIDTH - GLYPH_HEIGHT) // 2
    ImageDraw.Draw(picture).text((0, margin), character, font=font, embedded_color=True)
    buffer = io.BytesIO()
    picture.resize((size, size), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    return buffer.getvalue()


def build(emoji: list[Emoji], font: ImageFont.FreeTypeFont, size: int, seed: int) -> datasets.DatasetDict:
    """
    One row per keyword and emoji, drawn in a skin tone chosen at random where there are several.

    `ambiguous` says whether the keyword belongs to emoji of several groups, in the whole data set.
    """
    pictures = {variant: draw(font, variant, size) for item in emoji for variant in item.variants}
    unknown_flag = draw(font, UNKNOWN_FLAG, size)
    emoji = [item for item in emoji if pictures[item.variants[0]] not in (None, unknown_flag)]
    families = merge_families({item.hexcode: pictures[item.variants[0]] for item in emoji})
    groups: dict[str, set[str]] = {}
    for item in emoji:
        for keyword in item.keywords:
            groups.setdefault(keyword, set()).add(item.group)
    split_of = split_families(strata_of(emoji, families), seed)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for item in emoji:
        variants = [variant for variant in item.variants if pictures[variant] is not None]
        for keyword in item.keywords:
            variant = random.Random(f"{seed}/{item.hexcode}/{keyword}").choice(variants)
            rows[split_of[families[item.hexcode]]].append(
                {
                    "text": keyword,
                    "image": {"bytes": pictures[variant], "path": None},
                    "group": item.group,
                    "polarity": item.polarity,
                    "polarity_class": item.polarity_class,
                    "ambiguous": len(groups[keyword]) > 1,
                    "emoji": variant,
                    "family": families[item.hexcode],
                    "name": item.name,
                    **item.translations,
                }
            )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(part, features=FEATURES, split=datasets.NamedSplit(split))
            for split, part in rows.items()
        }
    )


def describe(data: datasets.DatasetDict) -> str:
    lines = []
    for split, part in data.items():
        emoji = set(zip(part["name"], part["family"], strict=True))
        lines.append(
            f"{split}: {len(part):,} rows ({sum(part['ambiguous']):,} ambiguous, "
            f"{sum(value is not None for value in part['polarity']):,} with a polarity), {len(emoji):,} emoji; rows "
            f"per group: {', '.join(f'{group} {count:,}' for group, count in Counter(part['group']).most_common())}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm_dir", type=Path, default=Path("node_modules"), help="folder that npm installed into")
    parser.add_argument("--font", help="NotoColorEmoji.ttf, if it is not in the usual place")
    parser.add_argument("--output_dir", type=Path, default=Path("emoji_data"), help="where to write (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seeds the split and the skin tones (%(default)s)")
    args = parser.parse_args(arguments)
    if args.size < 1:
        parser.error(f"--size must be at least 1, but is {args.size}.")
    try:
        font = load_font(args.font)
        emoji = read_emoji(args.npm_dir)
    except InputError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    data = build(emoji, font, args.size, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, part in data.items():
        part.to_parquet(args.output_dir / f"{split}.parquet")
    drawn = sum(len(set(zip(part["name"], part["family"], strict=True))) for part in data.values())
    print(describe(data))
    print(f"{len(emoji) - drawn} emoji are newer than the font and were left out.")
    print(f"Wrote {args.output_dir}; read it by datasets.load_dataset({str(args.output_dir)!r}).")


if __name__ == "__main__":
    main()
