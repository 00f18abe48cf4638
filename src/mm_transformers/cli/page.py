"""The demo page: type a text, add a picture, a sound or numbers, see the answers and their explanations."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from ..data.markdown import plain_markdown
from ..model.limits import limits
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from .page_answers import COLUMNS_FIELD, answers_as_html, either, render_page
from .page_examples import demo_examples, table_examples
from .page_fields import MOST_OPEN, ColumnField, column_fields, media_fields
from .request_filter import RequestFilter
from .uploads import REFUSAL, UploadError, check_inputs, opened_upload, upload_folder


_AT_ONCE = 2  # requests
_SESSIONS = 64  # whose last inputs and answers gradio keeps in memory
_WITHOUT_FONTS_FROM_ELSEWHERE = ["system-ui", "sans-serif"]


def load_page(model: str, examples: Sequence[Sequence[Any]] = ()) -> Any:
    """
    The page of a saved model, a `gradio.Blocks`: `load_page("my-model").launch()`. Needs the extra `demo`.

    Clients are strangers: the page reads only the files that they uploaded to it, and fetches no address.
    [`~mm_transformers.model.limits.Limits`] bound the cost of a request.

    Args:
        model: folder or Hub id.
        examples: example rows: each a text, then a picture and a sound if the model takes them, then the cells of
            columns.

    Raises:
        ImportError: if gradio is not installed.
        OSError, ValueError: if there is no such model.
    """
    fused = MMTransformerForMultiTask.from_pretrained(model).eval()
    processor = MMTransformerProcessor.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return make_page(fused.to(device), processor, Path(model).name, examples)


def make_page(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    title: str,
    examples: Sequence[Sequence[Any]] = (),
) -> Any:
    """
    The page of a loaded model; see [`load_page`].

    Args:
        model ([`MMTransformerForMultiTask`]): Runs in evaluation mode, whatever its mode.
        processor ([`MMTransformerProcessor`]): The processor of the model.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("The page needs `gradio`: pip install mm-transformers[demo]") from error

    columns = column_fields(model.config)
    fields = [*media_fields(model.config), *([COLUMNS_FIELD] if columns else [])]
    upload_folder()  # before gradio asks for it
    kept = limits().upload_seconds
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(max(kept // 6, 1), kept)) as page:
        told = f"Give {either(fields)}. Colours show which parts an answer depends on, on one scale for all."
        gr.Markdown(f"# {plain_markdown(title)}\n\n{told}")
        with gr.Row():
            with gr.Column(scale=1):
                inputs: list[Any] = []
                if "text" in fields:
                    inputs.append(gr.Textbox(label="Text", lines=2, submit_btn=False, autofocus=True))
                if "image" in fields:
                    sources: Any = ["upload", "clipboard", "webcam"]
                    inputs.append(gr.Image(label="Picture", type="filepath", sources=sources, height=260))
                if "audio" in fields:
                    inputs.append(gr.Audio(label="Sound", type="filepath", sources=["upload", "microphone"]))
                if columns:
                    with gr.Accordion("Numbers and categories", open=len(columns) <= MOST_OPEN):
                        gr.Markdown("An empty field is a missing value.")
                        inputs += [column.component() for column in columns]
                tasks = gr.CheckboxGroup(list(model.tasks), value=list(model.tasks), label="Tasks")
                button = gr.Button("Answer", variant="primary")
            with gr.Column(scale=2):
                answers = gr.HTML(label="Answers", value=render_page([], "", fields))
        answer = _answering(model, processor, fields, columns)
        # The raw value from the client: gradio's own file readers only report "Error", and fetch addresses.
        options: dict[str, Any] = {"preprocess": False, "concurrency_limit": _AT_ONCE}
        button.click(answer, [*inputs, tasks], answers, api_name="answer", **options)
        if "text" in fields:
            inputs[0].submit(answer, [*inputs, tasks], answers, api_visibility="private", **options)
        if examples:
            gr.Examples([list(example) for example in examples], inputs[: len(examples[0])])
            for component in inputs:
                component.keep_in_cache |= component.temp_files  # the examples are no uploads
    page.queue(max_size=limits().waiting_requests, api_open=False)
    _guard(page)
    return page


def _guard(page: Any) -> None:
    """Refuses values that are no uploads before gradio reads them, and launches with [`launch_options`]."""
    import gradio as gr

    validate, launch = page.validate_inputs, page.launch

    def validate_inputs(block_fn: Any, inputs: list[Any]) -> None:
        try:
            check_inputs(inputs)
        except UploadError as error:
            raise gr.Error(REFUSAL, print_exception=False) from error
        validate(block_fn, inputs)

    page.validate_inputs = validate_inputs
    page.launch = lambda **options: launch(**{**launch_options(), **options})


def launch_options() -> dict[str, Any]:
    """The launch options of [`make_page`]: no fetching from elsewhere, and limits for clients."""
    import gradio as gr
    from starlette.middleware import Middleware

    theme = gr.themes.Base(font=_WITHOUT_FONTS_FROM_ELSEWHERE, font_mono=["ui-monospace", "monospace"])
    return {
        "theme": theme,
        "footer_links": [],
        "quiet": True,
        "max_file_size": limits().upload_bytes,
        "state_session_capacity": _SESSIONS,
        "app_kwargs": {"middleware": [Middleware(RequestFilter)]},
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
    }


def _answering(
    model: MMTransformerForMultiTask,
    processor: MMTransformerProcessor,
    fields: Sequence[str],
    columns: Sequence[ColumnField],
) -> Callable[..., str]:
    parts = [field for field in fields if field != COLUMNS_FIELD]

    def answer(*given: Any) -> str:
        *values, tasks = given
        try:
            row = {
                name: value if name == "text" else opened_upload(value)
                for name, value in zip(parts, values[: len(parts)], strict=True)
                if value is not None and value != ""
            }
            cells = zip(columns, values[len(parts) :], strict=True)
            row |= {column.name: cell for column, value in cells if (cell := column.cell(value)) is not None}
        except ValueError as error:
            return render_page([], str(error), fields)
        return answers_as_html(model, processor, row, tasks, fields)

    return answer


def run_page(model: str, is_default: bool, port: Optional[int], rows: Optional[Path] = None) -> None:
    """
    Serves the page of a saved model until it is interrupted.

    Args:
        is_default: whether the user has not named the model.
        rows: a table, whose first rows become examples.

    Raises:
        ValueError, OSError: one sentence.
    """
    if is_default and not Path(model).exists():
        raise ValueError(
            f"There is no model in {model} yet: train one by `mm-transformers demo`, or give yours by --model."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            examples: Sequence[Sequence[Any]] = ()
            if rows is not None:
                examples = table_examples(rows, model, Path(folder))
            elif is_default:
                examples = demo_examples(Path(folder))
            page = load_page(model, examples)
        except ImportError as error:
            raise ValueError(str(error)) from error
        try:
            page.launch(server_port=port)
        except OSError as error:  # from gradio, about its own options
            wanted = f"port {port} is" if port is not None else "all ports from 7860 are"
            raise ValueError(
                f"The page cannot be served: {wanted} in use, or not allowed. Choose another --port."
            ) from error
