"""The pictures of the embedded data set: six settings, each fine or ruined, drawn with Pillow.

A drawing is made at four times the wanted size and reduced, which smooths the edges. `Variant` holds its discrete
choices (light, layout and style of the objects); positions, sizes, colours and noise vary continuously. Held-out
drawings (the test split) use variants that training never draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from io import BytesIO
from itertools import product

import numpy as np
from PIL import Image, ImageOps

from .brush import FINE_SKIES, Brush, Variant, rain
from .indoors import desk, kitchen
from .outdoors import field, forest, lake, street


SUPERSAMPLING = 4
SCENES: dict[str, Callable[[Brush], None]] = {
    "forest": forest,
    "lake": lake,
    "field": field,
    "street": street,
    "desk": desk,
    "kitchen": kitchen,
}
OUTDOORS = ("forest", "lake", "field", "street")


@cache
def drawing_variants(held_out: bool) -> tuple[Variant, ...]:
    """The variants that training draws, or the held-out ones: all of the last light, and a quarter of the others."""
    variants = (Variant(*choice) for choice in product(range(len(FINE_SKIES)), range(4), range(3)))
    last_light = len(FINE_SKIES) - 1
    return tuple(v for v in variants if (v.light == last_light or sum(v) % 4 == 3) == held_out)


def draw_picture(setting: str, state: str, variant: Variant, rng: random.Random, image_size: int) -> Image.Image:
    """Draws one picture.

    Args:
        setting: a key of `SCENES`.
        state: "fine" or "ruined".
        variant: the discrete choices of the drawing.
        rng: the source of the continuous choices; the same state gives the same drawing at every `image_size`.
        image_size: height and width in pixels.

    Returns:
        An RGB image.
    """
    side = image_size * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side))
    ruined = state == "ruined"
    brush = Brush(canvas, rng, variant, ruined)
    SCENES[setting](brush)
    if ruined and setting in OUTDOORS:
        rain(brush, 0, 0, 100, 100, rng.randint(50, 90))
    picture = canvas.reduce(SUPERSAMPLING)
    if variant.layout >= 2:
        picture = ImageOps.mirror(picture)
    chance = np.random.default_rng(rng.getrandbits(64))
    noise = chance.standard_normal((image_size, image_size, 3), np.float32)
    pixels = np.asarray(picture) * np.float32(rng.uniform(0.93, 1.07)) + noise * np.float32(rng.uniform(2.0, 5.0))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode_png(picture: Image.Image) -> bytes:
    """The PNG file of the picture."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
