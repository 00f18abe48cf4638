"""Several processes, as `accelerate launch` and `torchrun` start them: how they begin, speak and end."""

import atexit
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> None:
    """
    To be called first. Without an accelerator, accelerate must be told so: otherwise each process takes itself for the
    only one, and all would do everything and write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def this_process() -> PartialState:
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def say(text: str) -> None:
    """One line, from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def leave_processes() -> None:
    """At the end of this process; torch complains of processes that end without it."""
    atexit.register(this_process().destroy_process_group)
