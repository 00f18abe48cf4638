"""Calls of a tokenizer, one thread at a time."""

import os
import threading
from typing import Any


def _renew_lock() -> None:
    # A process that forks while another thread holds the lock would never get it.
    global _lock
    _lock = threading.RLock()


_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def tokenize(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """
    `tokenizer(*texts, **options)`. A fast tokenizer keeps padding and truncation from call to call: of two threads, one
    would tokenize with the options of the other.
    """
    with _lock:
        return tokenizer(*texts, **options)
