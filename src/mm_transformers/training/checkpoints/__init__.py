"""Writes and finds checkpoints, and resumes training from one."""

from .folders import check_checkpoint, newest_complete_checkpoint


__all__ = ["check_checkpoint", "newest_complete_checkpoint"]
