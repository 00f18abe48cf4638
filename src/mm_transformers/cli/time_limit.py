"""Ends what takes too long, between the layers of a model."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook


class TimeLimitError(ValueError):
    """Something took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[..., None]]:
    """
    Within the block, a model that this thread runs stops before its next layer once the time is over. Code between two
    layers is not interrupted: it calls what the block is given.

    Args:
        seconds: how long the block may take.

    Raises:
        TimeLimitError: one sentence.
    """
    end, thread = time.monotonic() + seconds, threading.get_ident()

    def check(*_: Any) -> None:
        if threading.get_ident() == thread and time.monotonic() > end:
            raise TimeLimitError(
                f"This takes longer than the {seconds:g} seconds that are allowed (request_seconds): give a shorter "
                "text, a smaller file or fewer tasks."
            )

    hook = register_module_forward_pre_hook(check)
    try:
        yield check
    finally:
        hook.remove()
