"""Filters requests to the demo page: only the routes that the page needs, and limited bodies."""

import asyncio
import re
import time
from collections.abc import MutableMapping
from typing import Any, Optional
from urllib.parse import unquote

from ..model.limits import limits
from ..sharing.serving.bounded_body import Receive, bounded, declared_bytes, too_large
from .uploads import upload_folder


# Of gradio's own routes. Others fetch addresses, run ffmpeg, or talk to the Hub with a client's token.
_ROUTES = (
    "app_id", "call", "cancel", "heartbeat", "info", "login_check", "queue", "reset", "run", "startup-events",
    "theme.css", "upload", "upload_progress", "user",
)  # fmt: skip
_PREFIX = "/gradio_api/"
_LOCAL_FILE = re.compile(r"file=(?![A-Za-z][A-Za-z0-9+.\-]+:)")  # an address has a scheme; C: is a drive
_FORM_BYTES = 2**16  # around a file in a form


class RequestFilter:
    """
    An ASGI application that passes requests on to another one.

    Args:
        app: the application of gradio.
    """

    def __init__(self, app: Any):
        self.app = app
        self.running = 0  # bytes of the uploads that are being received

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        size, others = _upload_bytes(scope), self.running
        guarded = bounded(receive, _most_bytes(scope))
        self.running += size
        try:
            # In a thread: looking through many uploads takes time.
            refusal = await asyncio.to_thread(_refusal, scope, others)
            if refusal is not None:
                status, told = refusal
                await PlainTextResponse(told, status)(scope, receive, send)
                return
            await self.app(scope, guarded, send)
        finally:
            self.running -= size


def _route(scope: MutableMapping[str, Any]) -> Optional[str]:
    """The route after gradio's prefix, wherever the page is mounted."""
    _, found, route = unquote(scope["path"]).partition(_PREFIX)
    return route if found else None


def _refusal(scope: MutableMapping[str, Any], running: int) -> Optional[tuple[int, str]]:
    """
    Status and sentence, if the request is refused.

    Args:
        running: bytes of other uploads that are being received.
    """
    route = _route(scope)
    # gradio may serve only its own files of this machine.
    if route is not None and not _LOCAL_FILE.match(route) and route.partition("/")[0] not in _ROUTES:
        return 404, "This page does not exist."
    most = _most_bytes(scope)
    declared = declared_bytes(scope)
    if declared is None or declared > most:
        return 413, too_large(most)
    if _is_upload(scope) and not _has_room(running):
        return 507, "There is no space for more uploads at the moment; try again later."
    return None


def _most_bytes(scope: MutableMapping[str, Any]) -> int:
    return limits().upload_bytes + _FORM_BYTES if _is_upload(scope) else limits().request_bytes


def _is_upload(scope: MutableMapping[str, Any]) -> bool:
    return (_route(scope) or "").partition("/")[0] == "upload"


def _upload_bytes(scope: MutableMapping[str, Any]) -> int:
    """The bytes that a request may add to the uploads: its declared size, or else the limit."""
    if not _is_upload(scope):
        return 0
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"")
    # In chunks, a request may be longer than it declares.
    if not declared.isdigit() or b"transfer-encoding" in headers:
        return limits().upload_bytes
    return min(int(declared), limits().upload_bytes)


def _has_room(running: int) -> bool:
    """
    Whether one more upload is allowed. Broken-off uploads are removed here: gradio does not know of them.

    Args:
        running: bytes of uploads that are being received. Their parts in the folder count twice.
    """
    folder, now, total = upload_folder(), time.time(), 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            found = path.lstat()
            if path.parent == folder and path.is_file() and now - found.st_mtime > limits().upload_seconds:
                path.unlink()
            else:
                total += found.st_size
        except FileNotFoundError:
            continue
    return total + running + limits().upload_bytes <= limits().all_uploads_bytes
