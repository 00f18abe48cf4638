"""The commands; each imports what it needs when it is called, so that `--help` is quick."""

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

    try:
        run_demo(steps=steps, output_dir=output_dir, seed=seed, fusion_type=fusion)
    except ValueError as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
