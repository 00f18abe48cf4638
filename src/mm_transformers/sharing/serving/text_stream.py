"""A text that is sent while it is written, as server-sent events."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...model.messages import one_line
from .batcher import WaitedTooLongError
from .clients import ClientLeftError, client_left


logger = logging.getLogger(__name__)

FAILED = "The server failed at this request; its log says why."


class TextStream:
    """
    A text that is written in a thread, piece by piece.

    Args:
        write: gets a function that takes each piece, and one that says whether to stop; returns the whole text.
        threads: run `write`.
        timeout: seconds, after which the writing stops.
    """

    def __init__(
        self, write: Callable[[Callable[[str], None], Callable[[], bool]], str], threads: Executor, timeout: float
    ) -> None:
        self.timeout, self._end = timeout, time.monotonic() + timeout
        self._stopped, self._is_whole = threading.Event(), False
        # The pieces, `None` at the end, or the reason why there is no whole text.
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: str | None) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        def run() -> str:
            text = write(emit, self._is_over)
            self._is_whole = not self._is_over()  # the client may take longer to read it
            return text

        self.job: Future[str] = threads.submit(run)
        # Not at the end of `run`, which does not begin in a thread that cannot be prepared.
        self.job.add_done_callback(lambda _: emit(None))

    def _is_over(self) -> bool:
        return self._stopped.is_set() or time.monotonic() > self._end

    def stop(self) -> None:
        """Stops the writing at the next token."""
        self._stopped.set()
        self.job.cancel()

    async def events(self, request: Request) -> AsyncIterator[bytes]:
        """The pieces, then the whole text, or one error."""
        put = self._pieces.put_nowait
        late = asyncio.get_running_loop().call_later(self._end - time.monotonic(), put, WaitedTooLongError())
        gone = asyncio.ensure_future(client_left(request))
        gone.add_done_callback(lambda _: put(ClientLeftError()))
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield _event({"piece": piece})
            text = await asyncio.wrap_future(self.job)
            if not self._is_whole:
                raise WaitedTooLongError
            yield _event({"text": text})
        except WaitedTooLongError:
            yield _event({"error": too_long(self.timeout)})
        except ValueError as error:
            yield _event({"error": one_line(error, 1000)})
        except ClientLeftError:
            pass
        except Exception:
            logger.exception("A stream failed.")
            yield _event({"error": FAILED})
        finally:
            late.cancel()
            gone.cancel()


class TextStreamResponse(StreamingResponse):
    """Sends a stream, and stops its writing in the end: a client may leave before the first event."""

    def __init__(self, stream: TextStream, request: Request) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream.events(request), headers=headers, media_type="text/event-stream")
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stream.stop()


def too_long(timeout: float) -> str:
    """The sentence for a request that is not answered in time."""
    return f"The request took longer than the {timeout:g} seconds that are allowed; try again later."


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
