"""Stops a model that takes too long, between its layers."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook


class TimeLimitError(ValueError):
    """The time limit is exceeded."""


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[..., None]]:
    """
    Stops a model of this thread before its next layer once the time is over.

    Code between two layers is not interrupted. Such code must call the function that the block yields.

    Args:
        seconds: the longest time of the block.

    Raises:
        TimeLimitError: one sentence.
    """
    end, thread = time.monotonic() + seconds, threading.get_ident()

    def check(*_: Any) -> None:
        if threading.get_ident() == thread and time.monotonic() > end:
            raise TimeLimitError(
                f"This takes longer than the limit of {seconds:g} seconds (request_seconds): give a shorter text, a "
                "smaller file or fewer tasks."
            )

    hook = register_module_forward_pre_hook(check)
    try:
        yield check
    finally:
        hook.remove()
