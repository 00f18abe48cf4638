"""What a server does with the rows of a request: it reads them, lets them wait for a batch, and streams texts."""

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import Any, Optional

import torch
from starlette.requests import Request

from ...model.limits import limits
from .answering import PREDICT, Question, ServedModel
from .batcher import Batcher, QueueFullError
from .clients import unless_client_leaves
from .examples import example_row
from .guard import Upload
from .health import Health
from .metrics import Metrics
from .readers import ReaderThreads
from .row_reading import ReadRow, RowReader
from .settings import ServeSettings
from .text_stream import TextStream


class Server:
    """
    A model behind a queue.

    Args:
        served ([`ServedModel`]): The model.
        settings ([`ServeSettings`]): How it uses the machine.
    """

    def __init__(self, served: ServedModel, settings: ServeSettings) -> None:
        self.served, self.settings, self.metrics = served, settings, Metrics()
        self.batcher = Batcher(
            self._run,
            max_items=settings.batch_rows,
            max_wait=settings.batch_seconds,
            max_waiting=settings.waiting_rows,
            timeout=settings.timeout,
            max_weight=limits().served_memory,
            max_waiting_weight=4 * limits().served_memory,
            observe=self._observe,
            prepare=self._prepare,
        )
        self._readers = ReaderThreads(RowReader(served.kinds[PREDICT].pipeline))
        self._writers = self._new_writers()
        self._example = example_row(served.model.config)
        self._num_streams = 0  # that are being read or written
        self._health = Health(self._try_example)

    async def __aenter__(self) -> "Server":
        self._health.restart()
        self._readers.open()
        self._writers = self._new_writers()
        await self.batcher.__aenter__()
        try:
            if self._example:
                # The first pass is slow, and shows that the model works.
                await self._try_example()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._health.restart()
        await self.batcher.__aexit__()
        self._readers.close()
        self._writers.shutdown()

    def check_room(self) -> None:
        """
        Refuses a request before its body is read.

        Raises:
            QueueFullError: if no row may wait any more.
        """
        if self.batcher.is_full:
            raise QueueFullError

    async def is_well(self) -> bool:
        """Whether rows are answered, at once or within half a second, as [`Health`] knows it."""
        return self.batcher.is_running and (not self._example or await self._health.is_well())

    async def _try_example(self) -> None:
        await self.answer(PREDICT, [self._example], {})

    async def answer(
        self, kind: str, rows: list[Any], options: Mapping[str, Any], upload: Optional[Upload] = None
    ) -> list[Any]:
        """
        The answers or vectors of rows.

        Args:
            kind: `PREDICT` or `EMBED`.
            rows: as the pipelines take them, with files as bytes or in base64. The list is emptied once they are read,
                since they may be large.
            options: of the pipeline.
            upload ([`Upload`], *optional*): The body of the request.

        Raises:
            ValueError: one sentence, if a row or an option is wrong, or there are more rows than may wait.
            QueueFullError, WaitedTooLongError: as [`Batcher.submit`].
        """
        if len(rows) > self.settings.waiting_rows:
            raise ValueError(
                f"The request has {len(rows):,} rows, more than the {self.settings.waiting_rows:,} that may wait here: "
                "send fewer rows at a time."
            )
        question = Question.of(kind, options)
        self.served.check(question)
        read = await self._read(rows, upload or Upload())
        rows.clear()
        items = list(enumerate(one.row for one in read))
        self.metrics.waiting.inc(len(items))
        try:
            return await self.batcher.submit(question, items, [one.weight for one in read])
        finally:
            self.metrics.waiting.dec(len(items))

    async def _read(self, rows: list[Any], upload: Upload) -> list[ReadRow]:
        try:
            return await self._readers.read(rows, upload.size)
        finally:
            upload.release()

    def _run(self, question: Question, items: list[tuple[int, Any]]) -> list[Any]:
        """In the thread of the model: the answers of a batch."""
        try:
            return self.served.answer(question, [row for _, row in items], self.settings.timeout)
        except ValueError as error:
            if len(items) > 1:
                raise  # each row is tried again alone
            raise ValueError(re.sub(r"^Row 0\b", f"Row {items[0][0]}", str(error))) from error
        except Exception:
            if len(items) == 1:  # the rows of a larger batch are tried again alone
                self._health.note_failure()
            raise

    def _observe(self, rows: int, seconds: float) -> None:
        self.metrics.batch_rows.observe(rows)
        self.metrics.batch_seconds.observe(seconds)

    def _new_writers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.settings.streams, "writer", self._prepare)

    def _prepare(self) -> None:
        """In a new thread: threads of torch are set thread by thread."""
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    async def open_stream(
        self, request: Request, row: Any, task: str, options: Mapping[str, Any], upload: Optional[Upload] = None
    ) -> TextStream:
        """
        Begins to write a text.

        Args:
            request: its client; nothing is written if it leaves before.
            row: as for [`answer`].
            task: that writes.
            options: for `generate`.
            upload: as for [`answer`].

        Raises:
            ValueError: one sentence, if the row or an option is wrong.
            QueueFullError: if as many texts as allowed are being streamed.
            ClientLeftError, WaitedTooLongError: as [`unless_client_leaves`].
        """
        if self._num_streams >= self.settings.streams:
            raise QueueFullError
        self.served.check(Question.of(PREDICT, {"tasks": [task], "generate_kwargs": dict(options)}))
        self._num_streams += 1
        self.metrics.streams.inc()
        try:
            reading = self._read([row], upload or Upload())
            [read] = await unless_client_leaves(request, reading, self.settings.timeout)
            stream = TextStream(
                lambda emit, is_over: self.served.write(read.row, task, options, emit, is_over),
                self._writers,
                self.settings.timeout,
            )
        except BaseException:
            self._end_stream()
            raise
        loop = asyncio.get_running_loop()

        def end(job: "Future[str]") -> None:
            error = None if job.cancelled() else job.exception()
            if error is not None and not isinstance(error, ValueError):
                self._health.note_failure()
            if isinstance(error, BrokenExecutor):
                self._writers = self._new_writers()  # a broken one takes no further text
            loop.call_soon_threadsafe(self._end_stream)

        # Not when its client is gone: until the next token, it is still written.
        stream.job.add_done_callback(end)
        return stream

    def _end_stream(self) -> None:
        self._num_streams -= 1
        self.metrics.streams.dec()
