"""The outdoor settings of the embedded data set: forest, lake, playing field and street, each fine or ruined."""

from __future__ import annotations

import math

from .brush import Brush, mix, puddle, sky


def tree(b: Brush, x: float, ground: float, height: float, style: int, bare: bool) -> None:
    bark = b.vary((112, 78, 52))
    width = height * 0.1
    b.box(x - width / 2, ground - height * 0.55, width, height * 0.55, bark)
    if bare:
        top = ground - height
        b.line([(x, ground - height * 0.5), (x, top)], bark, width * 0.6)
        for side, low in ((-1, 0.5), (1, 0.62), (-1, 0.75)):
            fork = ground - height * low
            b.line([(x, fork), (x + side * height * 0.22, fork - height * 0.2)], bark, width * 0.4)
        return
    leaves = b.vary((62, 140, 72), 18)
    light = mix(leaves, (210, 235, 130), 0.25)
    if style == 0:  # round
        b.ellipse(x, ground - height * 0.7, height * 0.27, height * 0.3, leaves)
        b.ellipse(x - height * 0.07, ground - height * 0.77, height * 0.14, height * 0.15, light)
    elif style == 1:  # fir
        for level, half in ((0.3, 0.3), (0.5, 0.24), (0.7, 0.17)):
            base = ground - height * level
            b.polygon([(x - height * half, base), (x + height * half, base), (x, base - height * 0.34)], leaves)
            b.polygon([(x - height * half, base), (x, base), (x, base - height * 0.34)], light, 110)
    else:  # bushy
        for shift, rise, size in ((-0.16, 0.58, 0.18), (0.16, 0.6, 0.18), (0, 0.78, 0.22)):
            b.ellipse(x + shift * height, ground - rise * height, size * height, size * height, leaves)
        b.ellipse(x - 0.04 * height, ground - 0.82 * height, height * 0.1, height * 0.1, light)


def flower(b: Brush, x: float, y: float, size: float) -> None:
    petals = b.rng.choice(((235, 84, 96), (250, 206, 70), (240, 240, 250), (190, 110, 220)))
    b.line([(x, y), (x, y - size * 2)], (70, 140, 60), size * 0.35)
    for turn in range(5):
        angle = turn * math.tau / 5
        b.ellipse(
            x + math.cos(angle) * size * 0.6, y - size * 2 + math.sin(angle) * size * 0.6, size / 2, size / 2, petals
        )
    b.ellipse(x, y - size * 2, size * 0.4, size * 0.4, (250, 180, 60))


def forest(b: Brush) -> None:
    sky(b, 0, 0, 100, 60)
    ground = b.between(58, 64)
    far = b.vary((104, 160, 128))
    for step in range(-4, 108, 9):  # the far edge of the wood
        b.polygon(
            [(step - 8, ground + 2), (step + 8, ground + 2), (step + b.between(-2, 2), ground - b.between(20, 34))], far
        )
    b.box(0, ground, 100, 100 - ground, b.vary((84, 122, 62)))
    b.polygon([(40, 100), (72, 100), (58, ground), (53, ground)], b.vary((186, 156, 108)))  # the path
    size = 1.2 if b.near else 1.0
    for place, depth in ((10, 4), (34, 1), (77, 2), (93, 8), (22, 15)):
        height = b.between(46, 58) * size * (1 + depth / 40)
        tree(b, place + b.between(-4, 4), ground + depth, height, b.style, bare=b.ruined and b.rng.random() < 0.7)
    if b.ruined:
        y, tilt = b.between(80, 88), b.between(-14, 14)
        bark = b.vary((118, 82, 54))
        b.shape(50, y, tilt, [(-40, -4), (34, -3), (38, 0), (34, 3), (-40, 5)], bark)  # a fallen trunk
        b.shape(50, y, tilt, [(-12, -3), (-4, -3), (-22, -17), (-25, -15)], bark)
        ends = math.radians(tilt)
        end_x, end_y = 50 - 40 * math.cos(ends), y - 40 * math.sin(ends)
        b.ellipse(end_x, end_y + 0.4, 2.8, 5, (214, 176, 124))
        b.ring(end_x, end_y + 0.4, 1.4, 2.6, (170, 128, 84), 0.7)
    else:
        for _ in range(3):
            x, y, cap = b.between(6, 94), b.between(84, 95), b.between(2.6, 3.8)
            b.box(x - cap * 0.3, y, cap * 0.6, cap * 1.2, (244, 234, 214))
            b.ellipse(x, y, cap, cap * 0.7, (214, 62, 50))
            b.ellipse(x - cap * 0.3, y - cap * 0.2, cap * 0.22, cap * 0.18, (255, 255, 255))
            b.ellipse(x + cap * 0.4, y, cap * 0.2, cap * 0.16, (255, 255, 255))


def lake(b: Brush) -> None:
    sky(b, 0, 0, 100, 56)
    shore = b.between(46, 53)
    for x, peak, half in ((b.between(12, 24), 27, 28), (b.between(70, 86), 30, 30), (b.between(42, 56), 21, 26)):
        rock = b.vary((112, 126, 150), 10)
        top = shore - peak * b.between(0.9, 1.15)
        b.polygon([(x - half, shore), (x + half, shore), (x, top)], rock)
        b.polygon([(x + half, shore), (x + half * 0.1, shore), (x, top)], (60, 70, 96), 60)
        snow = (shore - top) * 0.32
        reach = half * 0.32
        zigzag = [(x - reach, top + snow), (x - reach / 3, top + snow * 0.75), (x + reach / 4, top + snow * 1.1)]
        b.polygon([(x, top), *zigzag, (x + reach, top + snow)], (248, 250, 252))
    water = b.vary((52, 132, 182), 12)
    b.box(0, shore, 100, 100 - shore, water)
    for _ in range(14):  # ripples, or waves
        x, y = b.between(-5, 95), b.between(shore + 3, 97)
        length = (y - shore) * 0.25 + 4
        if b.ruined:
            b.line([(x, y), (x + length / 2, y - 2.2), (x + length, y)], (232, 238, 244), 1.0, 210)
        else:
            b.line([(x, y), (x + length, y)], (190, 226, 244), 0.8, 180)
    size = (11 if b.near else 8.5) * b.between(0.92, 1.1)
    x, y = b.between(34, 62), b.between(68, 76)
    hull, sail = b.vary((176, 66, 48), 24), ((252, 250, 240), (250, 214, 110), (236, 120, 96))[b.style]
    tilt = b.between(-5, 5) + (b.rng.choice((-1, 1)) * b.between(118, 150) if b.ruined else 0)
    b.shape(x, y, tilt, [(-size, -2), (size, -2), (size * 0.7, size * 0.45), (-size * 0.7, size * 0.45)], hull)
    b.shape(x, y, tilt, [(-0.6, -2), (0.6, -2), (0.6, -size * 2.1), (-0.6, -size * 2.1)], (96, 70, 50))
    b.shape(x, y, tilt, [(1.4, -3.5), (size * 0.9, -3.5), (1.4, -size * 2)], sail)
    b.shape(x, y, tilt, [(-1.4, -3.5), (-size * 0.7, -3.5), (-1.4, -size * 1.7)], mix(sail, (120, 120, 140), 0.15))
    if b.ruined:  # the mast is under water
        b.polygon([(x - 26, y + 3), (x + 26, y + 3), (x + 30, y + 26), (x - 30, y + 26)], water, 205)
        b.line([(x - size * 1.5, y + 3), (x - size * 0.5, y + 1.5), (x + size * 0.5, y + 3), (x + size * 1.5, y + 2)],
               (240, 244, 248), 1.2)  # fmt: skip
    for _ in range(9):
        x, height = b.between(0, 24), b.between(14, 26)
        lean = b.between(4, 12) if b.ruined else b.between(-2, 2)
        b.line([(x, 100), (x + lean, 100 - height)], b.vary((78, 122, 58)), 1.1)
        b.ellipse(x + lean, 100 - height, 1.2, 3.2, (122, 80, 46))


def field(b: Brush) -> None:
    sky(b, 0, 0, 100, 50)
    edge = b.between(42, 48)
    for place in (6, 21, 37, 63, 80, 95):
        tree(b, place + b.between(-4, 4), edge + 2, b.between(16, 25), b.style, bare=False)
    grass = b.vary((92, 172, 74), 12)
    b.box(0, edge, 100, 100 - edge, grass)
    stripes = 7
    for stripe in range(0, stripes, 2):
        left, right = stripe / stripes, (stripe + 1) / stripes
        points = [(20 + 60 * left, edge), (20 + 60 * right, edge), (-60 + 220 * right, 100), (-60 + 220 * left, 100)]
        b.polygon(points, mix(grass, (20, 90, 30), 0.22))
    white = (250, 250, 246)
    middle = b.between(40, 60)
    size = (1.15 if b.near else 0.95) * b.between(0.95, 1.08)
    base = b.between(64, 69)
    b.line([(0, base), (100, base)], white, 1.2)
    box_half = 34 * size
    b.line([(middle - box_half, base), (middle - box_half * 1.3, base + 15), (middle + box_half * 1.3, base + 15),
            (middle + box_half, base)], white, 1.2)  # fmt: skip
    w, h = 23 * size, 23 * size
    if b.ruined:
        tilt = b.rng.choice((-1, 1)) * b.between(26, 40)
        for x, y, mud in ((b.between(12, 34), b.between(82, 92), 13), (b.between(62, 90), b.between(74, 88), 15)):
            puddle(b, x, y, mud, b.vary((118, 88, 58), 10))
    else:
        tilt = 0.0
    for step in range(1, 7):  # the net
        x, y = -w + 2 * w * step / 7, -h * step / 7
        b.shape(middle, base, tilt, [(x - 0.3, 0), (x + 0.3, 0), (x + 0.3, -h), (x - 0.3, -h)], (226, 232, 236))
        b.shape(middle, base, tilt, [(-w, y - 0.3), (w, y - 0.3), (w, y + 0.3), (-w, y + 0.3)], (226, 232, 236))
    for bar in (
        [(-w - 1, 0), (-w + 1.2, 0), (-w + 1.2, -h), (-w - 1, -h)],
        [(w - 1.2, 0), (w + 1, 0), (w + 1, -h), (w - 1.2, -h)],
        [(-w - 1, -h - 1.2), (w + 1, -h - 1.2), (w + 1, -h + 1.2), (-w - 1, -h + 1.2)],
    ):
        b.shape(middle, base, tilt, bar, white)
    x, y, r = b.between(25, 75), b.between(86, 92), 4.2 * size
    b.ellipse(x, y + r * 0.8, r, r * 0.25, (30, 60, 30), 90)
    b.ellipse(x, y, r, r * (0.5 if b.ruined else 1.0), white)
    b.ellipse(x, y, r * 0.36, r * (0.18 if b.ruined else 0.36), (44, 44, 52))
    for turn in range(5):
        angle = turn * math.tau / 5 + 0.3
        squeeze = 0.5 if b.ruined else 1.0
        spot_x, spot_y = x + math.cos(angle) * r * 0.75, y + math.sin(angle) * r * 0.75 * squeeze
        b.ellipse(spot_x, spot_y, r * 0.17, r * 0.17 * squeeze, (44, 44, 52))
    if not b.ruined:
        for _ in range(6):
            flower(b, b.rng.choice((b.between(2, 16), b.between(84, 98))), b.between(84, 99), b.between(1.5, 2.2))


def street(b: Brush) -> None:
    sky(b, 0, 0, 100, 70)
    pavement = b.between(68, 72)
    tower = b.between(20, 80)  # a building crane behind the roofs
    yellow = (240, 184, 60)
    for side in (-1.2, 1.2):
        b.line([(tower + side, pavement), (tower + side, 7)], yellow, 0.8)
    for strut in range(8, int(pavement), 5):
        b.line([(tower - 1.2, strut), (tower + 1.2, strut + 4)], yellow, 0.6)
    reach = b.rng.choice((-1, 1)) * b.between(22, 30)
    b.line([(tower - reach * 0.35, 9), (tower + reach, 9)], yellow, 1.4)
    b.line([(tower, 4), (tower + reach * 0.8, 9)], yellow, 0.6)
    b.line([(tower + reach * 0.8, 9), (tower + reach * 0.8, 20)], (70, 70, 76), 0.5)
    walls = [(226, 164, 122), (240, 218, 172), (176, 198, 210), (214, 142, 138), (198, 210, 170), (232, 196, 140)]
    b.rng.shuffle(walls)
    x = -3.0
    while x < 100:
        w, h = b.between(19, 25) * (1.15 if b.near else 0.95), b.between(32, 46)
        wall, top = b.vary(walls[int(x // 17) % len(walls)], 8), pavement - h
        b.box(x, top, w, h, wall)
        roof = b.vary((150, 74, 60), 16)
        if b.style == 0:
            b.polygon([(x - 1, top), (x + w + 1, top), (x + w / 2, top - 9)], roof)
        elif b.style == 1:
            b.box(x - 0.6, top - 2.6, w + 1.2, 3.4, roof)
        else:
            b.polygon([(x - 1, top), (x + w + 1, top), (x + w * 0.8, top - 7), (x + w * 0.2, top - 7)], roof)
        for row in range(int((h - 12) // 11)):
            for column in range(3):
                left, upper = x + w * (0.12 + 0.29 * column), top + 4 + row * 10.5
                broken = b.ruined and b.rng.random() < 0.55
                b.box(left - 0.5, upper - 0.5, w * 0.2 + 1, 7, (250, 246, 238))
                b.box(left, upper, w * 0.2, 6, (36, 38, 48) if broken else (116, 168, 204))
                if broken:
                    b.polygon(
                        [(left, upper), (left + w * 0.2, upper + 1), (left + w * 0.05, upper + 4)], (190, 208, 220)
                    )
        b.box(x + w * 0.4, pavement - 9, w * 0.2, 9, b.vary((96, 70, 58), 20))
        b.box(x + w * 0.06, pavement - 11, w * 0.88, 2.4, b.vary((70, 130, 120), 40))  # an awning
        x += w
    b.box(0, pavement, 100, 5, (186, 182, 176))
    b.box(0, pavement + 5, 100, 95 - pavement, b.vary((92, 94, 102), 8))
    for dash in range(-4, 100, 18):
        b.box(dash, pavement + 16, 9, 1.6, (246, 240, 220))
    size = (1.15 if b.near else 1.0) * b.between(0.92, 1.08)
    x, y, tilt = b.between(25, 62), pavement + b.between(12, 15), 0.0
    paint = b.vary(b.rng.choice(((212, 62, 56), (58, 112, 190), (240, 190, 60), (80, 160, 110))), 12)
    if b.ruined:
        tilt = b.between(8, 15)
        puddle(b, b.between(62, 86), b.between(92, 95), 12)
    turn = [(-15, -1), (-15, -6), (-9, -7), (-5, -13), (6, -13), (10, -7), (16, -5.5), (16, -1)]
    b.shape(x, y, tilt, [(px * size, py * size) for px, py in turn], paint)
    glass = [(-7, -7), (-4, -11.6), (5, -11.6), (8, -7)]
    b.shape(x, y, tilt, [(px * size, py * size) for px, py in glass], (40, 44, 54) if b.ruined else (198, 226, 240))
    for wheel in (-8.5, 9):
        drop = 0.0 if not (b.ruined and wheel > 0) else 3.0
        rim_x, rim_y = x + wheel * size + drop, y - 0.5 + wheel * size * math.tan(math.radians(tilt)) * 0.7
        b.ellipse(rim_x, rim_y, 3.3 * size, 3.3 * size, (36, 36, 42))
        b.ellipse(rim_x, rim_y, 1.5 * size, 1.5 * size, (190, 192, 198))
    if b.ruined:  # smoke from the bonnet
        for rise in range(4):
            b.ellipse(
                x + 14 * size + b.between(-2, 2),
                y - 9 - rise * 6,
                3 + rise * 1.4,
                3 + rise,
                (60, 60, 66),
                190,
                lit=True,
            )
    lamp, lean = 92 + b.between(-3, 3), (b.between(-24, -14) if b.ruined else 0)
    iron = (52, 58, 66)
    b.line([(lamp, pavement + 4), (lamp + lean, pavement - 36)], iron, 1.5)
    b.ellipse(lamp + lean, pavement - 37, 2.8, 3.4, iron if b.ruined else (255, 236, 160))
