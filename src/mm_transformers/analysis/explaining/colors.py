"""The colours of relevance, over pictures and behind words."""

from typing import Any

import numpy as np


def heat_map(image: Any, relevance: np.ndarray) -> np.ndarray:
    """
    The grey picture coloured by its relevance, (height, width, 3) float from 0 to 1.

    Parts without relevance are unchanged; the most relevant parts are dark red.

    Args:
        relevance (height, width): from 0 to 1.
    """
    from matplotlib import colormaps

    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    grey = 0.25 + 0.75 * np.repeat(grey, 3, axis=2)
    strength = relevance.clip(0, 1)[..., None]
    color = colormaps["Reds"](0.5 + 0.5 * strength[..., 0])[..., :3]
    return (grey * (1 - 0.8 * strength) + color * 0.8 * strength).clip(0, 1)


def text_color(strength: float) -> tuple[str, str]:
    """Background and foreground of a word with this relevance, from 0 to 1; their contrast is readable."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    background = colormaps["Reds"](0.75 * min(max(strength, 0.0), 1.0))
    # Relative luminance of WCAG 2.2; at 0.179 black and white have the same contrast, 4.6 to 1.
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3])
    is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179
    return to_hex(background), "#000000" if is_light else "#ffffff"
