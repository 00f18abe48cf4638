"""
Which model types of transformers can be encoders, found by trying each of them on a tiny model.

    python tests/encoder_matrix.py docs/encoders.md [results.jsonl]

Trying all takes about an hour of one processor. What is in `results.jsonl` is not tried again.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import transformers
from tiny_encoders import make_tiny, model_types
from transformers import AutoModel, BertConfig, ViTConfig
from transformers.utils import logging

from mm_transformers import Classification, MMTransformerForMultiTask
from mm_transformers.fitting.encoder_choice import ENCODERS
from mm_transformers.model.encoder_classes import blank_input
from mm_transformers.model.encoder_probe import traits_of
from mm_transformers.model.encoders import max_text_positions


SECONDS, BYTES = 90, 10 * 2**30
WRITERS = [
    ("writing", "google-t5/t5-small", "short texts of your own, 60 M parameters"),
    ("writing", "Helsinki-NLP/opus-mt-en-de", "translation; other pairs of languages have names like it"),
    ("writing", "HuggingFaceTB/SmolLM2-135M-Instruct", "captions, answers and chats, 135 M parameters"),
]


class Tried(NamedTuple):
    """How one model type fared."""

    model_type: str
    modality: str
    refusal: Optional[str]  # the sentence
    faults: list[str]
    traits: dict
    longest: Optional[int]

    @property
    def is_supported(self) -> bool:
        return self.refusal is None and not self.faults


def try_type(model_type: str, modality: str) -> Optional[Tried]:
    """`None` if no tiny model of this type can be built."""
    model = make_tiny(model_type, modality)
    if model is None:
        return None
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        encoder, other = Path(folder, "encoder"), Path(folder, "other")
        try:
            model.save_pretrained(encoder)
            torch.manual_seed(1)
            AutoModel.from_config(_VIT if modality == "text" else _BERT).save_pretrained(other)
        except Exception as error:
            return Tried(model_type, modality, None, [f"transformers cannot save it: {_line(error)}"], {}, None)
        del model
        where = {"text": encoder, "vision": other} if modality == "text" else {"text": other, modality: encoder}
        try:
            fused = MMTransformerForMultiTask.from_encoders(
                **{name: str(path) for name, path in where.items()},
                tasks=[Classification("x", labels=["a", "b"])],
                freeze=[],
                num_fusion_attention_heads=1,
                modality_dropout=0.0,
            )
        except ValueError as error:
            return Tried(model_type, modality, str(error), faults, {}, None)
        except Exception as error:
            return Tried(model_type, modality, None, [f"from_encoders: {_line(error)}"], {}, None)
        with torch.no_grad():
            for name, parameter in fused.named_parameters():
                if name.endswith("gate_alpha"):
                    parameter.fill_(0.7)
        encoder_config = getattr(fused.config, f"{modality}_config")
        longest = max_text_positions(encoder_config) if modality == "text" else None
        for check in (_loads_alike, _row_alone, _every_gradient, _checkpointing, _longest):
            try:
                fault = check(fused, modality, longest, folder)
            except Exception as error:
                fault = _line(error)
            if fault:
                faults.append(f"{check.__name__.strip('_')}: {fault}")
        return Tried(model_type, modality, None, faults, traits_of(encoder_config), longest)


def try_aside(model_type: str, modality: str) -> Optional[Tried]:
    """As `try_type`, in a process of its own. `None` also if that needs more than `SECONDS` or `BYTES`."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        try:
            sender.send(try_type(model_type, modality))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):  # as torch says it
                raise
            sender.send(None)

    process = context.Process(target=work)
    process.start()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else None
    finally:
        process.kill()
        process.join()


def _line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]} ({Path(frame.filename).name}:{frame.lineno})"


_BERT = BertConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
)


def _batch(fused, modality: str, side: str = "right", longest: Optional[int] = None) -> dict:
    """Two rows, of which the first is shorter and lies at the padding side's other end."""
    generator = torch.Generator().manual_seed(3)
    long = min(13, longest or 13)
    short = min(6, long - 1)
    ids = torch.randint(6, 30, (2, long), generator=generator)
    mask = torch.ones(2, long, dtype=torch.int64)
    places = slice(short, long) if side == "right" else slice(0, long - short)
    pad = getattr(fused.config.text_config, "pad_token_id", None)
    ids[0, places], mask[0, places] = (0 if not isinstance(pad, int) or pad >= 33 else pad), 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if modality == "vision":
        shape = blank_input(fused.config.vision_config, "vision")["pixel_values"].shape
        batch["pixel_values"] = torch.randn(2, *shape[1:], generator=generator)
    if modality == "audio":
        key, blank = next(iter(blank_input(fused.config.audio_config, "audio").items()))
        if fused.model.audio_takes_mask and "max_length" not in fused.config.audio_config.to_dict():
            blank = torch.cat([blank] * 3, 1)
            batch["audio_attention_mask"] = torch.ones(2, blank.shape[1], dtype=torch.int64)
        batch[key] = torch.randn(2, *blank.shape[1:], generator=generator)
        if "audio_attention_mask" in batch:
            end = blank.shape[1] * 2 // 3
            batch["audio_attention_mask"][0, end:] = 0
            batch[key][0, end:] = 0
    return batch


def _alone(batch: dict) -> dict:
    """The first row without its padding."""
    kept = batch["attention_mask"][0].bool()
    alone = {name: batch[name][:1, kept] for name in ("input_ids", "attention_mask")}
    if "pixel_values" in batch:
        alone["pixel_values"] = batch["pixel_values"][:1]
    for key in ("input_values", "input_features"):
        if key in batch:
            alone[key] = batch[key][:1]
            if "audio_attention_mask" in batch:
                heard = batch["audio_attention_mask"][0].bool()
                alone[key] = batch[key][:1, heard]
                alone["audio_attention_mask"] = batch["audio_attention_mask"][:1, heard]
    return alone


def _loads_alike(fused, modality, longest, folder) -> Optional[str]:
    fused.eval().save_pretrained(Path(folder, "fused"))
    loaded, info = MMTransformerForMultiTask.from_pretrained(Path(folder, "fused"), output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        return f"missing {sorted(info['missing_keys'])[:3]}, unexpected {sorted(info['unexpected_keys'])[:3]}"
    batch = _batch(fused, modality, longest=longest)
    with torch.no_grad():
        given, expected = loaded(**batch).logits["x"], fused(**batch).logits["x"]
    names = [sorted(name for name, _ in model.named_parameters()) for model in (loaded, fused)]
    if names[0] != names[1]:
        return "loading gives other parameters"
    return None if torch.equal(given, expected) else f"logits differ by {(given - expected).abs().max():.2g}"


def _row_alone(fused, modality, longest, folder) -> Optional[str]:
    fused.eval()
    for side in ("right", "left"):
        batch = _batch(fused, modality, side, longest)
        with torch.no_grad():
            together = fused.model(**batch).last_hidden_state[0][batch["attention_mask"][0].bool()]
            alone = fused.model(**_alone(batch)).last_hidden_state[0]
        difference = (together - alone).abs().max() / alone.std()
        if not difference < 1e-3:
            return f"padded on the {side}, states differ by {difference:.2g} of their spread"
    return None


def _every_gradient(fused, modality, longest, folder) -> Optional[str]:
    fused.train()
    fused.zero_grad(set_to_none=True)
    fused(**_batch(fused, modality, longest=longest), labels={"x": torch.tensor([0, 1])}).loss.backward()
    without = [name for name, parameter in fused.named_parameters() if parameter.grad is None]
    return f"no gradient: {without[:4]} and {len(without)} in all" if without else None


def _checkpointing(fused, modality, longest, folder) -> Optional[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused.gradient_checkpointing_enable()
    fault = _every_gradient(fused, modality, longest, folder)
    fused.gradient_checkpointing_disable()
    return fault


def _longest(fused, modality, longest, folder) -> Optional[str]:
    if longest is None or longest > 1100:
        return None
    fused.eval()
    ids = torch.full((1, longest), 7)
    with torch.no_grad():
        if not fused(input_ids=ids).logits["x"].isfinite().all():
            return "the logits of the longest text are not finite"
    return None


def try_all(results: Optional[Path] = None) -> Iterator[Tried]:
    """
    Args:
        results: a file of JSON lines, to which what was tried is added, and from which it is taken.
    """
    known = {}
    if results is not None and results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            known[values["modality"], values["model_type"]] = Tried(**values) if "faults" in values else None
    for modality in ("text", "vision", "audio"):
        for model_type in model_types(modality):
            if (modality, model_type) not in known:
                tried = try_aside(model_type, modality)
                known[modality, model_type] = tried
                values = {"modality": modality, "model_type": model_type} if tried is None else tried._asdict()
                if results is not None:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(values) + "\n")
    yield from (tried for tried in known.values() if tried is not None)


def page_of(all_tried: list[Tried], version: str = transformers.__version__) -> str:
    """The page that says which model types are supported: names of the plain ones, a table of the others."""
    # An image encoder is no text encoder that is not supported.
    all_tried = [tried for tried in all_tried if "its forward takes no" not in (tried.refusal or "")]
    supported = [tried for tried in all_tried if tried.is_supported]
    lines = [
        "# Encoders",
        "",
        *choice(),
        "",
        "*Generated by `python tests/encoder_matrix.py docs/encoders.md`; edit that script, not this page.*",
        "",
        f"A tiny random model of each model type of transformers {version} was saved and given to "
        "`from_encoders`. A type is supported if the fused model loads equal, every trained parameter gets a "
        "gradient, a row alone gives the states that it has in a batch padded on the left or on the right, gradient "
        "checkpointing works, and the longest text runs. Other types are refused by `from_encoders` in one sentence.",
        "",
        f"{len(supported)} of {len(all_tried)} types are supported. Other types may work too: `from_encoders` tries "
        f"each. A type that is not listed was not tried, or no tiny model of it can be built by shrinking its default "
        f"config in {SECONDS} seconds.",
        "",
        "*by length*: the encoder mixes padding into a row, so it runs on rows of one length at a time, without "
        "padding. *one by one*: it makes one sequence of all images, so it runs on one at a time.",
    ]
    for modality in ("text", "vision", "audio"):
        rows = sorted((t for t in all_tried if t.modality == modality), key=lambda t: t.model_type)
        plain = [tried for tried in rows if not _notes(tried)]
        lines += ["", f"## {modality.capitalize()}", ""]
        if plain:
            lines += [f"Supported: {', '.join(f'`{tried.model_type}`' for tried in plain)}.", ""]
        groups: dict[tuple[str, bool], list[str]] = {}
        for tried in rows:
            if text := _notes(tried):
                # Types that are refused for one cause are one line.
                name = f"`{tried.model_type}`"
                key = (text.replace(repr(tried.model_type), "it").replace("|", "\\|"), tried.is_supported)
                groups.setdefault(key, []).append(name)
        lines += ["| model types | supported | notes |", "| --- | --- | --- |"] if groups else []
        for (text, is_supported), names in groups.items():
            lines.append(f"| {', '.join(names)} | {'yes' if is_supported else 'no'} | {text} |")
    return "\n".join(lines) + "\n"


def choice() -> list[str]:
    """The lines that name encoders to begin with."""
    rows = [(modality, encoder.name, encoder.suits) for modality in ENCODERS for encoder in ENCODERS[modality]]
    lines = [f"| {modality} | `{name}` | {suits} |" for modality, name, suits in [*rows, *WRITERS]]
    return [
        "To begin with, take one of these names of the Hub. If none is named or cached, `fit` takes the first of its "
        "modality; the first text encoder reads English. The encoders for writing must be named, and `fit` writes by a "
        "language model only if you say `--predict caption:generation`.",
        "",
        "| for | encoder | good for |",
        "| --- | --- | --- |",
        *lines,
    ]


def _notes(tried: Tried) -> str:
    notes = [name.replace("_", " ") for name in ("by_length", "one_by_one") if tried.traits.get(name)]
    return "; ".join([*notes, *([tried.refusal] if tried.refusal else []), *tried.faults])


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    page, *results = map(Path, sys.argv[1:])
    page.write_text(page_of(list(try_all(*results))), encoding="utf-8")


if __name__ == "__main__":
    main()
