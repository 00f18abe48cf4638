"""Starts, prints from and ends several processes of `accelerate launch` and `torchrun`."""

import atexit
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> None:
    """
    Prepares accelerate for the processes of a launch. Call it first.

    Without an accelerator, accelerate must be told to use the CPU. Otherwise each process counts as the only one: all
    do everything and write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def this_process() -> PartialState:
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def say(text: str) -> None:
    """Prints a line from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def leave_processes() -> None:
    """Call it at the end of the process; otherwise torch warns."""
    atexit.register(this_process().destroy_process_group)
