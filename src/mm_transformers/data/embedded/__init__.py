"""The embedded data set of the package: messages with pictures, drawn on the spot."""

from .dataset import (
    GRID,
    SENSES,
    TASK_LABELS,
    TRANSLATIONS,
    best_possible_accuracy,
    draw_row_specs,
    load_demo_dataset,
    other_senses,
    render_image,
    render_text,
)
from .pointing import load_pointing_dataset


__all__ = [
    "GRID",
    "SENSES",
    "TASK_LABELS",
    "TRANSLATIONS",
    "best_possible_accuracy",
    "draw_row_specs",
    "load_demo_dataset",
    "load_pointing_dataset",
    "other_senses",
    "render_image",
    "render_text",
]
