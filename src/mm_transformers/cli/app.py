"""The commands; each imports what it needs when it is called, so that `--help` is quick."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Text with pictures, several tasks at once."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each of the three models.")] = 400,
    output_dir: Annotated[Path, typer.Option(help="Where model, picture and results go.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed of the data, the weights and the order of the rows.")] = 0,
    fusion: Annotated[
        str, typer.Option(help="cross_attention, co_attention, bottleneck, merged or late.")
    ] = "cross_attention",
) -> None:
    """Train a small model on the data set that comes with the package, and show what the pictures are good for."""
    from .demo import run_demo

    with _errors_as_sentences():
        run_demo(steps=steps, output_dir=output_dir, seed=seed, fusion_type=fusion)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML or JSON file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys of the recipe with other values, such as training.learning_rate=1e-4."),
    ] = None,
) -> None:
    """
    Train a model as a recipe says, or go on where that stopped.

    A recipe has these sections (a commented one is examples/recipe.yaml of the repository):

    \b
    data      train, validation, test: CSV, JSON lines or Parquet files;
              or dataset_name (of the Hub, or a folder);
              validation_fraction, max_train_samples, max_eval_samples,
              image_root, label_separator, on_bad_file, sampling_rate,
              max_length, pad_to_multiple_of
    columns   text, image, video, audio: what these columns are called
    model     text, vision, audio: encoders, by Hub id or folder;
              all fields of MMTransformerConfig (fusion_type, ...);
              revision, dtype, attn_implementation, backend, ...
    tasks     a list; each task has a name, a kind and the options of its
              kind; labels not given are those of the training rows
    training  output_dir, and all fields of transformers.TrainingArguments;
              predict_with_generate, generation_num_beams,
              generation_max_length

    Relative paths in a recipe start at its folder, those on the command line at the current one. On several GPUs:
    accelerate launch -m mm_transformers.cli train recipe.yaml
    """
    from .train import leave_processes, run_training

    with _errors_as_sentences():
        run_training(recipe, overrides or [])
    leave_processes()


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
