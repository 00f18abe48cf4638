"""The answers of the demo page to one row, with explanations, or one error sentence."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..analysis import explain
from ..analysis.explaining.html import colored_words, heat_map_url, picture_url, sound_colors
from ..data.pages import rendered
from ..model.answers import check_tasks
from ..model.language_model import longest_prompt
from ..model.limits import limits
from ..model.messages import listed
from ..model.modalities import ARGUMENTS, MODALITIES, NOUNS, PARTS, ReaderContext
from ..model.oddness import odd_sentence
from ..model.pipeline_mm_transformer import read_rows
from ..model.predictions import Predictions
from .time_limit import TimeLimitError, time_limit
from .uploads import Upload, UploadError


if TYPE_CHECKING:
    from ..model.modeling_mm_transformer import MMTransformerForMultiTask
    from ..model.processing_mm_transformer import MMTransformerProcessor


# Stands for all columns of numbers and categories among the fields.
COLUMNS_FIELD = "table"
_NOUNS = {**NOUNS, COLUMNS_FIELD: MODALITIES["table"].nouns}
_MOST_LETTERS = 20  # of a word, on average; some languages put no spaces between words


def answers_as_html(
    model: "MMTransformerForMultiTask",
    processor: "MMTransformerProcessor",
    row: dict[str, Any],
    tasks: Any,
    fields: Sequence[str],
) -> str:
    """
    The answers of the page to a row; an error sentence, if they take longer than `limits().request_seconds`.

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        processor ([`MMTransformerProcessor`]): The processor of the model.
        row: the given inputs, of `fields`: a text; a file as an [`Upload`] or as an object in memory, never as a path;
            cells of columns by their names.
        tasks: names of the selected tasks.
    """
    try:
        text = row.get("text") or ""
        if not isinstance(text, str) or not isinstance(tasks, (list, tuple)):
            raise ValueError("The text must be a string, and the tasks a list of names.")
        if not text.strip():
            row = {name: part for name, part in row.items() if name != "text"}
        if not row:
            return render_page([], f"There is no input yet: give {either(fields)}.", fields)
        if not tasks:
            return render_page([], "Tick at least one task.", fields)
        names = check_tasks(model, [str(name) for name in tasks])
        with time_limit(limits().request_seconds) as check:
            read, note = _read(processor, row)
            cards, warning = _cards(model, processor, read, names, check)
            note = " ".join(filter(None, (warning, note)))
    except (ValueError, ImportError) as error:
        return render_page([], re.sub(r"^Row \d+: ", "", str(error)), fields)
    return render_page(cards, "", fields, note)


def _read(processor: "MMTransformerProcessor", row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The row with its files decoded once, and a sentence about what was left out."""
    read, note = dict(row), ""
    for part_name, part in row.items():
        if part_name in processor.table_columns:
            continue
        if part_name == "text":
            read[part_name], note = _first_words(part)
            continue
        if isinstance(part, (str, bytes, Mapping)) or hasattr(part, "__fspath__"):
            raise UploadError  # a reader would read it as a path
        content, name = (part.content, f"{part.name}: ") if isinstance(part, Upload) else (part, "")
        try:
            read[part_name] = PARTS[part_name].reader(ReaderContext(processor, _fetch_nothing))(content)
        except ValueError as error:
            raise ValueError(f"{name}{error}") from error
    return read, note


def _fetch_nothing(address: str) -> bytes:
    raise UploadError


def _first_words(text: str) -> tuple[str, str]:
    """The part of a text that one request may hold, cut before tokenisation."""
    most = limits().request_words
    ends = [found.end() for found in itertools.islice(re.finditer(r"\S+", text), most)]
    kept = text[: ends[-1] if ends else 0][: _MOST_LETTERS * most]
    if not text[len(kept) :].strip():
        return text, ""
    return kept, f"Only the first {len(kept.split()):,} words of the text were read (limit: request_words={most:,})."


def _cards(
    model: "MMTransformerForMultiTask",
    processor: "MMTransformerProcessor",
    row: dict[str, Any],
    tasks: Sequence[str],
    check: Callable[[], None],
) -> tuple[list[dict[str, Any]], str]:
    """The cards, and a warning if the row is unlike the training rows."""
    variants = {"": row}
    columns = processor.table_columns
    fields = {name: COLUMNS_FIELD if name in columns else name for name in row}
    for field in dict.fromkeys(fields.values()):
        if rest := {name: part for name, part in row.items() if fields[name] != field}:
            variants[f"without the {_NOUNS[field]}"] = rest
    # One batch: shared inputs of the variants are encoded once.
    wants_words = any(model.tasks[name].is_token_level for name in tasks)
    numbered, longest = list(enumerate(variants.values())), longest_prompt(model.config)
    read = read_rows(numbered, processor, (*ARGUMENTS, *columns), wants_words, max_length=longest)
    check()
    if "error" in read:
        raise ValueError(read["error"])
    inputs = {name: value.to(model.device) for name, value in read["tensors"].items()}
    predictions = Predictions.of(model, inputs)
    answered = predictions.answers(processor, tasks, read["word_index"], advise=True)
    cards = []
    for name in tasks:
        check()
        answers = {variant: one[name] for variant, one in zip(variants, answered, strict=True)}
        cards.append(
            _card(model, processor, row, name, answers, _bars(model.tasks[name], _calibrated(predictions, name)))
        )
    odd = predictions.odd_rows
    return cards, odd_sentence("This row", odd[0]) if odd and odd[0].is_odd else ""


def _card(
    model: "MMTransformerForMultiTask",
    processor: "MMTransformerProcessor",
    row: dict[str, Any],
    task: str,
    answers: dict[str, Any],
    bars: list[tuple[str, float]],
) -> dict[str, Any]:
    """One task: the answers to the row and to the row without each part, and the heat maps of the first."""
    problem, rests_on, words, pictures, sounds = "", "", [], [], []
    try:
        explanation = explain(model, processor, row, task)
        rests_on, words = explanation.rests_on, colored_words(explanation)
        pictures = [(picture_url(image.image), heat_map_url(explanation, image)) for image in explanation.images]
        sounds = [(sound.seconds, sound_colors(explanation, sound)) for sound in explanation.sounds]
    except TimeLimitError:
        raise
    except ValueError as error:
        problem = str(error)
    whole = answers[""]
    shown = {name: model.tasks[task].show_answer(answer) for name, answer in answers.items()}
    return {
        "task": task,
        "answer": shown.pop(""),
        "bars": bars,
        "others": list(shown.items()),
        "rests_on": rests_on,
        "words": words,
        "pictures": pictures,
        "sounds": sounds,
        "problem": problem,
        "advice": [one["text"] for one in whole.get("advice", ())] if isinstance(whole, dict) else [],
    }


def _calibrated(predictions: Predictions, task: str) -> Any:
    return predictions.calibrated_logits(task) if task in predictions.logits else None


def _bars(task: Any, logits: Any) -> list[tuple[str, float]]:
    """The probabilities of the labels, the highest first; for tasks that choose for the whole row."""
    if logits is None or task.is_token_level:
        return []
    values = task.probabilities(logits[:1])
    if values is None:
        return []
    return sorted(zip(task.label_names, values[0].tolist(), strict=True), key=lambda pair: -pair[1])[:8]


def render_page(cards: list[dict[str, Any]], message: str, fields: Sequence[str], note: str = "") -> str:
    """
    The HTML of the answers.

    Args:
        cards: of the tasks; names, labels and texts in them are escaped.
        message: the error; then there are no cards.
        fields: the possible inputs of a row.
        note: a sentence about what was left out.
    """
    given = either(fields)
    return rendered(__package__, "answers.html.jinja", cards=cards, message=message, note=note, given=given)


def either(fields: Sequence[str]) -> str:
    """ "a text or a picture"."""
    return listed([_NOUNS[name] if name == COLUMNS_FIELD else f"a {_NOUNS[name]}" for name in fields], "or")
