"""Downloads over http(s), with limits of time and bytes; addresses from strangers must be on the public Internet."""

import contextlib
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Collection
from functools import partial
from typing import Any, Optional

from .limits import limits, named


# Prefixes that hold an IPv4 address, in their last 32 bits: NAT64.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_url(content: Any) -> bool:
    return isinstance(content, str) and content[:8].lower().startswith(("http://", "https://"))


def fetch(url: str, hosts: Optional[Collection[str]] = None, public_only: bool = False) -> bytes:
    """
    The content of an http(s) address.

    Args:
        url: the address; the defaults are for one that the user has typed.
        hosts: the only hosts that may be asked, also after redirects; `None` for all.
        public_only: whether to refuse hosts outside the public Internet. The connected address is checked, so a name
            that changes its address is refused too. Proxies are not used.

    Raises:
        OSError: if the address is not allowed, there is no complete answer within the limits, or it is an error.
    """
    deadline = _Deadline(limits().download_seconds)
    rule = _Rule(hosts, public_only)
    try:
        rule.check(url)
        request = urllib.request.Request(url, headers={"User-Agent": "mm-transformers"})
        with deadline, _opener(rule, deadline).open(request, timeout=deadline.left()) as response:
            content = _read(response)
        if not deadline.is_over:  # otherwise the answer may have ended where it was cut off
            return content
        raise OSError(_too_late())
    except (ValueError, http.client.HTTPException) as error:  # a wrong address, half an answer
        raise OSError(_too_late() if deadline.is_over else str(error) or type(error).__name__) from error
    except OSError as error:
        if deadline.is_over:
            raise OSError(_too_late()) from error
        reason = getattr(error, "reason", None)
        if isinstance(reason, OSError):  # urllib puts what went wrong into an error of its own
            raise reason from error
        raise


def _read(response: Any) -> bytes:
    most = limits().download_bytes
    too_large = f"it is larger than {named('download_bytes')}"
    if (response.length or 0) > most:
        raise OSError(too_large)
    parts, size = [], 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > most:
            raise OSError(too_large)
    content = b"".join(parts)
    if response.length:
        raise http.client.IncompleteRead(content, response.length)
    return content


def _too_late() -> str:
    return f"the answer took longer than {named('download_seconds')}"


class _Deadline:
    """Closes its connections when the time is over, however slowly a server sends."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.is_over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.001)

    def watch(self, connection: socket.socket) -> None:
        self._sockets.append(connection.dup())  # TLS takes the socket itself over
        if self.is_over:
            self._shut()

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: Any) -> None:
        self._timer.cancel()
        self.is_over = self.is_over or time.monotonic() >= self.end
        for connection in self._sockets:
            connection.close()

    def _shut(self) -> None:
        self.is_over = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Rule:
    def __init__(self, hosts: Optional[Collection[str]], public_only: bool) -> None:
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.public_only = public_only

    def check(self, url: str) -> None:
        """
        Checks an address.

        Raises:
            OSError, ValueError: if the address is not one that may be asked.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise OSError(f"only http and https addresses are fetched, not {parts.scheme[:20]!r}")
        if not parts.hostname:
            raise OSError("the address names no host")
        if "@" in parts.netloc:
            raise OSError("an address must not hold a user name or a password")
        if self.hosts is not None and parts.hostname not in self.hosts:
            raise OSError(f"the host {parts.hostname[:100]!r} is not an allowed host")

    def connect(self, deadline: _Deadline, address: tuple[str, int], *_: Any) -> socket.socket:
        """A connection to one of the host's addresses. If only public ones are allowed, none may be private."""
        host, port = address
        found = _looked_up(host, port, deadline.left())
        if self.public_only:
            for ip in (str(where[0]) for *_, where in found):
                if not is_public(ip):
                    raise OSError(
                        f"the host {host[:100]!r} has the address {ip}, which is not on the public Internet; to "
                        "allow it, give the host in allow_urls=[...]"
                    )
        error: Optional[OSError] = None
        for family, kind, protocol, _name, where in found:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(deadline.left())
            try:
                deadline.watch(connection)
                connection.connect(where)
                return connection
            except OSError as failed:
                connection.close()
                error = failed
        raise error or OSError(f"the host {host[:100]!r} has no address")


def _looked_up(host: str, port: int, seconds: float) -> list[Any]:
    """
    The addresses of a host. A lookup cannot be interrupted, so a separate thread does it, without a join.

    Raises:
        OSError: if there are none, or it takes longer.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # OSError, or UnicodeError for a name that can be none
            answers.put(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    try:
        found = answers.get(timeout=seconds)
    except queue.Empty:
        raise OSError(_too_late()) from None
    thread.join()
    if isinstance(found, Exception):
        raise found
    return found


def is_public(ip: str) -> bool:
    """Whether an address is on the public Internet; an address that embeds an IPv4 address counts as that one."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if address.version == 6:
        inner: Any = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64 or int(address) >> 32 == 0:
            inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved


def _opener(rule: _Rule, deadline: _Deadline) -> urllib.request.OpenerDirector:
    """An opener without the handlers of ftp:, file: and data:, to which redirects could lead."""
    opener = urllib.request.OpenerDirector()
    handlers = [
        _Handler(rule, deadline),
        _Redirects(rule),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ]
    if not rule.public_only:
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


class _Handler(urllib.request.AbstractHTTPHandler):
    def __init__(self, rule: _Rule, deadline: _Deadline) -> None:
        super().__init__()
        self.rule, self.deadline = rule, deadline

    def http_open(self, request: Any) -> Any:
        return self.do_open(self._connection(http.client.HTTPConnection), request)

    def https_open(self, request: Any) -> Any:
        made = partial(http.client.HTTPSConnection, context=ssl.create_default_context())
        return self.do_open(self._connection(made), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _connection(self, make: Any) -> Any:
        def connection(host: str, timeout: float) -> Any:
            made = make(host, timeout=timeout)
            made._create_connection = partial(self.rule.connect, self.deadline)
            return made

        return connection


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, rule: _Rule) -> None:
        self.rule = rule

    def redirect_request(self, request: Any, response: Any, code: Any, message: Any, headers: Any, url: str) -> Any:
        self.rule.check(url)
        return super().redirect_request(request, response, code, message, headers, url)
