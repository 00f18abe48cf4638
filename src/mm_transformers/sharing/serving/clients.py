"""Waits for the work of a request, as long as its client does."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Optional, TypeVar

import anyio
from starlette.requests import Request

from .batcher import WaitedTooLongError


# Most requests are answered sooner; to watch their clients would cost as much as to read a row.
_SECONDS_UNWATCHED = 0.1

Result = TypeVar("Result")


class ClientLeftError(Exception):
    """The client has closed its connection."""


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
    gone: Optional[asyncio.Future[None]] = None

    def watch() -> None:
        nonlocal gone
        gone = asyncio.ensure_future(client_left(request))
        gone.add_done_callback(lambda _: scope.cancel())

    with anyio.move_on_after(timeout) as scope:
        timer = asyncio.get_running_loop().call_later(_SECONDS_UNWATCHED, watch)
        try:
            return await work
        finally:
            timer.cancel()
            has_left = gone is not None and gone.done()
            if gone is not None:
                gone.cancel()
    raise ClientLeftError if has_left else WaitedTooLongError
