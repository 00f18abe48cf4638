"""The indoor settings of the embedded data set: desk and kitchen, each fine or ruined."""

from __future__ import annotations

import math

from .brush import Brush, mix, puddle, rain, sky


def window(b: Brush, x: float, y: float, w: float, h: float) -> None:
    """A window of a room, with the weather behind it."""
    sky(b, x, y, w, h)
    if b.ruined:
        rain(b, x, y, w, h, 16)
    frame = (246, 242, 232)
    for left, top, width, height in (
        (x - 1.5, y - 1.5, w + 3, 2),
        (x - 1.5, y + h - 0.5, w + 3, 2.5),
        (x - 1.5, y - 1.5, 2, h + 3),
        (x + w - 0.5, y - 1.5, 2, h + 3),
        (x + w / 2 - 0.7, y, 1.4, h),
    ):
        b.box(left, top, width, height, frame)


def desk(b: Brush) -> None:
    wall = b.vary(((214, 224, 214), (236, 218, 190), (206, 214, 232))[b.style], 8)
    b.box(0, 0, 100, 100, wall)
    top = b.between(66, 71)
    window(b, b.between(6, 12), b.between(8, 13), b.between(27, 34), b.between(30, 36))
    for shelf, book_count in ((17, 8), (35, 6)):
        b.box(62, shelf, 34, 2, (150, 104, 66))
        x = 63 + b.between(0, 3)
        for _ in range(book_count):
            w, h = b.between(2, 3.6), b.between(7, 12)
            color = b.vary(b.rng.choice(((190, 70, 64), (64, 120, 160), (226, 180, 80), (96, 150, 100))), 16)
            if b.ruined and b.rng.random() < 0.5:
                x += w
                continue
            b.box(x, shelf - h, w, h, color)
            x += w + 0.3
    wood = b.vary((178, 122, 76), 14)
    b.box(0, top, 100, 100 - top, wood)
    b.box(0, top, 100, 2, mix(wood, (255, 240, 210), 0.4))
    for y in (top + 10, top + 20):
        b.line([(0, y), (100, y + b.between(-1, 1))], mix(wood, (80, 40, 10), 0.3), 0.6)
    size = (1.15 if b.near else 1.0) * b.between(0.94, 1.06)
    x, w, h = b.between(50, 56), 34 * size, 25 * size
    tilt = b.between(9, 16) if b.ruined else 0.0
    case = (48, 52, 60)
    b.box(x - 2, top - 6, 4, 9, case)
    b.ellipse(x, top + 3.5, 9 * size, 1.8, case)
    screen_y = top - 5 - h / 2
    half_w, half_h = w / 2, h / 2
    outline = [(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)]
    b.shape(x, screen_y, tilt, outline, case)
    inner = [(px * 0.92, py * 0.89) for px, py in outline]
    b.shape(x, screen_y, tilt, inner, (24, 26, 34) if b.ruined else (236, 244, 250))
    if b.ruined:
        hit_x, hit_y = x + b.between(-5, 5), screen_y + b.between(-3, 3)
        for turn in range(8):  # the cracked screen
            angle, reach = turn * math.tau / 8 + b.between(-0.3, 0.3), b.between(6, 11) * size
            b.line([(hit_x, hit_y), (hit_x + math.cos(angle) * reach, hit_y + math.sin(angle) * reach)],
                   (216, 226, 236), 0.7, lit=True)  # fmt: skip
    else:
        chart = b.vary((72, 140, 210), 20)
        for bar in range(5):
            height = half_h * b.between(0.4, 1.3)
            b.box(x - half_w * 0.7 + bar * w * 0.14, screen_y + half_h * 0.7 - height, w * 0.09, height, chart)
        b.box(x - half_w * 0.8, screen_y - half_h * 0.75, w * 0.5, 1.6, (240, 150, 90))
    keys_y = top + b.between(11, 14)
    b.polygon([(x - 15, keys_y), (x + 13, keys_y), (x + 16, keys_y + 7), (x - 18, keys_y + 7)], (232, 234, 238))
    for row in range(3):
        b.line([(x - 15 - row, keys_y + 1.6 + row * 2), (x + 13 + row, keys_y + 1.6 + row * 2)], (150, 156, 166), 0.8)
    mug_x, mug_y, mug = b.between(82, 89), top + b.between(13, 17), b.vary((214, 84, 72), 30)
    if b.ruined:
        puddle(b, mug_x - 6, mug_y + 5, 14, (92, 56, 32))
        b.shape(mug_x, mug_y, -80, [(-4, -5), (4, -5), (4, 5), (-4, 5)], mug)
        b.ellipse(mug_x - 5, mug_y, 1.6, 4, (70, 44, 28))
        for _ in range(4):  # papers all over the place
            sheet_x, sheet_y = b.between(6, 70), b.between(top + 6, 96)
            b.shape(sheet_x, sheet_y, b.between(-60, 60), [(-6, -4), (6, -4), (6, 4), (-6, 4)], (244, 244, 240))
    else:
        b.ring(mug_x + 4.4, mug_y - 1, 2.6, 3, mug, 1.2)
        b.box(mug_x - 4, mug_y - 6, 8, 10, mug, radius=1)
        b.ellipse(mug_x, mug_y - 6, 4, 1.2, (92, 56, 32))
    lamp_x, lamp = b.between(14, 22), b.vary((74, 120, 110), 30)
    if b.ruined:  # toppled
        y = top + b.between(9, 13)
        b.line([(lamp_x - 10, y), (lamp_x + 3, y - 3), (lamp_x + 14, y + 3)], lamp, 1.5)
        b.shape(lamp_x + 14, y + 3, 70, [(-3, -6), (3, -6), (7, 3), (-7, 3)], lamp)
        b.shape(lamp_x - 11, y, 80, [(-6, -1.2), (6, -1.2), (6, 1.2), (-6, 1.2)], lamp)
    else:
        y = top + b.between(6, 10)
        b.ellipse(lamp_x, y, 6.5, 2, lamp)
        b.line([(lamp_x, y), (lamp_x - 6, y - 13), (lamp_x + 5, y - 23)], lamp, 1.5)
        b.shape(lamp_x + 6, y - 22, -35, [(-3, -4), (3, -4), (7, 5), (-7, 5)], lamp)
        b.ellipse(lamp_x + 9, y - 18, 3, 2.4, (255, 240, 170))


def kitchen(b: Brush) -> None:
    wall = b.vary(((246, 232, 200), (214, 232, 226), (240, 214, 206))[b.style], 8)
    b.box(0, 0, 100, 100, wall)
    counter = b.between(62, 66)
    tile = mix(wall, (255, 255, 255), 0.55)
    for row in range(2):
        for column in range(11):
            b.box(column * 9.6 - 2, counter - 20 + row * 9.8, 8.8, 9, tile, radius=0.6)
    window(b, b.between(6, 11), b.between(7, 11), b.between(27, 33), b.between(26, 30))
    b.box(0, counter, 100, 4, b.vary((206, 198, 188), 8))
    cupboard = b.vary(((126, 160, 150), (164, 116, 80), (112, 138, 172))[b.style], 14)
    b.box(0, counter + 4, 100, 100, cupboard)
    for door in (2, 26, 86):
        b.box(door, counter + 8, 21, 26, mix(cupboard, (255, 255, 255), 0.22), radius=1.5)
        b.ellipse(door + 18, counter + 20, 1.1, 1.1, (250, 240, 210))
    size = (1.12 if b.near else 1.0) * b.between(0.95, 1.05)
    x = b.between(64, 69)
    b.box(x - 16, counter - 1.5, 32, 40, (232, 234, 238))  # the cooker
    b.box(x - 16, counter - 1.5, 32, 2.4, (56, 58, 66))
    for knob in range(4):
        b.ellipse(x - 11 + knob * 7.4, counter + 5, 1.5, 1.5, (60, 62, 70))
    b.box(x - 12, counter + 10, 24, 17, (60, 62, 72), radius=1.5)
    b.box(x - 10, counter + 13, 20, 11, (36, 36, 44) if b.ruined else (250, 190, 110), radius=1)
    b.box(x - 11, counter + 8.4, 22, 1.2, (150, 154, 162))
    b.polygon([(x - 15, 24), (x + 15, 24), (x + 7, 13), (x - 7, 13)], (176, 182, 190))  # the hood
    b.box(x - 5, 0, 10, 14, (190, 196, 202))
    b.box(x - 15, 23, 30, 3, (150, 156, 164))
    pot = b.vary(((206, 72, 60), (62, 112, 160), (90, 96, 106))[(b.style + 1) % 3], 16)
    w, h = 9 * size, 11 * size
    y = counter - 1.5
    if b.ruined:
        for rise in range(5):
            radius = 5 + rise * 1.5
            b.ellipse(x + b.between(-3, 3), y - 14 - rise * 8, radius, radius * 0.8, (44, 42, 46), 170, lit=True)
        b.box(x - w, y - h, 2 * w, h, mix(pot, (30, 26, 26), 0.7), radius=1.5)
        for flame in (-0.6, 0.0, 0.6):
            tip = y - h - b.between(6, 10)
            b.polygon([(x + flame * w - 3, y - h + 1), (x + flame * w + 3, y - h + 1), (x + flame * w, tip)],
                      (250, 130, 40), lit=True)  # fmt: skip
            b.polygon([(x + flame * w - 1.5, y - h + 1), (x + flame * w + 1.5, y - h + 1), (x + flame * w, tip + 4)],
                      (255, 226, 100), lit=True)  # fmt: skip
    else:
        for rise in range(3):
            b.ellipse(x + b.between(-2, 2), y - h - 5 - rise * 4, 3.2, 2.2, (255, 255, 255), 130)
        b.box(x - w - 2.5, y - h * 0.75, 2 * w + 5, 2, mix(pot, (30, 30, 30), 0.3), radius=1)
        b.box(x - w, y - h, 2 * w, h, pot, radius=1.5)
        b.box(x - w - 0.6, y - h - 1.6, 2 * w + 1.2, 2.4, mix(pot, (255, 255, 255), 0.3), radius=1)
        b.ellipse(x, y - h - 2.2, 1.6, 1.3, (50, 50, 56))
    left = b.between(8, 13)
    if b.ruined:
        spill = b.vary((172, 62, 44), 20)
        b.ellipse(left + 16, counter + 1, 15, 2.2, spill)
        for drip in range(4):
            b.box(left + 6 + drip * 6, counter + 1, 2, b.between(6, 22), spill, radius=1)
        b.shape(left + 4, counter - 4, 84, [(-4, -6), (4, -6), (4, 6), (-4, 6)], (206, 226, 226))
        for _ in range(5):  # a broken plate
            b.shape(
                b.between(24, 46),
                counter + b.between(-3, 1),
                b.between(0, 360),
                [(-3, -2), (3, -1), (0, 3)],
                (250, 250, 250),
            )
    else:
        for jar in range(3):
            jar_x, color = left + jar * 9, b.vary(b.rng.choice(((190, 60, 70), (236, 160, 60), (120, 160, 80))), 14)
            b.box(jar_x, counter - 9, 7, 9, (226, 238, 240), radius=1.2)
            b.box(jar_x + 0.8, counter - 6.5, 5.4, 5.8, color, radius=1)
            b.box(jar_x + 0.4, counter - 11, 6.2, 2.4, (186, 138, 92), radius=0.6)
        b.ellipse(left + 34, counter - 1.2, 7, 2.4, (248, 248, 244))
        for shift, color in ((-3, (214, 66, 58)), (3, (240, 180, 60)), (0, (140, 180, 80))):
            b.ellipse(left + 34 + shift, counter - 4, 2.8, 2.8, b.vary(color, 10))
