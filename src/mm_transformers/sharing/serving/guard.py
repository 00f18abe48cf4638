"""The outermost layer of a server: bounds on bodies, and counts of requests."""

import time
from collections.abc import Collection
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ...model.limits import limits
from .bounded_body import Message, Receive, bounded, declared_bytes, too_large
from .metrics import Metrics


# The key of the scope of a request that holds its [`Upload`].
UPLOAD = "mm_transformers.upload"


class Upload:
    """
    The bytes of the body of one request, from their arrival until its rows are read.

    Args:
        guard ([`Guard`], *optional*): Counts the bytes of all requests together.
    """

    def __init__(self, guard: "Guard | None" = None) -> None:
        self.guard, self.size, self._held = guard, 0, 0

    def arrived(self, size: int) -> None:
        """
        Adds bytes.

        Raises:
            HTTPException: if all requests together have too many.
        """
        if self.guard is not None and self.guard.held + size > limits().all_uploads_bytes:
            told = "There is no space for more requests at the moment; try again later."
            raise HTTPException(429, told, {"Retry-After": "1"})
        self.size += size
        self._hold(self._held + size)

    def release(self) -> None:
        """Makes room for others, once the body is not needed any more."""
        self._hold(0)

    def _hold(self, size: int) -> None:
        if self.guard is not None:
            self.guard.held += size - self._held
        self._held = size


class Guard:
    """
    An ASGI application that passes requests on to another one.

    Args:
        app: the other one.
        metrics ([`Metrics`]): Counts requests by route and status.
        routes: the routes that are counted by name.
    """

    def __init__(self, app: Any, metrics: Metrics, routes: Collection[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes
        self.held = 0  # bytes of all bodies that have arrived and are not read yet

    async def __call__(self, scope: Message, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        most, declared = limits().served_bytes, declared_bytes(scope)
        upload = scope[UPLOAD] = Upload(self)
        try:
            if declared is None or declared > most:
                await JSONResponse({"error": too_large(most)}, 413)(scope, receive, counted)
            else:
                await self.app(scope, bounded(receive, most, upload.arrived), counted)
        finally:
            upload.release()
            # Where the application is mounted in another one, paths begin with its place.
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            route = path if path in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begun)
