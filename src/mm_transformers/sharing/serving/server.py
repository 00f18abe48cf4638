"""What a server does with the rows of a request: it reads them, lets them wait for a batch, and streams texts."""

import asyncio
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional, TypeVar

import torch
from starlette.requests import Request

from ...model.limits import limits
from ...model.messages import one_line
from .answering import PREDICT, Question, ServedModel
from .batcher import Batcher, QueueFullError, WaitedTooLongError
from .examples import example_row
from .guard import Upload
from .metrics import Metrics
from .row_reading import ReadRow, RowReader
from .settings import ServeSettings


logger = logging.getLogger(__name__)

FAILED = "The server failed at this request; its log says why."
# Requests of fewer bytes are read at once: a thread would cost more.
_FEW_BYTES = 4096
_READERS = 2

Result = TypeVar("Result")


class ClientLeftError(Exception):
    """The client has closed its connection."""


class Server:
    """
    A model behind a queue.

    Args:
        served ([`ServedModel`]): The model.
        settings ([`ServeSettings`]): How it uses the machine.
    """

    def __init__(self, served: ServedModel, settings: ServeSettings) -> None:
        self.served, self.settings, self.metrics = served, settings, Metrics()
        self.reader = RowReader(served.pipelines[PREDICT])
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
        self._readers = ThreadPoolExecutor(_READERS, "rows")
        self._writers = ThreadPoolExecutor(settings.streams, "writer", self._prepare)
        self._num_streams = 0

    async def __aenter__(self) -> "Server":
        await self.batcher.__aenter__()
        if example := example_row(self.served.model.config):
            # The first pass is slow, and shows that the model works.
            await self.answer(PREDICT, [example], {})
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.batcher.__aexit__()
        for pool in (self._readers, self._writers):
            pool.shutdown()

    def check_room(self) -> None:
        """
        Refuses a request before its body is read.

        Raises:
            QueueFullError: if no row may wait any more.
        """
        if self.batcher.is_full:
            raise QueueFullError

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
            ValueError: one sentence, if a row or an option is wrong.
            QueueFullError, WaitedTooLongError: as [`Batcher.submit`].
        """
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

    async def _read(self, rows: Sequence[Any], upload: Upload) -> list[ReadRow]:
        try:
            if upload.size < _FEW_BYTES:
                return self.reader.read(rows)
            return await asyncio.get_running_loop().run_in_executor(self._readers, self.reader.read, rows)
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

    def _observe(self, rows: int, seconds: float) -> None:
        self.metrics.batch_rows.observe(rows)
        self.metrics.batch_seconds.observe(seconds)

    def _prepare(self) -> None:
        """In a new thread: threads of torch are set thread by thread."""
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    async def open_stream(
        self, request: Request, row: Any, task: str, options: Mapping[str, Any], upload: Upload
    ) -> AsyncIterator[bytes]:
        """
        Server-sent events: the pieces of a text as they are written, then the whole text.

        Args:
            request: its client; the model stops when it leaves.
            row: as for [`answer`].
            task: that writes.
            options: for `generate`.
            upload: the body of the request.

        Raises:
            ValueError: one sentence, if the row is wrong.
            QueueFullError: if as many texts as allowed are being streamed.
        """
        if self._num_streams >= self.settings.streams:
            raise QueueFullError
        [read] = await self._read([row], upload)
        return self._stream(request, read.row, task, options)

    async def _stream(self, request: Request, row: Any, task: str, options: Mapping[str, Any]) -> AsyncIterator[bytes]:
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def emit(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def write() -> str:
            try:
                return self.served.write(row, task, options, emit, stopped)
            finally:
                emit(None)

        self._num_streams += 1
        end = loop.time() + self.settings.timeout
        gone = asyncio.ensure_future(client_left(request))
        try:
            with self.metrics.streaming():
                writing = loop.run_in_executor(self._writers, write)
                while (piece := await _unless_gone(pieces.get(), gone, end - loop.time())) is not None:
                    yield _event({"piece": piece})
                yield _event({"text": await writing})
        except WaitedTooLongError:
            yield _event({"error": too_long(self.settings.timeout)})
        except ValueError as error:
            yield _event({"error": one_line(error, 1000)})
        except ClientLeftError:
            pass
        except Exception:
            logger.exception("A stream failed.")
            yield _event({"error": FAILED})
        finally:
            stopped.set()
            gone.cancel()
            self._num_streams -= 1


def too_long(timeout: float) -> str:
    """The sentence for a request that is not answered in time."""
    return f"The request took longer than the {timeout:g} seconds that are allowed; try again later."


async def client_left(request: Request) -> None:
    """Returns when the client, whose whole body has been read, closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result], timeout: float) -> Result:
    """
    The result of some work, which is cancelled when its client leaves or its time is over.

    Raises:
        ClientLeftError, WaitedTooLongError: if so.
    """
    gone = asyncio.ensure_future(client_left(request))
    try:
        return await _unless_gone(work, gone, timeout)
    finally:
        gone.cancel()


async def _unless_gone(work: Coroutine[Any, Any, Result], gone: "asyncio.Future[None]", timeout: float) -> Result:
    task = asyncio.ensure_future(work)
    try:
        waiting: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(waiting, timeout=max(timeout, 0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError if gone.done() else WaitedTooLongError
    finally:
        task.cancel()


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
