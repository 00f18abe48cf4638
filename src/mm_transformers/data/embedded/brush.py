"""Drawing tools for the pictures of the embedded data set: colours, shapes in percent coordinates, the weather.

All coordinates are in percent of the picture, whose top left corner is (0, 0).
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw


Color = tuple[int, int, int]
Point = tuple[float, float]

# (top, bottom) of the sky, by `Variant.light`. The last one of each list is only used by held-out drawings.
FINE_SKIES: tuple[tuple[Color, Color], ...] = (
    ((78, 160, 232), (204, 234, 250)),
    ((116, 178, 236), (255, 228, 194)),
    ((98, 140, 212), (255, 200, 152)),
    ((92, 196, 224), (226, 246, 226)),
    ((52, 140, 226), (178, 220, 250)),
    ((100, 172, 230), (232, 230, 216)),
)
RUINED_SKIES: tuple[tuple[Color, Color], ...] = (
    ((52, 58, 72), (124, 130, 138)),
    ((58, 70, 70), (126, 136, 122)),
    ((64, 56, 82), (132, 122, 138)),
    ((42, 48, 66), (104, 110, 126)),
    ((70, 68, 72), (140, 132, 126)),
    ((56, 60, 74), (118, 122, 130)),
)
STORM_GRAY: Color = (70, 74, 88)


class Variant(NamedTuple):
    """The discrete choices of a drawing: index of the sky, layout (0-3: near or far, mirrored or not), object style."""

    light: int
    layout: int
    style: int


def mix(first: Color, second: Color, share: float) -> Color:
    """`first` with `share` (0-1) of `second`."""
    (r1, g1, b1), (r2, g2, b2) = first, second
    return round(r1 + (r2 - r1) * share), round(g1 + (g2 - g1) * share), round(b1 + (b2 - b1) * share)


class Brush:
    """Draws in percent coordinates on an image, with colours darkened by the storm when `ruined`."""

    def __init__(self, image: Image.Image, rng: random.Random, variant: Variant, ruined: bool):
        self.image = image
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.scale = image.width / 100
        self.rng = rng
        self.style = variant.style
        self.near = variant.layout % 2 == 1
        self.ruined = ruined
        self.sky_colors = (RUINED_SKIES if ruined else FINE_SKIES)[variant.light]
        self.gloom = rng.uniform(0.3, 0.45) if ruined else 0.0

    def between(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def vary(self, color: Color, amount: int = 14) -> Color:
        """A colour near `color`."""
        red, green, blue = (max(0, min(255, round(part + self.rng.uniform(-amount, amount)))) for part in color)
        return red, green, blue

    def _ink(self, color: Color, alpha: int, lit: bool) -> tuple[int, ...]:
        return (*(mix(color, STORM_GRAY, self.gloom) if self.ruined and not lit else color), alpha)

    def polygon(self, points: list[Point], color: Color, alpha: int = 255, lit: bool = False) -> None:
        """`lit`: the storm does not darken it."""
        s = self.scale
        self.draw.polygon([(x * s, y * s) for x, y in points], fill=self._ink(color, alpha, lit))

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        color: Color,
        radius: float = 0,
        alpha: int = 255,
        lit: bool = False,
    ) -> None:
        s = self.scale
        bounds, ink = (x * s, y * s, (x + w) * s, (y + h) * s), self._ink(color, alpha, lit)
        if radius:
            self.draw.rounded_rectangle(bounds, radius * s, fill=ink)
        else:
            self.draw.rectangle(bounds, fill=ink)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, alpha: int = 255, lit: bool = False
    ) -> None:
        s = self.scale
        bounds = ((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s)
        self.draw.ellipse(bounds, fill=self._ink(color, alpha, lit))

    def line(self, points: list[Point], color: Color, width: float, alpha: int = 255, lit: bool = False) -> None:
        s = self.scale
        ink = self._ink(color, alpha, lit)
        self.draw.line([(x * s, y * s) for x, y in points], fill=ink, width=max(1, round(width * s)), joint="curve")

    def ring(self, x: float, y: float, rx: float, ry: float, color: Color, width: float) -> None:
        s = self.scale
        bounds = ((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s)
        self.draw.ellipse(bounds, outline=self._ink(color, 255, False), width=max(1, round(width * s)))

    def shape(self, x: float, y: float, angle: float, points: list[Point], color: Color) -> None:
        """A polygon given around its own origin, turned by `angle` degrees and put at (x, y)."""
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        self.polygon([(x + px * c - py * s, y + px * s + py * c) for px, py in points], color)

    def gradient(self, x: float, y: float, w: float, h: float, top: Color, bottom: Color) -> None:
        s = self.scale
        left, upper, right, lower = round(x * s), round(y * s), round((x + w) * s), round((y + h) * s)
        column = np.linspace(top, bottom, lower - upper).astype(np.uint8)[:, None, :]
        image = Image.fromarray(column).resize((right - left, lower - upper), Image.Resampling.NEAREST)
        self.image.paste(image, (left, upper))


def sky(b: Brush, x: float, y: float, w: float, h: float) -> None:
    """Sky with sun and white clouds, or with storm clouds and now and then lightning, in the given box."""
    top, bottom = (b.vary(color, 8) for color in b.sky_colors)
    b.gradient(x, y, w, h, top, bottom)
    size = min(w, h * 1.6)
    if not b.ruined:
        sun_x, sun_y, radius = x + w * b.between(0.15, 0.85), y + h * b.between(0.2, 0.42), size * b.between(0.07, 0.1)
        for glow, alpha in ((1.9, 50), (1.4, 90)):
            b.ellipse(sun_x, sun_y, radius * glow, radius * glow, (255, 240, 170), alpha)
        b.ellipse(sun_x, sun_y, radius, radius, b.vary((255, 222, 84), 10))
    for _ in range(3 if b.ruined else b.rng.randint(1, 2)):
        cloud_x, cloud_y = x + w * b.between(0.1, 0.9), y + h * b.between(0.1, 0.4)
        puff = size * (b.between(0.08, 0.13) if b.ruined else b.between(0.035, 0.06))
        color = b.vary((74, 78, 92), 10) if b.ruined else (255, 255, 255)
        for shift, rise, share in ((-1.5, 0.3, 0.75), (0, 0, 1.0), (1.5, 0.3, 0.8), (0, 0.5, 0.9)):
            puff_x, puff_y = cloud_x + shift * puff, max(cloud_y + rise * puff, y + puff * share * 0.75)
            puff_x = min(max(puff_x, x + puff * share * 1.3), x + w - puff * share * 1.3)
            b.ellipse(puff_x, puff_y, puff * share * 1.3, puff * share * 0.75, color, 235, lit=True)
    if b.ruined and b.rng.random() < 0.5:
        bolt_x, bolt_y, step = x + w * b.between(0.2, 0.8), y + h * 0.3, h * 0.17
        bend = size * 0.05
        points = [(bolt_x, bolt_y), (bolt_x - bend, bolt_y + step), (bolt_x + bend * 0.6, bolt_y + step)]
        points += [(bolt_x - bend * 0.8, bolt_y + step * 2.4)]
        b.line(points, (255, 240, 130), max(0.9, size * 0.015), lit=True)


def rain(b: Brush, x: float, y: float, w: float, h: float, drops: int) -> None:
    slant = b.between(-0.5, 0.5)
    for _ in range(drops):
        length = b.between(0.05, 0.1) * h
        left, top = x + b.rng.random() * w, y + b.rng.random() * (h - length)
        right = min(max(left + slant * length, x), x + w)
        b.line([(left, top), (right, top + length)], (206, 220, 238), 0.7, 170, lit=True)


def puddle(b: Brush, x: float, y: float, size: float, color: Color = (128, 146, 168)) -> None:
    b.ellipse(x, y, size, size * 0.27, color, lit=True)
    b.ellipse(x - size * 0.2, y - size * 0.05, size * 0.5, size * 0.1, mix(color, (255, 255, 255), 0.35), lit=True)
