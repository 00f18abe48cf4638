"""Training progress as a bar instead of a line per log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging


# The names of losses in logs, and on the screen.
_LOSSES = {"loss": "loss", "eval_loss": "validation loss"}
# The bars of the package that take long: the outputs of the encoders, the linear start, the report. Those of
# transformers, for loading and writing files, are many and short.
_STAGES = ("Encoding", "linear start", "ablate", "answering")


class RichProgressCallback(TrainerCallback):
    """One bar per training, with the loss of the last log behind it."""

    def __init__(self, description: str, console: Console):
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self.bar = self.progress.add_task(description, total=None, loss="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.reset(self.bar, total=state.max_steps, completed=state.global_step, loss="")
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        losses = [f"{_LOSSES[name]} {value:.3f}" for name, value in (logs or {}).items() if name in _LOSSES]
        if losses:
            self.progress.update(self.bar, loss=", ".join(losses))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.stop()


def use_rich_progress(trainer: Trainer, description: str, console: Console) -> None:
    """Replaces the output of the Trainer by the bar."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RichProgressCallback(description, console))


@contextmanager
def one_bar_at_a_time() -> Iterator[None]:
    """
    Within the block each long stage has one bar on a terminal, which goes when the stage ends; other bars are hidden.

    In a file, bars would be many lines.
    """
    on_terminal = sys.stderr.isatty()

    def made(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        is_stage = (options.get("desc") or "").startswith(_STAGES)
        silent = options.get("disable") or not (is_stage and on_terminal)
        return factory(*args, **{**options, "disable": silent, "leave": False})

    before, had_bars = logging.set_tqdm_hook(made), not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
        if had_bars:
            datasets.enable_progress_bars()
