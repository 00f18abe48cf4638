"""Writes a checkpoint in a staging folder, and moves it to its place when it is complete."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .folders import (
    SAVING,
    make_own_folder,
    newest_complete_checkpoint,
    own_folder,
    publish,
    remove_own_folder,
    why_not_written,
    write_manifest,
)


def staging_folder(run_dir: str) -> str:
    """The folder in which checkpoints are written before they move to `run_dir`."""
    return str(own_folder(run_dir, SAVING))


@contextmanager
def staged_checkpoint(run_dir: str, step: int, writes: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """
    Yields the folder to write a checkpoint into. After the block the checkpoint is in its place, with a manifest.

    Args:
        run_dir: the folder of the checkpoints.
        step: number of the optimiser step.
        writes: whether this process writes the files that all share.
        wait: waits for the other processes.

    Raises:
        OSError: if a file cannot be written; earlier checkpoints stay unchanged.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if writes:
        make_own_folder(run_dir, SAVING)
    wait()
    staged = Path(staging_folder(run_dir), name)
    try:
        yield staged
        if writes:
            write_manifest(staged)
            publish(staged, os.path.join(run_dir, name))
            remove_own_folder(run_dir, SAVING)
    except Exception as error:
        remove_own_folder(run_dir, SAVING)
        reason = why_not_written(error, run_dir)
        if reason is None:
            raise
        newest = newest_complete_checkpoint(run_dir)
        raise OSError(
            f"The checkpoint of step {step} could not be written to {run_dir} ({reason}); "
            f"{'there is none before it' if newest is None else f'{Path(newest).name} is the newest, unharmed'}: "
            "free space on the disk, and start again with resume_from_checkpoint=True."
        ) from error
    wait()
