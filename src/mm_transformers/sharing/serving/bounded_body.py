"""Bounds the body of a request: its bytes, and the time in which it must arrive."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# A body may be late by so many seconds, and a second more for so many bytes that have arrived.
SECONDS, SLOWEST = 60, 2**14


def declared_bytes(scope: Message) -> int | None:
    """The size that a request declares, 0 without one; `None` if it is no number. In chunks, the size is unknown."""
    headers = dict(scope["headers"])
    declared = b"0" if b"transfer-encoding" in headers else headers.get(b"content-length", b"0")
    return int(declared) if declared.isdigit() and len(declared) < 20 else None


def too_large(most: int) -> str:
    """The sentence for a request that is larger than this."""
    return f"The request is larger than the {most:,} bytes that are allowed."


def bounded(receive: Receive, most: int, arrived: Callable[[int], None] = lambda size: None) -> Receive:
    """
    The messages of a request, as long as they stay within the bounds and the body goes on arriving.

    Args:
        receive: that of ASGI.
        most: bytes of the body.
        arrived: called with the bytes of each message.

    Returns:
        The same function; it raises `starlette.exceptions.HTTPException`, which the application turns into the answer.
    """
    import anyio
    from starlette.exceptions import HTTPException

    received, is_complete, begun = 0, False, time.monotonic()

    async def next_message() -> Message:
        nonlocal received, is_complete
        if is_complete:
            return await receive()
        end = begun + SECONDS + received / SLOWEST
        try:
            with anyio.fail_after(end - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, "The request took too long to arrive.") from None
        is_complete = not message.get("more_body", False)
        size = len(message.get("body") or b"")
        received += size
        if received > most:
            raise HTTPException(413, too_large(most))
        arrived(size)
        return message

    return next_message
