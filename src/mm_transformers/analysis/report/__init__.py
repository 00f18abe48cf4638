"""What a model gets right and wrong, and why: one page that needs no network."""

from .build import write_report


__all__ = ["write_report"]
