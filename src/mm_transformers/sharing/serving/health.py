"""Says whether a model still answers, without letting those who ask wait for its queue."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Optional

from .batcher import QueueFullError, WaitedTooLongError


# Orchestrators often give a probe one second.
_SECONDS = 0.5


class Health:
    """
    Whether a model answers. After a failure that was not the fault of a row, an example is tried.

    At most one example is in the queue, however many ask.

    Args:
        try_example: answers the example, or raises what a row would get.

    Example:

    ```python
    >>> health = Health(lambda: server.answer(PREDICT, [example], {}))
    >>> health.note_failure()
    >>> await health.is_well()
    True
    ```
    """

    def __init__(self, try_example: Callable[[], Awaitable[Any]]) -> None:
        self._try_example = try_example
        self._trial: Optional[asyncio.Task[None]] = None
        self._has_failed, self._is_well = False, True

    def restart(self) -> None:
        """Stops the trial, and forgets all failures."""
        if self._trial is not None:
            self._trial.cancel()
        self._trial, self._has_failed, self._is_well = None, False, True

    def note_failure(self) -> None:
        """Remembers a failure that was not the fault of a row; in any thread."""
        self._has_failed = True

    async def is_well(self) -> bool:
        """The result of the running trial, or, if that takes too long, of the last one."""
        if self._has_failed and self._trial is None:
            self._trial = asyncio.create_task(self._try())
        if self._trial is not None:
            await asyncio.wait([self._trial], timeout=_SECONDS)
        return self._is_well

    async def _try(self) -> None:
        self._has_failed = False  # before the trial: a failure during it counts
        try:
            await self._try_example()
            self._is_well = True
        except (QueueFullError, WaitedTooLongError):
            self._has_failed = True  # the server is busy, so nothing is known
        except Exception:
            self._has_failed, self._is_well = True, False
        finally:
            self._trial = None
