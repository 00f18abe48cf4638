"""The commands. Each imports its modules when it is called, so that `--help` is quick."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__


if TYPE_CHECKING:
    from .predict import Reading

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mm-transformers {__version__}")
        raise typer.Exit


@app.callback()
def main(
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit on the size of pictures, sounds, videos and texts, such as image_pixels=2e8 (see "
            "docs/limits.md). Can be repeated."
        ),
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="A module of yours with kinds of tasks, columns or metrics, such as my_kinds. May be given again.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Text with pictures, several tasks at once."""
    for name in modules or ():
        _import(name)
    if limit:
        from ..model.limits import set_limits

        with _errors_as_sentences():
            set_limits(**dict(map(_limit, limit)))


def _import(name: str) -> None:
    from ..sharing.own_modules import import_own_module

    with _errors_as_sentences():
        try:
            import_own_module(name)
        except ImportError as error:
            raise ValueError(f"--import {name}: {error}.") from error


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--limit takes a name and a number, as in image_pixels=2e8, but got {text!r}.") from None


# No file can set this, neither a recipe nor a model: only the user of the command.
AllowUrls = Annotated[
    bool,
    typer.Option(
        "--allow-urls", help="Fetch pictures, sounds and videos whose cells hold addresses of the public Internet."
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="Fetch from this host only, which may be in a private network. Can be repeated.",
    ),
]


def _allowed(allow_urls: bool, hosts: list[str] | None) -> bool | list[str]:
    """The `allow_urls` of `MMDataCollator`."""
    if allow_urls and hosts:
        raise ValueError("Give either --allow-urls or --allow-host.")
    return hosts or allow_urls


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each of the three models.")] = 200,
    output_dir: Annotated[Path, typer.Option(help="Folder for the model, the plot and the results.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the data, the weights and the order of the rows.")] = 0,
    fusion: Annotated[
        str, typer.Option(help="cross_attention, co_attention, bottleneck, merged or late.")
    ] = "cross_attention",
    ui: Annotated[
        bool,
        typer.Option("--ui", help="Do not train: open a page in the browser to try a model. Needs the extra `demo`."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="With --ui: folder or Hub id of the model. Default: the model that this command trained."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="With --ui: the port. Default: the first free port from 7860."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="With --ui: a table; its first complete rows become examples on the page."),
    ] = None,
) -> None:
    """Train a small model on the data set of the package, and show what the pictures contribute."""
    from .demo import run_demo

    with _errors_as_sentences():
        if ui:
            from .page import run_page

            run_page(model or str(output_dir / "model"), model is None, port, examples)
        else:
            run_demo(steps=steps, output_dir=output_dir, seed=seed, fusion_type=fusion)


@app.command()
def space(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id of a model.")],
    output: Annotated[Path, typer.Option(help="Output folder. Existing files are kept.")] = Path("space"),
) -> None:
    """Write the files with which the Hub runs the demo page of a model as a Space."""
    from .processes import say
    from .space import write_space

    with _errors_as_sentences():
        written = write_space(output, model)
        say(f"Wrote {', '.join(map(str, written))}." if written else f"Nothing to write: {output} has all files.")


TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code that comes with the encoders. A recipe cannot set this."),
]
_TRUST = ["model.trust_remote_code=true"]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML or JSON file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="New values for keys of the recipe, such as training.learning_rate=1e-4."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_urls: AllowUrls = False,
    allow_host: AllowHost = None,
) -> None:
    """
    Train a model by a recipe, or resume its training.

    A recipe has these sections. A commented one is examples/recipe.yaml of the repository.

    \b
    data      train, validation, test: CSV, JSON lines or Parquet files;
              or dataset_name (of the Hub, or a folder).
              validation_fraction, max_train_samples, max_eval_samples,
              image_root, label_separator, on_bad_file, sampling_rate,
              max_length, pad_to_multiple_of,
              feature_cache: folder for the outputs of frozen encoders.
    columns   text, image, video, audio: the names of these columns.
    model     text, vision, audio: encoders, by Hub id or folder;
              all fields of MMTransformerConfig (fusion_type, ...);
              revision, dtype, attn_implementation, backend, ...
    tasks     a list; each task has a name, a kind and the options of its
              kind. By default, labels are those of the training rows.
    training  output_dir, and all fields of transformers.TrainingArguments;
              encoder_learning_rate, fusion_learning_rate,
              head_learning_rate, layerwise_lr_decay;
              predict_with_generate, generation_num_beams,
              generation_max_length.

    Relative paths in a recipe start at its folder, those on the command line at the current one. A recipe may come from
    a stranger. So options that run code or send data away count only on the command line: model.trust_remote_code,
    training.push_to_hub, training.report_to, training.deepspeed. On several GPUs: accelerate launch -m
    mm_transformers.cli train recipe.yaml
    """
    from .processes import join_processes, leave_processes
    from .train import run_training

    join_processes()
    with _errors_as_sentences():
        run_training(
            recipe, [*(overrides or []), *(_TRUST if trust_remote_code else [])], _allowed(allow_urls, allow_host)
        )
    leave_processes()


def _with_options(options: Callable[..., Any], name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of a function to a command, which gets the result of the function as the argument `name`."""
    added = inspect.signature(options).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [part for part in inspect.signature(command).parameters.values() if part.name != name]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            with _errors_as_sentences():
                result = options(**{key: given.pop(key) for key in added})
            command(**given, **{name: result})

        # Typer reads both.
        run.__signature__ = inspect.Signature([*own, *added.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in (*own, *added.values())}
        return run

    return decorate


TableArgument = Annotated[Path, typer.Argument(metavar="TABLE", help="CSV, JSON lines or Parquet file.")]
Predict = Annotated[
    str,
    typer.Option(
        help="Columns to predict, separated by commas: category,price. With a kind: price:regression. Kinds: "
        "classification, multi_label, regression, generation."
    ),
]
ModelFolder = Annotated[Path, typer.Option(help="Folder of the model, its recipe and its report.")]
ColumnKinds = Annotated[
    list[str] | None,
    typer.Option(
        help="The kind of a column, if the detected kind is wrong: zip:category. Kinds: text, image, video, audio, "
        "number, date, category, ignore. Can be repeated."
    ),
]
TextEncoder = Annotated[
    str | None, typer.Option("--text", help="Text encoder, by Hub id or folder. The default reads English.")
]
VisionEncoder = Annotated[str | None, typer.Option("--vision", help="Vision encoder, by Hub id or folder.")]
AudioEncoder = Annotated[str | None, typer.Option("--audio", help="Audio encoder, by Hub id or folder.")]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        help="fast: encoders are not trained; balanced: those of texts and sounds are, for up to 5 epochs; best: up to "
        "20.",
    ),
]
Validation = Annotated[
    Path | None, typer.Option(help="Table of validation rows. Default: 15% of the rows are held out.")
]
Test = Annotated[Path | None, typer.Option(help="Table of test rows. Default: 15% of the rows are held out.")]
Group = Annotated[
    str | None,
    typer.Option(help="Column whose equal values stay together in the split, such as a seller. It is no input."),
]
PathsFrom = Annotated[
    str | None, typer.Option("--image-root", help="Folder for relative paths. Default: the folder of the table.")
]
OnBadFileOfTraining = Annotated[
    str,
    typer.Option(
        "--on_bad_file",
        "--on-bad-file",
        help="What to do if a picture or sound cannot be read. raise: stop; drop: treat it as missing.",
    ),
]


def _planning(
    text: TextEncoder = None,
    vision: VisionEncoder = None,
    audio: AudioEncoder = None,
    preset: PresetName = "balanced",
    validation: Validation = None,
    test: Test = None,
    group: Group = None,
    image_root: PathsFrom = None,
    on_bad_file: OnBadFileOfTraining = "raise",
) -> dict[str, Any]:
    return dict(locals())


@app.command()
@_with_options(_planning, "planning")
def fit(
    table: TableArgument,
    predict: Predict,
    planning: dict[str, Any],
    output: ModelFolder = Path("fitted-model"),
    column: ColumnKinds = None,
    minutes: Annotated[
        float | None, typer.Option(help="Limit of the whole run, in minutes: fewer epochs, then fewer rows.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(help="Measure by cross-validation over this number of folds, instead of held-out test rows."),
    ] = None,
    report_to: Annotated[
        str | None, typer.Option(help="Tracker of losses and metrics: trackio, wandb, tensorboard, ... Default: none.")
    ] = None,
    allow_urls: AllowUrls = False,
    allow_host: AllowHost = None,
) -> None:
    """
    Train a model on a table: it finds out what each column holds, and writes model, recipe and report.

    Held-out rows measure the model beside a linear model, the text alone and a constant answer. The report shows
    errors, explanations, what each input is good for, and labels that may be wrong.
    """
    with _errors_as_sentences():
        from .fit import run_fit

        training = {} if report_to is None else {"report_to": report_to}
        options = dict(minutes=minutes, folds=folds, training=training, allow_urls=_allowed(allow_urls, allow_host))
        run_fit(table, predict, output, column or [], **options, **planning)


@app.command()
@_with_options(_planning, "planning")
def init(
    table: TableArgument,
    predict: Predict,
    planning: dict[str, Any],
    output: ModelFolder = Path("fitted-model"),
    column: ColumnKinds = None,
) -> None:
    """Write the recipe with which `fit` would train on a table, without a training."""
    with _errors_as_sentences():
        from .fit import run_init

        run_init(table, predict, output, column or [], **planning)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a trained model.")]
DataArgument = Annotated[Path, typer.Argument(metavar="FILE", help="CSV, JSON lines or Parquet file.")]
RowsArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="CSV, JSON lines or Parquet file, or a folder of pictures or sounds.")
]
BatchSize = Annotated[int, typer.Option("--batch_size", "--batch-size", min=1, help="Rows per batch and process.")]

NumWorkers = Annotated[
    int, typer.Option("--num_workers", "--num-workers", min=0, help="Processes that read files in the background.")
]
EscapeFormulas = Annotated[
    bool,
    typer.Option(
        "--escape-formulas/--no-escape-formulas",
        help="In CSV, put ' before texts that begin like a formula (=, +, -, @), because a spreadsheet would run them.",
    ),
]


# Underscores, as the columns of the collator and the options of transformers have them; dashes, as other commands do.
_COLUMN_HELP = "Default: the column in the recipe of the model, or the name of the modality."
_COLUMNS_HELP = f"{_COLUMN_HELP} Can be repeated."
TextColumn = Annotated[list[str] | None, typer.Option("--text_column", "--text-column", help=_COLUMNS_HELP)]
ImageColumn = Annotated[list[str] | None, typer.Option("--image_column", "--image-column", help=_COLUMNS_HELP)]
VideoColumn = Annotated[str | None, typer.Option("--video_column", "--video-column", help=_COLUMN_HELP)]
AudioColumn = Annotated[list[str] | None, typer.Option("--audio_column", "--audio-column", help=_COLUMNS_HELP)]
ImageRoot = Annotated[
    str | None,
    typer.Option("--image_root", "--image-root", help="Folder for relative paths. Default: the folder of the file."),
]
OnBadFile = Annotated[
    str | None,
    typer.Option(
        "--on_bad_file",
        "--on-bad-file",
        help="What to do if a picture or sound cannot be read. raise: stop; drop: treat it as missing. Default: raise, "
        "or what the recipe of the model says.",
    ),
]


def _reading(
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    video_column: VideoColumn = None,
    audio_column: AudioColumn = None,
    image_root: ImageRoot = None,
    on_bad_file: OnBadFile = None,
    allow_urls: AllowUrls = False,
    allow_host: AllowHost = None,
) -> "Reading":
    from .predict import Reading

    named = {"text": text_column or [], "image": image_column or [], "audio": audio_column or []}
    columns = {part: names if len(names) > 1 else next(iter(names), None) for part, names in named.items()}
    return Reading({**columns, "video": video_column}, image_root, on_bad_file, _allowed(allow_urls, allow_host))


_reads_rows = _with_options(_reading, "reading")


@app.command()
@_reads_rows
def evaluate(
    model: ModelArgument,
    file: DataArgument,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the metrics to.")] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Also score without each modality, and with exchanged inputs. The plot is written beside the output.",
        ),
    ] = False,
    slices: Annotated[
        list[str] | None,
        typer.Option(
            "--slice", help="With --ablate: a column; also score the rows of each of its values. Can be repeated."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    *,
    reading: "Reading",
) -> None:
    """Measure a model on the labelled rows of a file."""
    from .predict import run_evaluation
    from .processes import join_processes, leave_processes

    join_processes()
    with _errors_as_sentences():
        if slices and not ablate:
            raise ValueError("--slice needs --ablate: give both.")
        run_evaluation(model, file, output, batch_size, reading, ablate, slices or ())
    leave_processes()


@app.command()
@_reads_rows
def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model. Its calibration is written there.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="CSV, JSON lines or Parquet file. Default: the test rows of the recipe in the folder of the model.",
        ),
    ] = None,
    training_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the rows of the training, with which odd rows are compared. Default: a random half of the "
            "rows of FILE, or without FILE the training rows of the recipe."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write the measures to. The plot is written beside it.")
    ] = None,
    min_rows: Annotated[
        int, typer.Option(min=2, help="Groups of rows with fewer labels than this are calibrated together.")
    ] = 50,
    hide: Annotated[
        bool, typer.Option("--hide/--no-hide", help="Fill small groups with rows of which parts are hidden.")
    ] = True,
    batch_size: BatchSize = 32,
    *,
    reading: "Reading",
) -> None:
    """
    Fit how far to trust the answers of a model, on labelled rows that it was not trained on.

    Each group of rows (text alone, picture alone, both, ...) gets temperatures for its probabilities, and sets and
    intervals that hold the truth as often as promised (predict --coverage 0.9).
    """
    from .calibrate import run_calibration

    with _errors_as_sentences():
        run_calibration(model, file, training_file, output, min_rows, hide, batch_size, reading)


@app.command()
@_reads_rows
def explain(
    model: ModelArgument,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="CSV, JSON lines or Parquet file with the rows of the report."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Output file. For a file of rows: HTML. For one row: PNG, SVG, PDF or JSON.")
    ] = Path("report.html"),
    task: Annotated[
        list[str] | None, typer.Option(help="Task to explain. Default: all tasks. Can be repeated.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="chefer, rollout, gradient_attention, attention, integrated_gradients or random."),
    ] = "chefer",
    text: Annotated[str | None, typer.Option(help="Instead of a file: the text of one row.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="The picture of that row. Can be repeated.")] = None,
    video: Annotated[str | None, typer.Option(help="The video of that row.")] = None,
    audio: Annotated[str | None, typer.Option(help="The sound of that row.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="For one row: the answer to explain. Default: the answer of the model.")
    ] = None,
    word: Annotated[
        int | None, typer.Option(min=0, help="For one row: the word whose answer is explained, counted from 0.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Largest number of rows of each kind on the page.")] = 6,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also measure the contribution of each modality.")] = False,
    batch_size: BatchSize = 32,
    *,
    reading: "Reading",
) -> None:
    """
    Explain the answers of a model.

    For a file of rows, write a page with heat maps. It shows the confusion of labels, the worst and the most confident
    errors, and some other rows. For one row, draw a picture.
    """
    from .explain import explain_one, explain_rows

    with _errors_as_sentences():
        row = {"text": text, "image": image or None, "video": video, "audio": audio}
        row = {name: value for name, value in row.items() if value is not None}
        if (file is None) == (not row):
            raise ValueError("Give either a file of rows or one row by --text, --image, --video and --audio.")
        if file is not None:
            explain_rows(model, file, output, task, method, examples, ablate, batch_size, reading)
        else:
            explain_one(model, row, output, task, method, answer, word)


@app.command()
@_reads_rows
def card(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    data: Annotated[Path | None, typer.Option(help="CSV, JSON lines or Parquet file to measure the model on.")] = None,
    split: Annotated[str, typer.Option(help="Name of these rows in the card.")] = "test",
    ablation: Annotated[
        bool, typer.Option("--ablate/--no-ablate", help="Measure the contribution of each modality.")
    ] = True,
    name: Annotated[str | None, typer.Option(help="Hub id in the example of the card. Default: the folder.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a data set. Can be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the model.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Code of a language. Can be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag. Can be repeated.")] = None,
    batch_size: BatchSize = 32,
    *,
    reading: "Reading",
) -> None:
    """
    Write the model card README.md, or renew the generated parts of an existing one.

    What you wrote, changed or removed in the card stays so.
    """
    from .card import run_card
    from .processes import join_processes, leave_processes

    join_processes()
    with _errors_as_sentences():
        said = {"datasets": dataset, "license": license, "language": language, "tags": tag}
        run_card(model, data, split, ablation, name, said, batch_size, reading)
    leave_processes()


@app.command()
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="Folder for the graphs. It must not exist, or be empty.")],
    format: Annotated[str, typer.Option(help="onnx, or torch (programs of torch.export).")] = "onnx",
    dtype: Annotated[str, typer.Option(help="float32, or int8 (only onnx).")] = "float32",
) -> None:
    """Export a model to ONNX or torch.export, and compare the result with it."""
    from .export import run_export

    with _errors_as_sentences():
        run_export(model, output, format, dtype)


@app.command()
@_reads_rows
def predict(
    model: ModelArgument,
    file: RowsArgument,
    output: Annotated[Path, typer.Option(help="CSV, JSON lines or Parquet file to write the rows and answers to.")],
    tasks: Annotated[str | None, typer.Option(help="Names of the tasks, separated by commas. Default: all.")] = None,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = 0,
    num_beams: Annotated[
        int | None, typer.Option("--num_beams", "--num-beams", min=1, help="Beams of tasks that write text.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write a column with the probability of each label.")
    ] = False,
    coverage: Annotated[
        float | None,
        typer.Option(help="Also write sets or intervals that hold the truth in this share of rows (see calibrate)."),
    ] = None,
    escape_formulas: EscapeFormulas = True,
    *,
    reading: "Reading",
) -> None:
    """
    Answer the rows of a file, of any size, or the pictures and sounds of a folder; labels are not needed.

    The output has the rows in their order. Each task has a column for its answer (topic), and columns for further parts
    of the answer (topic_score). With --probabilities, each label has one, too (topic_probability_animals). If a column
    of the input has one of these names, it gets the suffix _input. The file appears when it is complete.
    """
    from .predict import run_prediction
    from .processes import join_processes, leave_processes

    join_processes()
    with _errors_as_sentences():
        names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else None
        run_prediction(
            model, file, output, names, batch_size, num_workers, num_beams, reading, escape_formulas, probabilities,
            coverage,
        )  # fmt: skip
    leave_processes()


@app.command()
@_reads_rows
def embed(
    model: ModelArgument,
    file: RowsArgument,
    output: Annotated[
        Path,
        typer.Option(help="Parquet, JSON lines or CSV file for the rows and vectors; .safetensors for vectors alone."),
    ],
    task: Annotated[
        str | None, typer.Option(help="Retrieval task whose vectors are written. Default: means of the states.")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale all vectors to length 1.")] = False,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = 0,
    escape_formulas: EscapeFormulas = True,
    *,
    reading: "Reading",
) -> None:
    """
    Write the vectors of rows, or of the pictures and sounds of a folder, for search, clustering or other models.

    Each row has the vector of all its inputs (fused_embedding), and one for each modality (text_embedding,
    vision_embedding, ...), which is empty if the row lacks it.
    """
    from .embed import run_embedding
    from .processes import join_processes, leave_processes

    join_processes()
    with _errors_as_sentences():
        run_embedding(model, file, output, task, normalize, batch_size, num_workers, reading, escape_formulas)
    leave_processes()


@app.command()
def serve(
    context: typer.Context,
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with its own copy of the model.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch_size", "--batch-size", min=1, help="The most rows of one forward pass.")
    ] = 32,
    wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds for which a row waits for others that share its forward pass.")
    ] = 3.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Rows that may wait in one process; further requests get the status 429.")
    ] = 512,
    timeout: Annotated[float, typer.Option(help="Seconds of one request; then it gets the status 503.")] = 30.0,
    streams: Annotated[int, typer.Option(min=1, help="Texts that one process may stream at the same time.")] = 4,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch in one process. Default: cores / workers.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0. Default: the GPU, if there is one.")
    ] = None,
) -> None:
    """
    Answer rows over HTTP: /predict, /embed, /generate, /health, /metrics, and a page of the API at /docs.

    Rows of different clients that arrive within milliseconds share a forward pass. Needs the extra `serve`.
    """
    from .serve import run_server

    with _errors_as_sentences():
        modules = (context.parent.params.get("modules") if context.parent else None) or ()
        options = {
            "batch_rows": batch_size, "batch_seconds": wait / 1000, "waiting_rows": queue, "timeout": timeout,
            "streams": streams, "threads": threads, "device": device,
        }  # fmt: skip
        run_server(model, host, port, workers, options, modules)


@app.command("compare-tasks")
def compare_tasks(
    recipe: Annotated[Path, typer.Argument(help="Recipe, as for `train`: a YAML or JSON file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="New values for keys of the recipe, such as training.max_steps=500."),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", "--output-dir", help="Folder for the table, the plot and the results.")
    ] = Path("comparison"),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model, with different seeds.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    allow_urls: AllowUrls = False,
    allow_host: AllowHost = None,
) -> None:
    """
    Train each task of a recipe alone and all of them jointly, and show what the tasks gained.

    All trainings have the same steps, rows and seeds; a task alone is trained without the labels of the others. Results
    are saved after each training, so a stopped comparison can be resumed.
    """
    from .compare_tasks import run_compare_tasks
    from .processes import join_processes, leave_processes

    join_processes()
    with _errors_as_sentences():
        given = [*(overrides or []), *(_TRUST if trust_remote_code else [])]
        run_compare_tasks(recipe, given, output_dir, seeds, _allowed(allow_urls, allow_host))
    leave_processes()


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # transformers reports missing packages as one or the other; other errors are bugs.
        known = ("to be installed", "A process that reads rows was killed", "DataLoader worker (pid")
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in known):
            raise
        from ..model.messages import one_line

        typer.secho(f"Error: {one_line(error, 2000)}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
