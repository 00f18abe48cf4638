"""The report on the answers and errors of a model: one page that needs no network."""

from .page import write_report


__all__ = ["write_report"]
