"""Waits for the work of a request, as long as its client does."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from .batcher import WaitedTooLongError


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
    gone = asyncio.ensure_future(client_left(request))
    try:
        return await unless_gone(work, gone, timeout)
    finally:
        gone.cancel()


async def unless_gone(work: Coroutine[Any, Any, Result], gone: "asyncio.Future[None]", timeout: float) -> Result:
    """
    The result of some work, which is cancelled when a future is done or its time is over.

    Raises:
        ClientLeftError, WaitedTooLongError: if so.
    """
    task = asyncio.ensure_future(work)
    try:
        waiting: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(waiting, timeout=max(timeout, 0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError if gone.done() else WaitedTooLongError
    finally:
        task.cancel()
