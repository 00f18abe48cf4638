"""Checkpoints: how they are written and found, and how a training goes on from one."""

from .folders import check_checkpoint, newest_complete_checkpoint


__all__ = ["check_checkpoint", "newest_complete_checkpoint"]
