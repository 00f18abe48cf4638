"""The command line: `mm-transformers demo`."""

from .app import app


__all__ = ["app"]
