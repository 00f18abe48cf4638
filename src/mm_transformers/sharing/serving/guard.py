"""The outermost layer of a server: bounds on bodies, and counts of requests."""

import time
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse

from ...model.limits import limits
from .bounded_body import SECONDS, SLOWEST, Message, Receive, bounded, declared_bytes, too_large
from .metrics import Metrics


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
        self.running = 0  # bytes of the bodies of requests that are not answered yet

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

        most = limits().served_bytes
        declared = declared_bytes(scope)
        # In chunks, a request may be longer than it declares.
        size = most if b"transfer-encoding" in dict(scope["headers"]) else declared
        try:
            if size is None or size > most:
                await JSONResponse({"error": too_large(most)}, 413)(scope, receive, counted)
            elif self.running + size > limits().all_uploads_bytes:
                told = {"error": "There is no space for more requests at the moment; try again later."}
                await JSONResponse(told, 429, {"Retry-After": "1"})(scope, receive, counted)
            else:
                self.running += size
                try:
                    await self.app(scope, bounded(receive, most, SECONDS + size / SLOWEST), counted)
                finally:
                    self.running -= size
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begun)
