"""Replaces unhelpful errors of torch by one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

from ..model.checkpoint_checks import is_pickle_error


@contextmanager
def clear_errors(checkpoint: Optional[str] = None) -> Iterator[None]:
    """
    Replaces unclear errors of torch within the block.

    Args:
        checkpoint: the checkpoint that is loaded in the block.

    Raises:
        ValueError: if a file of the checkpoint is a pickle that holds more than tensors.
        RuntimeError: if a process that reads rows was killed.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is not None and is_pickle_error(error):
            # The message of torch tells how to load it anyway.
            raise ValueError(
                f"A file of {checkpoint} is a pickle that holds more than tensors, and might run code, so it was not "
                "loaded. Use another checkpoint."
            ) from None
        if isinstance(error, RuntimeError) and re.match(r"DataLoader worker \(pid", str(error)):
            raise RuntimeError(
                "A process that reads rows was killed, perhaps for lack of memory: set dataloader_num_workers to a "
                "smaller number, or to 0 to see its error."
            ) from error
        raise
