"""The threads that read the rows of requests."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .row_reading import ReadRow, RowReader


# Texts and columns of fewer bytes are read at once: a thread would cost more.
_FEW_BYTES = 4096
_THREADS = 2


class ReaderThreads:
    """
    A few threads that read rows. Requests wait in front of them, so that one whose client has left holds nothing.

    Args:
        reader ([`RowReader`]): Reads the rows.

    Example:

    ```python
    >>> threads = ReaderThreads(RowReader(pipe))
    >>> [read] = await threads.read([{"text": "Lovely weather!"}], 30)
    ```
    """

    def __init__(self, reader: RowReader) -> None:
        self.reader = reader
        self.open()

    def open(self) -> None:
        """Before the first use in a loop."""
        self._threads = ThreadPoolExecutor(_THREADS, "rows")
        self._free = asyncio.Semaphore(_THREADS)

    def close(self) -> None:
        """Waits for the threads."""
        self._threads.shutdown()

    async def read(self, rows: Sequence[Any], size: int) -> list[ReadRow]:
        """
        Rows that can be answered. If this is cancelled, no further file is read.

        Args:
            rows: as [`RowReader.read`] takes them.
            size: bytes of their request.

        Raises:
            ValueError: as [`RowReader.read`].
        """
        if size < _FEW_BYTES and self.reader.is_quick(rows):
            return self.reader.read(rows)
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        await self._free.acquire()
        try:
            job = self._threads.submit(self.reader.read, rows, stopped)
        except BaseException:
            self._free.release()
            raise
        # Not at the end of this function: a thread that reads a file cannot be interrupted.
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.release))
        try:
            return await asyncio.wrap_future(job)
        finally:
            stopped.set()
