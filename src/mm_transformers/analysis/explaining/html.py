"""Explanations as parts of web pages."""

import base64
import io

import numpy as np
from PIL import Image

from .colors import heat_map, text_color
from .explanation import Explanation, ImageRelevance, SoundRelevance, strengths


_LONGEST_SIDE = 320  # pixels of a picture on a page
_MOST_PARTS = 60  # of a sound


def colored_words(explanation: Explanation) -> list[tuple[str, str, str]]:
    """Each word of the text with its background and foreground."""
    return [(word, *text_color(strength)) for word, strength in strengths(explanation)]


def heat_map_url(explanation: Explanation, image: ImageRelevance) -> str:
    """The heat map of the picture. All modalities of the row share one scale."""
    pixels = heat_map(image.image, image.pixels * explanation.scales["vision"])
    return picture_url(Image.fromarray((pixels * 255).round().astype(np.uint8)))


def sound_colors(explanation: Explanation, sound: SoundRelevance) -> list[str]:
    """
    Colours of the parts of a clip, all of equal length, by the most relevant step of each.

    All modalities of the row share one scale.
    """
    scale = explanation.scales["audio"]
    parts = np.array_split(sound.steps, max(min(len(sound.steps), _MOST_PARTS), 1))
    return [text_color(float(part.max(initial=0)) * scale)[0] for part in parts]


def picture_url(picture: Image.Image) -> str:
    """The picture as a `data:` address, in the size of the page."""
    scale = _LONGEST_SIDE / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
