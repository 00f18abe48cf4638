"""Switches progress bars and warnings off while estimators run."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging


_lock = threading.Lock()
_num_open = 0
_before = (True, True, logging.NOTSET)


@contextmanager
def quiet() -> Iterator[None]:
    """
    Within the block there are no progress bars, and the package logs errors only. If several threads are in such
    blocks, the last to leave restores the settings.

    Example:

    ```python
    >>> with quiet():
    ...     fit(table, ["price"], "my-model")
    ```
    """
    global _num_open, _before
    logger = logging.getLogger("mm_transformers")
    with _lock:
        if _num_open == 0:
            bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
            _before = (bars[0], not bars[1], logger.level)
            transformers_logging.disable_progress_bar()
            datasets.disable_progress_bars()
            logger.setLevel(logging.ERROR)
        _num_open += 1
    try:
        yield
    finally:
        with _lock:
            _num_open -= 1
            if _num_open == 0:
                if _before[0]:
                    transformers_logging.enable_progress_bar()
                if _before[1]:
                    datasets.enable_progress_bars()
                logger.setLevel(_before[2])
