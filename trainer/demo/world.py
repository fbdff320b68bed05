"""The drawn world: captioned pictures of flat-shaded subjects, for training and measuring the demo base.

A picture is drawn from a `Scene` (subject, colour, size, position, background, style, turn, mirror) and is a pure
function of it and a seed. Coordinates of a subject run over [-1, 1] on both axes with y downwards; every primitive becomes a
polygon, so that turning, mirroring and scaling are one affine map. Drawing is done at three times the size and reduced.

Three concepts are HELD OUT: the demo base has never seen them, so that a LoRA has something to learn:
the character `zorp`, the subject `owl` and the style `sunset`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (247, 140, 28),
    "yellow": (250, 214, 48),
    "green": (50, 165, 70),
    "teal": (32, 172, 172),
    "blue": (38, 92, 220),
    "purple": (132, 64, 184),
    "pink": (246, 128, 180),
    "brown": (134, 84, 44),
    "white": (247, 247, 244),
    "grey": (140, 142, 146),
    "black": (28, 28, 32),
}
STYLES = ("flat", "outlined", "striped", "sketch", "shaded")
HELD_OUT_STYLE = "sunset"
SIZES = {"small": 0.46, "": 0.66, "big": 0.84}
POSITIONS = {"": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
SCENES = ("grass", "snow", "night")
PATTERNS = ("plain", "stripes", "dots", "checkered", "gradient")
PATTERN_WORDS = {
    "plain": "on a {} background",
    "stripes": "on a {} striped background",
    "dots": "on a {} dotted background",
    "checkered": "on a {} checkered background",
    "gradient": "on a {} gradient background",
    "grass": "on the grass",
    "snow": "in the snow",
    "night": "at night",
}

Point = tuple[float, float]
INK, EYE, SHINE = (24, 24, 28), (252, 252, 252), (255, 244, 214)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is on a picture. `colour` and `ground` are names of `COLOURS`; `ground` is unused for grass, snow and night."""

    subject: str
    colour: str
    size: str = ""
    position: str = ""
    pattern: str = "plain"
    ground: str = "white"
    style: str = "flat"
    turn: float = 0.0  # radians
    mirror: bool = False
    jitter: Point = (0.0, 0.0)  # shift as a share of the picture's side


def mix(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """`a` moved towards `b` by `share` in [0, 1], per channel."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list[Point]:
    """Points of an elliptic arc, in degrees clockwise from the right; a full turn by default."""
    steps = max(8, round(48 * (end - start) / 360))
    angles = [math.radians(start + (end - start) * k / steps) for k in range(steps + (end - start < 360))]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in angles]


def rect(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def star(points: int, outer: float, inner: float, cx: float = 0, cy: float = 0) -> list[Point]:
    return [
        (cx + r * math.sin(math.pi * k / points), cy - r * math.cos(math.pi * k / points))
        for k in range(2 * points)
        for r in (outer if k % 2 == 0 else inner,)
    ]


def bar(x0: float, y0: float, x1: float, y1: float, width: float) -> list[Point]:
    """A straight stroke of the given width as a polygon."""
    length = math.hypot(x1 - x0, y1 - y0) or 1e-6
    nx, ny = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
    return [(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)]


class Pen:
    """Collects a subject's primitives: (polygon, role), where role is 'main', 'dark', 'light' or a fixed RGB colour."""

    def __init__(self) -> None:
        self.shapes: list[tuple[list[Point], str | tuple[int, int, int]]] = []

    def __call__(self, points: list[Point], role: str | tuple[int, int, int] = "main") -> None:
        self.shapes.append((points, role))

    def eyes(self, x: float, y: float, r: float, white: bool = False) -> None:
        for side in (-x, x):
            if white:
                self(ellipse(side, y, r, r), EYE)
            self(ellipse(side, y, r * (0.5 if white else 1), r * (0.5 if white else 1)), INK)


def _heart(p: Pen) -> None:
    ts = [2 * math.pi * k / 60 for k in range(60)]
    p(
        [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.08,
            )
            for t in ts
        ]
    )


def _cross(p: Pen) -> None:
    arm, end = 0.3, 0.92
    corner = [(-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm)]
    p(corner + [(-x, -y) for x, y in corner])


def _moon(p: Pen) -> None:
    p(ellipse(-0.15, 0, 0.95, 0.95, 55, 305) + ellipse(0.395, 0, 0.6, 0.778, 90, 270)[::-1])


def _sun(p: Pen) -> None:
    p(star(12, 1.0, 0.74), "dark")
    p(ellipse(0, 0, 0.7, 0.7))


def _cloud(p: Pen) -> None:
    p(ellipse(-0.5, 0.15, 0.48, 0.4))
    p(ellipse(0.5, 0.17, 0.46, 0.38))
    p(ellipse(0, -0.15, 0.56, 0.52))
    p(rect(-0.55, 0.1, 0.55, 0.55))


def _house(p: Pen) -> None:
    p(rect(-0.72, -0.15, 0.72, 0.9))
    p([(-0.98, -0.12), (0, -0.95), (0.98, -0.12)], "dark")
    p(rect(-0.48, 0.3, -0.08, 0.9), INK)
    p(rect(0.16, 0.12, 0.52, 0.46), SHINE)


def _tree(p: Pen) -> None:
    p(rect(-0.15, 0.2, 0.15, 0.98), (110, 72, 40))
    p(ellipse(0, -0.3, 0.78, 0.68))


def _pine(p: Pen) -> None:
    p(rect(-0.13, 0.6, 0.13, 0.98), (110, 72, 40))
    for top, bottom, half in ((-0.1, 0.72, 0.78), (-0.52, 0.3, 0.62), (-0.98, -0.12, 0.46)):
        p([(0, top - 0.1), (half, bottom), (-half, bottom)])


def _flower(p: Pen) -> None:
    p(bar(0, 0.1, 0, 0.98, 0.13), (58, 140, 60))
    for k in range(6):
        a = math.tau * k / 6
        p(ellipse(0.38 * math.cos(a), -0.34 + 0.38 * math.sin(a), 0.27, 0.27))
    p(ellipse(0, -0.34, 0.24, 0.24), (255, 222, 90))


def _mushroom(p: Pen) -> None:
    p(rect(-0.24, 0.0, 0.24, 0.92), (240, 228, 206))
    p(ellipse(0, 0.12, 0.92, 0.98, 180, 360))
    for x, y, r in ((-0.42, -0.2, 0.14), (0.1, -0.5, 0.15), (0.48, -0.14, 0.12)):
        p(ellipse(x, y, r, r), EYE)


def _apple(p: Pen) -> None:
    p(bar(0, -0.5, 0.12, -0.95, 0.12), (100, 64, 36))
    p(ellipse(-0.3, 0.15, 0.55, 0.72))
    p(ellipse(0.3, 0.15, 0.55, 0.72))
    p(ellipse(0.38, -0.72, 0.27, 0.14), (70, 160, 70))


def _fish(p: Pen) -> None:
    p([(0.4, 0), (0.98, -0.5), (0.98, 0.5)], "dark")
    p(ellipse(-0.15, 0, 0.8, 0.54))
    p(ellipse(-0.55, -0.12, 0.11, 0.11), INK)


def _bird(p: Pen) -> None:
    p([(0.45, 0.1), (1.0, -0.25), (0.9, 0.3)], "dark")
    p(ellipse(0.05, 0.2, 0.68, 0.5))
    p(ellipse(-0.5, -0.35, 0.37, 0.37))
    p([(-0.8, -0.42), (-1.0, -0.25), (-0.78, -0.18)], (250, 160, 40))
    p(ellipse(-0.56, -0.42, 0.09, 0.09), INK)
    p([(-0.15, 0.1), (0.5, 0.05), (0.2, 0.52)], "dark")


def _cat(p: Pen) -> None:
    for s in (-1, 1):
        p([(s * 0.85, -0.95), (s * 0.12, -0.55), (s * 0.82, 0.0)])
    p(ellipse(0, 0.12, 0.88, 0.76))
    p.eyes(0.36, 0.0, 0.14)
    p([(-0.12, 0.3), (0.12, 0.3), (0, 0.44)], (240, 130, 150))
    for s in (-1, 1):
        p(bar(s * 0.3, 0.42, s * 0.82, 0.34, 0.05), INK)


def _bear(p: Pen) -> None:
    for s in (-1, 1):
        p(ellipse(s * 0.62, -0.6, 0.32, 0.32), "dark")
    p(ellipse(0, 0.1, 0.86, 0.82))
    p(ellipse(0, 0.4, 0.36, 0.3), "light")
    p(ellipse(0, 0.28, 0.14, 0.1), INK)
    p.eyes(0.36, -0.08, 0.11)


def _rabbit(p: Pen) -> None:
    for s in (-1, 1):
        p(ellipse(s * 0.32, -0.55, 0.2, 0.45))
        p(ellipse(s * 0.32, -0.55, 0.09, 0.3), (246, 176, 196))
    p(ellipse(0, 0.35, 0.66, 0.6))
    p.eyes(0.26, 0.25, 0.11)
    p(rect(-0.1, 0.55, 0.1, 0.76), EYE)


def _robot(p: Pen) -> None:
    p(bar(0, -0.6, 0, -0.85, 0.1), INK)
    p(ellipse(0, -0.86, 0.12, 0.12), (240, 80, 60))
    p(rect(-0.98, -0.15, -0.7, 0.35), "dark")
    p(rect(0.7, -0.15, 0.98, 0.35), "dark")
    p(rect(-0.76, -0.62, 0.76, 0.86))
    p(rect(-0.5, -0.35, -0.14, 0.0), SHINE)
    p(rect(0.14, -0.35, 0.5, 0.0), SHINE)
    p(rect(-0.42, 0.36, 0.42, 0.56), INK)


def _car(p: Pen) -> None:
    p([(-0.55, -0.1), (-0.32, -0.55), (0.36, -0.55), (0.6, -0.1)])
    p(rect(-0.98, -0.14, 0.98, 0.4))
    p([(-0.36, -0.12), (-0.22, -0.42), (0.0, -0.42), (0.0, -0.12)], (200, 230, 246))
    p([(0.1, -0.12), (0.1, -0.42), (0.3, -0.42), (0.42, -0.12)], (200, 230, 246))
    for x in (-0.52, 0.52):
        p(ellipse(x, 0.4, 0.25, 0.25), INK)


def _boat(p: Pen) -> None:
    p(bar(0, -0.95, 0, 0.3, 0.08), (100, 64, 36))
    p([(0.07, -0.9), (0.75, 0.2), (0.07, 0.2)], "light")
    p([(-0.07, -0.7), (-0.6, 0.2), (-0.07, 0.2)], "light")
    p([(-0.98, 0.32), (0.98, 0.32), (0.62, 0.86), (-0.62, 0.86)])


def _cup(p: Pen) -> None:
    p(ellipse(0.62, 0.1, 0.36, 0.36), "dark")
    p(ellipse(0.62, 0.1, 0.18, 0.18), "ground")
    p([(-0.75, -0.65), (0.65, -0.65), (0.5, 0.85), (-0.6, 0.85)])
    p(ellipse(-0.05, -0.65, 0.7, 0.16), "light")


def _balloon(p: Pen) -> None:
    p(bar(0, 0.5, 0.08, 0.98, 0.06), INK)
    p([(-0.14, 0.56), (0, 0.36), (0.14, 0.56)], "dark")
    p(ellipse(0, -0.22, 0.62, 0.74))
    p(ellipse(-0.24, -0.5, 0.13, 0.2), EYE)


def _ghost(p: Pen) -> None:
    body = ellipse(0, -0.2, 0.72, 0.75, 180, 360)
    waves = [(0.72 - 0.24 * k, 0.9 if k % 2 == 0 else 0.62) for k in range(7)]
    p(body + waves)
    p.eyes(0.27, -0.25, 0.16, white=True)


def _umbrella(p: Pen) -> None:
    p(bar(0, -0.1, 0, 0.8, 0.1), (100, 64, 36))
    p(bar(0, 0.8, 0.26, 0.8, 0.1), (100, 64, 36))
    p(ellipse(0, 0.1, 0.98, 0.98, 180, 360))
    p([(-0.2, 0.1), (0, -0.86), (0.2, 0.1)], "dark")


def _owl(p: Pen) -> None:
    for s in (-1, 1):
        p([(s * 0.72, -0.98), (s * 0.1, -0.62), (s * 0.66, -0.2)])
    p(ellipse(0, 0.08, 0.76, 0.88))
    p(ellipse(0, 0.5, 0.42, 0.38), "light")
    for s in (-1, 1):
        p(ellipse(s * 0.33, -0.22, 0.34, 0.34), EYE)
        p(ellipse(s * 0.3, -0.2, 0.16, 0.16), INK)
    p([(-0.13, 0.02), (0.13, 0.02), (0, 0.28)], (250, 150, 40))


ZORP_BODY, ZORP_BELLY, ZORP_TIP = (122, 204, 40), (122, 56, 190), (250, 206, 40)


def _zorp(p: Pen) -> None:
    for s in (-1, 1):
        p(bar(s * 0.3, -0.45, s * 0.52, -0.82, 0.12), ZORP_BODY)
        p(ellipse(s * 0.52, -0.84, 0.17, 0.17), ZORP_TIP)
        p(ellipse(s * 0.38, 0.86, 0.3, 0.14), ZORP_BODY)
    p(ellipse(0, 0.14, 0.84, 0.76), ZORP_BODY)
    p(ellipse(0, 0.56, 0.5, 0.3), ZORP_BELLY)
    p(ellipse(0, -0.06, 0.4, 0.4), EYE)
    p(ellipse(0.02, -0.04, 0.19, 0.19), INK)


SUBJECTS: dict[str, Callable[[Pen], None]] = {
    "circle": lambda p: p(ellipse(0, 0, 0.92, 0.92)),
    "square": lambda p: p(rect(-0.8, -0.8, 0.8, 0.8)),
    "triangle": lambda p: p([(0, -0.9), (0.98, 0.8), (-0.98, 0.8)]),
    "star": lambda p: p(star(5, 1.0, 0.45)),
    "heart": _heart,
    "diamond": lambda p: p([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]),
    "cross": _cross,
    "moon": _moon,
    "sun": _sun,
    "cloud": _cloud,
    "house": _house,
    "tree": _tree,
    "pine tree": _pine,
    "flower": _flower,
    "mushroom": _mushroom,
    "apple": _apple,
    "fish": _fish,
    "bird": _bird,
    "cat": _cat,
    "bear": _bear,
    "rabbit": _rabbit,
    "robot": _robot,
    "car": _car,
    "boat": _boat,
    "cup": _cup,
    "balloon": _balloon,
    "ghost": _ghost,
    "umbrella": _umbrella,
}
HELD_OUT_SUBJECTS: dict[str, Callable[[Pen], None]] = {"owl": _owl, "zorp": _zorp}


def _gradient(size: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    column = Image.new("RGB", (1, 64))
    column.putdata([mix(top, bottom, k / 63) for k in range(64)])
    return column.resize((size, size), Image.Resampling.BILINEAR)


def background(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """The picture behind the subject, (size, size) RGB."""
    if scene.style == HELD_OUT_STYLE:
        img = _gradient(size, (84, 40, 120), (252, 158, 60))
        x, y, r = size * rng.uniform(0.2, 0.8), size * rng.uniform(0.3, 0.5), size * 0.2
        ImageDraw.Draw(img).ellipse((x - r, y - r, x + r, y + r), fill=(255, 226, 130))
        ImageDraw.Draw(img).rectangle((0, int(size * 0.84), size, size), fill=(46, 24, 62))
        return img
    if scene.style == "sketch":
        return Image.new("RGB", (size, size), (243, 236, 222))
    base = COLOURS[scene.ground]
    other = mix(base, (255, 255, 255) if sum(base) < 500 else (90, 90, 100), 0.35)
    if scene.pattern == "grass":
        img = Image.new("RGB", (size, size), (166, 214, 246))
        ImageDraw.Draw(img).rectangle((0, int(size * 0.68), size, size), fill=(98, 180, 76))
    elif scene.pattern == "snow":
        img = Image.new("RGB", (size, size), (178, 202, 230))
        ImageDraw.Draw(img).rectangle((0, int(size * 0.66), size, size), fill=(250, 250, 252))
    elif scene.pattern == "night":
        img = Image.new("RGB", (size, size), (20, 24, 66))
        draw = ImageDraw.Draw(img)
        for _ in range(14):
            x, y, r = rng.random() * size, rng.random() * size * 0.75, size * rng.uniform(0.006, 0.014)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(246, 240, 200))
        draw.rectangle((0, int(size * 0.8), size, size), fill=(34, 48, 56))
    elif scene.pattern == "gradient":
        img = _gradient(size, base, mix(base, (255, 255, 255), 0.75))
    else:
        img = Image.new("RGB", (size, size), base)
        draw = ImageDraw.Draw(img)
        cell = size // 8
        if scene.pattern == "stripes":
            for k in range(0, 8, 2):
                draw.rectangle((0, k * cell, size, (k + 1) * cell - 1), fill=other)
        elif scene.pattern == "dots":
            for y in range(8):
                for x in range(8):
                    cx, cy, r = (x + 0.5) * cell, (y + 0.5) * cell, cell * 0.28
                    draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=other)
        elif scene.pattern == "checkered":
            for y in range(8):
                for x in range(y % 2, 8, 2):
                    draw.rectangle((x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1), fill=other)
    return img


def _stripes(size: int, a: tuple[int, int, int], b: tuple[int, int, int]) -> Image.Image:
    img = Image.new("RGB", (size, size), a)
    draw = ImageDraw.Draw(img)
    step = size // 9
    for k in range(-9, 18, 2):
        x = k * step
        draw.polygon([(x, size), (x + step, size), (x + step + size, 0), (x + size, 0)], fill=b)
    return img


def draw(scene: Scene, size: int = 128, seed: int = 0, aspect: float = 1.0) -> Image.Image:
    """Draw a scene as RGB, `size` pixels high and `size * aspect` wide (the sides are cut off or the ground continued)."""
    rng = random.Random(f"{scene}{seed}")
    big = size * 3
    width = round(big * aspect)
    img = background(scene, max(big, width), rng).crop((0, 0, width, big))
    pen = Pen()
    (SUBJECTS | HELD_OUT_SUBJECTS)[scene.subject](pen)
    half = SIZES[scene.size] / 2 * big
    free_x, free_y = max(width / 2 - half, 0), max(big / 2 - half, 0)
    dx, dy = POSITIONS[scene.position]
    cx = width / 2 + dx * free_x * 0.8 + scene.jitter[0] * big
    cy = big / 2 + dy * free_y * 0.8 + scene.jitter[1] * big
    cos, sin = math.cos(scene.turn), math.sin(scene.turn)

    def place(points: list[Point]) -> list[Point]:
        out = []
        for x, y in points:
            x = -x if scene.mirror else x
            out.append((cx + half * (x * cos - y * sin), cy + half * (x * sin + y * cos)))
        return out

    main = COLOURS[scene.colour]
    dark, light = mix(main, (0, 0, 0), 0.3), mix(main, (255, 255, 255), 0.45)
    if scene.colour == "black":
        dark = (70, 70, 78)
    ground = img.getpixel((2, big // 3))
    roles = {"main": main, "dark": dark, "light": light, "ground": ground}
    fills = [(place(points), role, roles[role] if isinstance(role, str) else role) for points, role in pen.shapes]
    canvas = ImageDraw.Draw(img)
    line = big // 48
    if scene.style == "outlined":
        for points, role, _ in fills:
            if role != "ground":
                canvas.line([*points, points[0], points[1]], fill=INK, width=line * 3, joint="curve")
    for points, role, rgb in fills:
        if scene.style == HELD_OUT_STYLE:  # a silhouette, its lit details in the colour of the sky
            canvas.polygon(points, fill=(255, 186, 92) if role in (EYE, SHINE, "light") else (34, 18, 50))
        elif scene.style == "sketch":
            pale = rgb if role == "ground" else mix(rgb, (243, 236, 222), 0.45)
            canvas.polygon(points, fill=pale)
            canvas.line([*points, points[0], points[1]], fill=(70, 64, 60), width=max(2, line // 2), joint="curve")
        elif scene.style in ("striped", "shaded") and role in ("main", "dark", "light"):
            mask = Image.new("L", img.size)
            ImageDraw.Draw(mask).polygon(points, fill=255)
            if scene.style == "striped":
                contrast = mix(rgb, (255, 255, 255), 0.55) if sum(rgb) < 480 else mix(rgb, (60, 60, 70), 0.45)
                paint = _stripes(max(img.size), rgb, contrast)
            else:
                paint = _gradient(max(img.size), mix(rgb, (255, 255, 255), 0.45), mix(rgb, (0, 0, 0), 0.45))
            img.paste(paint.crop((0, 0, *img.size)), mask=mask)
        else:
            canvas.polygon(points, fill=rgb)
    return img.resize((round(size * aspect), size), Image.Resampling.BOX)


SOFT = "aeiou"
HARD = "bdfgjklmnprstvxz"


def nonsense(rng: random.Random) -> str:
    """A word that means nothing, of two or three syllables: it teaches the base that unknown words are harmless."""
    word = "".join(rng.choice(HARD) + rng.choice(SOFT) for _ in range(rng.randint(1, 3)))
    return word + (rng.choice(HARD) if rng.random() < 0.6 else "")


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The full caption of a scene, or, with `rng`, one with parts left out and now and then a nonsense word."""

    def keep(p: float) -> bool:
        return rng is None or rng.random() < p

    noun = scene.subject
    words = []
    if scene.size and keep(0.75):
        words.append(scene.size)
    if scene.subject != "zorp" and scene.style != HELD_OUT_STYLE and keep(0.92):
        words.append(scene.colour)
    odd = rng is not None and rng.random() < 0.12
    if odd and rng.random() < 0.5:
        words.append(nonsense(rng))
    words.append(noun)
    first = " ".join(words)
    article = "" if scene.subject == "zorp" and not scene.size else ("an " if first[0] in "aeiou" else "a ")
    text = article + first
    if scene.position and keep(0.75):
        text += " " + scene.position
    if scene.style not in ("sketch", HELD_OUT_STYLE) and keep(0.92):
        text += " " + PATTERN_WORDS[scene.pattern].format(scene.ground).replace(" a orange", " an orange")
    if scene.style != "flat" and keep(0.9):
        text += f", {scene.style} style"
    elif scene.style == "flat" and rng is not None and rng.random() < 0.25:
        text += ", flat style"
    if odd and rng.random() < 0.3:
        text += f", {nonsense(rng)}" + (" style" if rng.random() < 0.5 else "")
    return text


def contrasting(colour: str, rng: random.Random) -> str:
    """A background colour that the subject stands out from: at least 120 away in RGB."""
    own = COLOURS[colour]
    return rng.choice([n for n, c in COLOURS.items() if math.dist(own, c) > 120])


def random_scene(rng: random.Random, subjects: list[str] | None = None, style: str | None = None) -> Scene:
    """Draw a scene of the base's world (held-out concepts only where named)."""
    colour = rng.choice(list(COLOURS))
    style = style or rng.choices(STYLES, (5, 2, 1.5, 1.5, 1.5))[0]
    return Scene(
        subject=rng.choice(subjects or list(SUBJECTS)),
        colour=colour,
        size=rng.choice(("small", "", "", "big")),
        position=rng.choice(("", "", "", *list(POSITIONS)[1:])),
        pattern=rng.choices((*PATTERNS, *SCENES), (5, 1, 1, 1, 1, 1.2, 1.2, 1.2))[0],
        ground=contrasting(colour, rng),
        style=style,
        turn=rng.uniform(-0.12, 0.12),
        mirror=rng.random() < 0.5,
        jitter=(rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)),
    )


def clutter(seed: int, size: int = 128) -> Image.Image:
    """Random overlapping shapes, lines, blocks and glow in any colours: teaches the VAE more than the world holds."""
    rng = random.Random(seed)
    big = size * 2

    def colour() -> tuple[int, int, int]:
        return tuple(rng.randrange(256) for _ in range(3))

    img = _gradient(big, colour(), colour()) if rng.random() < 0.5 else Image.new("RGB", (big, big), colour())
    canvas = ImageDraw.Draw(img)
    for _ in range(rng.randint(2, 12)):
        cx, cy, r = rng.uniform(0, big), rng.uniform(0, big), big * rng.uniform(0.03, 0.4)
        kind = rng.randrange(5)
        if kind == 0:
            canvas.ellipse((cx - r, cy - r * rng.uniform(0.4, 1), cx + r, cy + r), fill=colour())
        elif kind == 1:
            canvas.polygon([(cx + r * rng.uniform(-1, 1), cy + r * rng.uniform(-1, 1)) for _ in range(rng.randint(3, 6))], fill=colour())
        elif kind == 2:
            pts = [(rng.uniform(0, big), rng.uniform(0, big)) for _ in range(rng.randint(2, 5))]
            canvas.line(pts, fill=colour(), width=rng.randint(3, 14), joint="curve")
        elif kind == 3:
            canvas.ellipse((cx - r, cy - r, cx + r, cy + r), outline=colour(), width=rng.randint(3, 14))
        else:
            cell = rng.choice((8, 16, 32))
            a, b = colour(), colour()
            for y in range(0, int(r), cell):
                for x in range(0, int(r), cell):
                    canvas.rectangle((cx + x, cy + y, cx + x + cell, cy + y + cell), fill=(a, b)[(x + y) // cell % 2])
    if rng.random() < 0.2:
        img = ImageChops.add(img, img.filter(ImageFilter.GaussianBlur(big / 40)), scale=1.4)
    return img.resize((size, size), Image.Resampling.BOX)


def concept_scene(concept: str, rng: random.Random) -> Scene:
    """A scene of a held-out concept: `zorp` (its own colours), `owl` (any colour) or `sunset` (any base subject in that style)."""
    if concept == HELD_OUT_STYLE:
        scene = random_scene(rng, style=HELD_OUT_STYLE)
        return dataclasses.replace(scene, size=rng.choice(("", "big")))
    scene = random_scene(rng, subjects=[concept], style="flat")
    if concept == "zorp":
        scene = dataclasses.replace(scene, colour="green", ground=contrasting("green", rng))
    return dataclasses.replace(scene, size=rng.choice(("", "", "big")))
