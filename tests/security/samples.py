"""Small valid files of all kinds, and changes that make hostile files of them."""

import binascii
import functools
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from hostile_media import gif, picture_bytes, wav
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


# Valid files


def _picture(mode: str = "RGB", size: tuple[int, int] = (13, 9)) -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


@functools.cache
def pictures() -> dict[str, bytes]:
    """One or more of each format that is opened."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    rgb, grey = _picture(), _picture("L")
    sixteen = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    made = {
        "png": picture_bytes(_picture("RGBA")), "png palette": picture_bytes(rgb.quantize(9)),
        "png sixteen": picture_bytes(sixteen), "jpeg": picture_bytes(rgb, "JPEG", exif=exif),
        "jpeg progressive": picture_bytes(rgb, "JPEG", progressive=True),
        "jpeg cmyk": picture_bytes(_picture("CMYK"), "JPEG"), "gif": gif(3, (13, 9)), "bmp": picture_bytes(rgb, "BMP"),
        "bmp grey": picture_bytes(grey, "BMP"), "tiff": picture_bytes(rgb, "TIFF"), "tiff float": picture_bytes(
            PIL.Image.fromarray(np.asarray(grey) / np.float32(255)), "TIFF"
        ),
        "tiff lzw": picture_bytes(sixteen, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": picture_bytes(rgb, "TIFF", compression="jpeg"), "webp": picture_bytes(rgb, "WEBP"),
        "webp lossless": picture_bytes(_picture("RGBA"), "WEBP", lossless=True), "ppm": picture_bytes(rgb, "PPM"),
        "ppm text": b"P3\n2 2\n255\n" + b"1 2 3 4 5 6 " * 2, "pbm text": b"P1 4 2 01010101",
        "pgm deep": b"P5 4 2 1023 " + bytes(range(16)), "pam": b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 4\nMAXVAL 255\nTUPLTYPE "
        b"RGB_ALPHA\nENDHDR\n" + bytes(16), "pfm": b"Pf\n2 2\n-1.0\n" + bytes(16),
        "qoi": picture_bytes(rgb, "QOI"), "dib": picture_bytes(rgb, "DIB"),
        "ico": picture_bytes(_picture(size=(16, 16)), "ICO"),
        "ico bmp": picture_bytes(_picture("RGBA", (16, 16)), "ICO", bitmap_format="bmp"),
    }  # fmt: skip
    for name, form in (("avif", "AVIF"), ("jpeg 2000", "JPEG2000")):
        if form in PIL.Image.SAVE:
            made[name] = picture_bytes(_picture(size=(24, 20)), form)
    return made


@functools.cache
def sounds() -> dict[str, bytes]:
    import soundfile

    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (800, 2))
    made = {"wav by hand": wav(8000, 2, 0.05)}
    for form in ("WAV", "FLAC", "OGG", "AIFF", "AU", "MP3", "CAF", "W64", "RF64", "VOC", "NIST", "SVX", "MAT5"):
        if form in soundfile.available_formats():
            file = io.BytesIO()
            soundfile.write(file, samples[:, :1] if form == "SVX" else samples, 16_000, format=form)
            made[form] = file.getvalue()
    return made


_CODECS = {"mp4": "libx264", "avi": "mpeg4", "mkv": "mpeg4", "webm": "libvpx", "ts": "mpeg2video"}


@functools.cache
def videos() -> dict[str, bytes]:
    from hostile_media import video

    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec in _CODECS.items():
            path = Path(folder, f"a.{suffix}")
            try:
                video(48, 32, 6, path, codec)
            except (ValueError, OSError):  # this build of FFmpeg has no such encoder
                continue
            made[suffix] = path.read_bytes()
    made["gif"] = gif(3, (16, 12))
    return made


ROWS = [
    {"text": "red cat", "image": "a.png", "topic": "food", "score": 0.5, "tags": ["red", "blue"]},
    {"text": 'a "small", dog', "image": None, "topic": None, "score": None, "tags": []},
    {"text": "très\nlong", "image": "b.png", "topic": "travel", "score": -1e9, "tags": None},
] * 3


@functools.cache
def tables() -> dict[str, bytes]:
    """By their suffixes."""
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    csv = "text,image,topic,score\n" + "".join(
        f'"{row["text"].replace(chr(34), chr(34) * 2)}",{row["image"] or ""},{row["topic"] or ""},{row["score"]}\n'
        for row in ROWS
    )
    made = {".csv": csv.encode(), ".jsonl": lines.encode(), ".json": json.dumps(ROWS).encode()}
    for name, compression in ((".parquet", "none"), ("snappy.parquet", "snappy"), ("zstd.parquet", "zstd")):
        file = io.BytesIO()
        nested = [{**row, "nested": {"bytes": b"x", "path": "a"}, "when": 3} for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), file, compression=compression)
        made[name] = file.getvalue()
    return made


def _trained(model, trainer, pre_tokenizer, decoder=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    texts = ["the cat is over a river bat, and the dog isn't", "lovely rain in the sun aaa aaaa bb abab, ab ba"] * 20
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@functools.cache
def text_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One of each kind."""
    special = ["<pad>", "<unk>"]
    return {
        "word_piece": make_tokenizer(),
        "byte_level": _trained(
            models.BPE(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(),
        ),
        "unigram": _trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False),
            pre_tokenizers.Metaspace(),
        ),
        "unsplit": _trained(
            models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=90, special_tokens=special,
            show_progress=False),
            pre_tokenizers.Metaspace(split=False),
        ),
    }  # fmt: skip


RECIPE = """\
data: {train: train.csv, validation: train.csv, max_train_samples: 10, label_separator: "|"}
columns: {text: text, image: image}
model:
  text: bert-base-uncased
  vision: google/vit-base-patch16-224
  num_fusion_layers: 1
  fusion_kwargs: {num_latents: 3}
  vision_token_reduction: {kind: merge, num_tokens: 9}
  attn_implementation: sdpa
tasks:
  - {name: topic, kind: classification, labels: [a, b], loss_weight: 0.5}
  - {name: stars, kind: regression}
  - &tags {name: tags, kind: multi_label, column: "tags"}
  - {name: german, kind: generation, max_length: 9}
training:
  output_dir: out
  max_steps: 2
  learning_rate: 1e-3
  lr_scheduler_type: cosine
  optim: adamw_torch
  report_to: none
  use_cpu: true
"""
# Parts of YAML and JSON that ask a reader for more than they look like.
HOSTILE_TEXTS = [
    "!!python/object/apply:os.system ['exit 3']", "!!python/name:os.system", "!!binary aGk=", "!!bool maybe",
    "!!set {a}",
    "!!timestamp 2020-99-99", "&a [*a]", "*tags", "<<: *tags", "<<: {a: 1}", "? [a]", "? - x", "[" * 60, "{a: " * 60,
    "&x [1,1,1,1,1,1,1,1,1]", "[*x,*x,*x,*x,*x,*x,*x]", "- " * 60, "9" * 5000, "1e999", "-.inf", ".nan", "0x10", "\x00",
    "\ufeff", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "\u2028", "%TAG ! tag:x,2000:",
    "---",
    "...", "%YAML 9.9\n---\n", "!<tag:yaml.org,2002:int> x", "|\n  x", ">-", "'", '"\\ud800"', "NaN", "Infinity", "\t",
]  # fmt: skip


# Changes of bytes

_NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 10**6, 2**24, 10**9, 2**31 - 1, 2**31,
            2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
EXTREMES = sorted(
    {n.to_bytes(w, order) for n in _NUMBERS for w in (1, 2, 4, 8) if n < 256**w for order in ("little", "big")},
    key=lambda x: (len(x), x),
)
_PLACES = st.one_of(st.integers(0, 63), st.integers(0, 400), st.integers(0, 2**16))
_CHANGE = st.one_of(
    st.tuples(st.just("replace"), _PLACES, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("replace"), _PLACES, st.sampled_from(EXTREMES)),
    st.tuples(st.just("insert"), _PLACES, st.sampled_from(EXTREMES)),
    st.tuples(st.just("delete"), _PLACES, st.integers(1, 200)),
    st.tuples(st.just("repeat"), _PLACES, st.tuples(st.integers(1, 200), st.sampled_from([1, 2, 300]))),
    st.tuples(st.just("cut"), _PLACES, st.none()),
)


def changed_bytes(samples: dict[str, bytes], texts: tuple[str, ...] = ()) -> st.SearchStrategy[tuple[str, bytes]]:
    """
    The name of a sample, and what changes have left of it.

    Args:
        texts: what is inserted, too.
    """
    change = _CHANGE
    if texts:
        written = [text.encode("utf-8", "replace") for text in texts]
        change = st.one_of(change, st.tuples(st.sampled_from(["insert", "replace"]), _PLACES, st.sampled_from(written)))
    tail = st.tuples(st.just("tail"), _PLACES, st.sampled_from(list(samples.values())))
    changes = st.lists(st.one_of(change, change, change, change, change, tail), min_size=1, max_size=6)
    parts = st.tuples(st.sampled_from(list(samples)), changes, st.booleans())
    return parts.map(lambda drawn: (drawn[0], _with_changes(samples[drawn[0]], drawn[1], drawn[2])))


def _with_changes(content: bytes, changes: list[Any], mends: bool) -> bytes:
    """
    Args:
        mends: whether checksums are made right again, so that readers go on.
    """
    for kind, place, what in changes:
        place %= len(content) + 1
        before, after = content[:place], content[place:]
        if kind == "replace":
            content = before + what + after[len(what) :]
        elif kind == "insert":
            content = before + what + after
        elif kind == "delete":
            content = before + after[what:]
        elif kind == "repeat":
            content = before + after[: what[0]] * what[1] + after
        elif kind == "cut":
            content = before
        else:
            content = before + what[place % (len(what) + 1) :]
    content = content[: 2**20]
    if mends and content.startswith(b"\x89PNG"):
        return _with_png_checksums(content)
    return _with_ogg_checksums(content) if mends and content.startswith(b"OggS") else content


def _with_png_checksums(content: bytes) -> bytes:
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        end = min(place + 8 + int.from_bytes(content[place : place + 4], "big"), len(content))
        parts += [content[place:end], struct.pack(">I", zlib.crc32(content[place + 4 : end]))]
        place = end + 4
    return b"".join([*parts, content[place:]])


def _with_ogg_checksums(content: bytes) -> bytes:
    starts = [i for i in range(len(content)) if content.startswith(b"OggS", i)]
    pages = [bytearray(content[i:j]) for i, j in zip(starts, [*starts[1:], len(content)], strict=True)]
    for page in pages:
        if len(page) >= 27:
            page[22:26] = bytes(4)
            page[22:26] = _ogg_checksum(page).to_bytes(4, "little")
    return b"".join(pages)


def _ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ _ogg_table()[(value >> 24) ^ byte]
    return value


@functools.cache
def _ogg_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = ((value << 1) ^ 0x04C11DB7) & 0xFFFFFFFF if value >> 31 else value << 1
        table.append(value)
    return table


# Changes of values, as JSON holds them

_LEAVES = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, 1, -1, 2, 7, 300, 10**4, 10**9, -(10**9), 2**31, 2**63, 10**30]),
    st.sampled_from([0.0, 0.5, -1.5, 1e-9, 1e9, 1e308, float("nan"), float("inf"), -float("inf")]),
    st.text(max_size=8), st.sampled_from([
        "", " ", "bert", "vit", "evil/kernel", "a:b", "kernels-community/flash-attn", "../..", "/etc/passwd",
        "/dev/zero",
        "float16", "cuda", "auto", "null", "none", "gelu", "x" * 3000, "9" * 400, "<b>", "a\nb", "\x00", "\ud800", "-1",
        "http://localhost/x", "2020-01-01", "{}", "[]", "NaN", "eval", "__class__", "model_type", "sdpa", "%s%s", "{0}",
    ]),
)  # fmt: skip
ANY_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=5), st.sampled_from(["kind",
        "model_type", "path", "name"])), inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip
_VALUE_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 2000), ANY_JSON),
        st.tuples(st.just("add"), st.integers(0, 2000), st.tuples(st.text(max_size=8), ANY_JSON)),
        st.tuples(st.just("delete"), st.integers(0, 2000), st.none()),
        st.tuples(st.just("copy"), st.integers(0, 2000), st.integers(0, 2000)),
        st.tuples(st.just("nest"), st.integers(0, 2000), st.sampled_from([1, 3, 60, 400])),
        st.tuples(st.just("repeat"), st.integers(0, 2000), st.sampled_from([2, 50, 3000])),
    ),
    min_size=1,
    max_size=3,
)


def changed_values(values: Any) -> st.SearchStrategy[Any]:
    """A JSON document with random JSON at random places."""
    text = json.dumps(values)
    return _VALUE_CHANGES.map(lambda changes: _with_value_changes(json.loads(text), changes))


def changed_json(values: Any) -> st.SearchStrategy[bytes]:
    """A file of JSON, whose values or bytes are changed."""
    damaged = changed_bytes({"": as_json(values)}).map(lambda drawn: drawn[1])
    return st.one_of(changed_values(values).map(as_json), damaged)


def _with_value_changes(values: Any, changes: list[Any]) -> Any:
    root = {"": values}
    for kind, place, what in changes:
        slots = list(_slots(root))
        holder, key = slots[place % len(slots)]
        value = holder[key]
        if kind == "set":
            holder[key] = what
        elif kind == "add" and isinstance(value, dict):
            value[what[0]] = what[1]
        elif kind == "delete" and holder is not root:
            del holder[key]
        elif kind == "copy":
            other_holder, other = slots[what % len(slots)]
            holder[key] = json.loads(json.dumps(other_holder[other]))
        elif kind == "nest":
            for _ in range(what):
                holder[key] = [holder[key]] if place % 2 else {"a": holder[key]}
        elif kind == "repeat" and isinstance(value, (list, str)):
            holder[key] = (value * what)[:20_000]
    return root[""]


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a document, as what holds it and its key there."""
    pending = [value]
    while pending:
        holder = pending.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                pending.append(holder[key])


def as_json(values: Any) -> bytes:
    """As `json.dumps`, but also with half characters, which a file may hold escaped."""
    return json.dumps(values).encode()


def in_base64(content: bytes) -> str:
    return binascii.b2a_base64(content, newline=False).decode()
