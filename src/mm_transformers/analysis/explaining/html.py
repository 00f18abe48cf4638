"""Explanations as parts of web pages."""

import base64
import io

import numpy as np
from PIL import Image

from .explanation import Explanation, ImageRelevance
from .plotting import heat_map, strengths, text_color


_LONGEST_SIDE = 320  # pixels of a picture on a page


def colored_words(explanation: Explanation) -> list[tuple[str, str, str]]:
    """Each word of the text with its background and foreground."""
    return [(word, *text_color(strength)) for word, strength in strengths(explanation)]


def heat_map_url(explanation: Explanation, image: ImageRelevance) -> str:
    """The picture under its relevance, on a scale that all pictures of the row share."""
    highest = max(float(other.pixels.max()) for other in explanation.images) or 1.0
    pixels = heat_map(image.image, image.pixels / highest)
    return picture_url(Image.fromarray((pixels * 255).round().astype(np.uint8)))


def picture_url(picture: Image.Image) -> str:
    """The picture itself as an address, as large as it is shown."""
    scale = _LONGEST_SIDE / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
