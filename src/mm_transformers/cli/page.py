"""The demo page: type a text, give a picture or a sound, see the answers and what they rest on."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import jinja2
import torch

from ..analysis import explain
from ..analysis.explaining.html import colored_words, heat_map_url, picture_url, sound_colors
from ..model.answering import answer_batch, check_tasks, evaluation_mode
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.pipeline_mm_transformer import PARTS, read_rows
from ..model.processing_mm_transformer import MMTransformerProcessor


_NAMES = {"image": "picture", "video": "video", "audio": "sound", "text": "text"}
_EXAMPLE_SIZE = 256  # pixels; the demo's own 64 are too few to look at
_WITHOUT_FONTS_FROM_ELSEWHERE = ["system-ui", "sans-serif"]


def load_page(model: str, examples: Sequence[Sequence[Any]] = ()) -> Any:
    """
    The page of a saved model, a `gradio.Blocks`: `load_page("my-model").launch()`. Needs the extra `demo`.

    Args:
        model: folder or Hub id.
        examples: rows to begin with: each a text, and a picture and a sound where the model takes them.

    Raises:
        ImportError: if gradio is not installed.
        OSError, ValueError: if there is no such model.
    """
    fused = MMTransformerForMultiTask.from_pretrained(model).eval()
    processor = MMTransformerProcessor.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return make_page(fused.to(device), processor, Path(model).name, examples)


def make_page(model: Any, processor: Any, title: str, examples: Sequence[Sequence[Any]] = ()) -> Any:
    """
    The same for a model that is there already.

    Args:
        model ([`MMTransformerForMultiTask`]): Answers in evaluation mode, whatever mode it is in.
        processor ([`MMTransformerProcessor`]): That of the model.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("The page needs a package more: pip install mm-transformers[demo]") from error

    kinds = [
        "text",
        *(kind for kind, name in (("image", "vision"), ("audio", "audio")) if name in model.config.modalities),
    ]
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\n\nGive {_either(kinds)}. Colours show what an answer rests on, on one scale for all.")
        with gr.Row():
            with gr.Column(scale=1):
                inputs: list[Any] = [gr.Textbox(label="Text", lines=2, submit_btn=False, autofocus=True)]
                if "image" in kinds:
                    sources: Any = ["upload", "clipboard", "webcam"]
                    inputs.append(gr.Image(label="Picture", type="filepath", sources=sources, height=260))
                    # Files that are no pictures come to us, who say so, and not to gradio, which only says "Error".
                    inputs[-1].preprocess = lambda given: given.path if given is not None else None
                if "audio" in kinds:
                    inputs.append(gr.Audio(label="Sound", type="filepath", sources=["upload", "microphone"]))
                tasks = gr.CheckboxGroup(list(model.tasks), value=list(model.tasks), label="Tasks")
                button = gr.Button("Answer", variant="primary")
            with gr.Column(scale=2):
                answers = gr.HTML(label="Answers", value=render_page([], "", kinds))
        answer = _answering(model, processor, kinds)
        button.click(answer, [*inputs, tasks], answers, api_name="answer")
        inputs[0].submit(answer, [*inputs, tasks], answers, api_visibility="private")
        if examples:
            gr.Examples([list(example) for example in examples], inputs)
    return page


def launch_options() -> dict[str, Any]:
    """What [`make_page`] wants to be launched with: nothing is fetched from elsewhere."""
    import gradio as gr

    theme = gr.themes.Base(font=_WITHOUT_FONTS_FROM_ELSEWHERE, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "footer_links": [], "quiet": True}


def _answering(model: Any, processor: Any, kinds: Sequence[str]) -> Callable[..., str]:
    def answer(*given: Any) -> str:
        *parts, tasks = given
        row = {kind: part for kind, part in zip(kinds, parts, strict=True) if part is not None and part != ""}
        return answers_as_html(model, processor, row, tasks, kinds)

    return answer


def answers_as_html(model: Any, processor: Any, row: dict[str, Any], tasks: Sequence[str], kinds: Sequence[str]) -> str:
    """
    What the page shows for a row; a sentence, if it cannot be answered.

    Args:
        row: what was given, of `kinds`.
        tasks: names of the tasks that are ticked.
    """
    if isinstance(row.get("text"), str) and not row["text"].strip():
        row = {kind: part for kind, part in row.items() if kind != "text"}
    if not row:
        return render_page([], f"There is nothing to answer yet: give {_either(kinds)}.", kinds)
    if not tasks:
        return render_page([], "Tick at least one task.", kinds)
    try:
        names = check_tasks(model, tasks)
        variants = {"": row}
        for kind in row:
            rest = {other: part for other, part in row.items() if other != kind}
            if rest:
                variants[f"without the {_NAMES[kind]}"] = rest
        answered = {name: _answer(model, processor, variant, names) for name, variant in variants.items()}
        cards = [
            _card(model, processor, row, task, {name: one[task] for name, one in answered.items()}) for task in names
        ]
    except (ValueError, ImportError) as error:
        told = str(error).removeprefix("Row 0: ")
        for kind, part in row.items():
            if kind != "text":  # where the server keeps what it was given is nobody's business
                told = told.replace(str(part), Path(str(part)).name)
        return render_page([], told, kinds)
    return render_page(cards, "", kinds)


def _answer(model: Any, processor: Any, row: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    wants_words = any(model.tasks[name].is_token_level for name in tasks)
    read = read_rows([(0, row)], processor, tuple(PARTS), wants_words)
    if "error" in read:
        raise ValueError(read["error"])
    inputs = {name: value.to(model.device) for name, value in read["tensors"].items()}
    return answer_batch(model, processor, inputs, tasks, read["word_index"])[0]


def _card(model: Any, processor: Any, row: dict[str, Any], task: str, answers: dict[str, Any]) -> dict[str, Any]:
    """One task: the answers to the row and to what is left without a part, and the heat maps of the first."""
    kind, problem, rests_on, words, pictures, sounds = model.tasks[task], "", "", [], [], []
    try:
        explanation = explain(model, processor, row, task)
        rests_on, words = explanation.rests_on, colored_words(explanation)
        pictures = [(picture_url(image.image), heat_map_url(explanation, image)) for image in explanation.images]
        sounds = [(sound.seconds, sound_colors(explanation, sound)) for sound in explanation.sounds]
    except ValueError as error:
        problem = str(error)
    shown = {name: _shown(kind, answer) for name, answer in answers.items()}
    return {
        "task": task,
        "answer": shown.pop(""),
        "bars": _bars(model, processor, row, kind),
        "others": list(shown.items()),
        "rests_on": rests_on,
        "words": words,
        "pictures": pictures,
        "sounds": sounds,
        "problem": problem,
    }


def _shown(kind: Any, answer: Any) -> str:
    if isinstance(answer, list):
        return ", ".join(one["label"] or "–" for one in answer) or "nothing"
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "none of the labels"
    first, score = next(iter(answer.values())), answer.get("score")
    if isinstance(first, bool):
        # The score is the probability of a match.
        first, score = ("yes", score) if first else ("no", None if score is None else 1 - score)
    told = f"{first:.3g}" if isinstance(first, float) else str(first)
    return told if score is None else f"{told} ({100 * score:.0f}%)"


def _bars(model: Any, processor: Any, row: dict[str, Any], kind: Any) -> list[tuple[str, float]]:
    """How probable each label is, the most probable first; of tasks that choose for the whole row."""
    if kind.kind not in ("classification", "multi_label"):
        return []
    read = read_rows([(0, row)], processor, tuple(PARTS), wants_words=False)
    inputs = {name: value.to(model.device) for name, value in read["tensors"].items()}
    with evaluation_mode(model), torch.no_grad():
        logits = model(**inputs).logits[kind.name][0].float()
    values = logits.softmax(-1) if kind.kind == "classification" else logits.sigmoid()
    pairs = sorted(zip(kind.labels, values.tolist(), strict=True), key=lambda pair: -pair[1])
    return pairs[:8]


def render_page(cards: list[dict[str, Any]], message: str, kinds: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("answers.html.jinja").render(cards=cards, message=message, given=_either(kinds))


def _either(kinds: Sequence[str]) -> str:
    """ "a text or a picture"."""
    names = [f"a {_NAMES[kind]}" for kind in kinds]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def run_page(model: str, is_default: bool, port: Optional[int]) -> None:
    """
    Serves the page of a saved model until it is interrupted.

    Args:
        is_default: whether nobody has named the model.

    Raises:
        ValueError, OSError: one sentence.
    """
    if is_default and not Path(model).exists():
        raise ValueError(
            f"There is no model in {model} yet: train one by mm-transformers demo, or name yours by --model."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            page = load_page(model, demo_examples(Path(folder)) if is_default else ())
        except ImportError as error:
            raise ValueError(str(error)) from error
        page.launch(server_port=port, **launch_options())


def demo_examples(folder: Path, num_texts: int = 3) -> list[list[str]]:
    """
    Rows of the embedded data set's test split, for the model that knows nothing else: texts, each with two pictures
    that turn its sentiment. The pictures become files in `folder`.
    """
    from ..data.embedded.dataset import GRID, load_demo_dataset

    by_text: dict[str, dict[str, Any]] = {}
    for row in load_demo_dataset(1, 1, len(GRID), image_size=_EXAMPLE_SIZE)["test"]:
        by_text.setdefault(row["text"], {}).setdefault(row["sentiment"], row["image"])
    examples: list[list[str]] = []
    for text, pictures in [(text, found) for text, found in by_text.items() if len(found) > 1][:num_texts]:
        for picture in list(pictures.values())[:2]:
            examples.append([text, str(folder / f"{len(examples)}.png")])
            picture.save(examples[-1][1])
    return examples
