"""A server on this machine that remembers what it was asked."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """The address of a server whose files all have this content, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
