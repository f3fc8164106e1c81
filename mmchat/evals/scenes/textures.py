"""Pictures from outside the drawn world, whose like the built-in model never saw.

They measure whether it says that it knows only simple drawings. Those that taught it to say so are
made in other ways: `assets/tiny/textures.py` has them, and adds them to TEXTURES for training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

Array = np.ndarray
Draw = Callable[[Generator, int, int], Array | Image.Image]


def draw_texture(name: str, seed: int, height: int, width: int) -> Image.Image:
    """The RGB picture of a texture's name and seed."""
    rng = np.random.default_rng([seed, len(name)])
    picture = TEXTURES[name](rng, height, width)
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8), "RGB")


def colour(rng: Generator) -> Array:
    """Any."""
    return rng.integers(0, 256, 3).astype(float)


def mix(amount: Array, first: Array, second: Array) -> Array:
    """Between two colours by `amount` [H, W] of 0..1 -> [H, W, 3]."""
    return first + amount[..., None] * (second - first)


def grid(height: int, width: int) -> tuple[Array, Array]:
    """y and x of each pixel, [H, W], where the longer side is 1."""
    y, x = np.mgrid[0:height, 0:width]
    return y / max(height, width), x / max(height, width)


def clouds(rng: Generator, height: int, width: int, octaves: int = 5, first: int = 3) -> Array:
    """Smooth noise of several scales, 0..1: [H, W]."""
    total = np.zeros((height, width))
    for octave in range(octaves):
        cells = first * 2**octave
        small = rng.random((cells, cells)).astype(np.float32)
        large = Image.fromarray(small, "F").resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(large) / 2**octave
    low, high = total.min(), total.max()
    return (total - low) / (high - low + 1e-9)


def _wood(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    rings = np.hypot(y - rng.uniform(-1, 2), 0.25 * (x - rng.uniform(-1, 2)))
    wave = np.sin((rings + 0.08 * clouds(rng, height, width)) * rng.uniform(60, 160))
    brown = np.array([rng.uniform(110, 190), rng.uniform(70, 120), rng.uniform(30, 80)])
    return mix(wave / 2 + 0.5, brown, brown * 0.6) + rng.normal(0, 5, (height, width, 1))


def _marble(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    veins = np.abs(np.sin((x + y + 1.5 * clouds(rng, height, width)) * rng.uniform(6, 14)))
    return mix(veins**0.4, rng.uniform(40, 150, 3), np.full(3, rng.uniform(200, 250)))


def _bricks(rng: Generator, height: int, width: int) -> Array:
    tall, wide = rng.integers(10, 20), rng.integers(24, 44)
    y, x = np.mgrid[0:height, 0:width]
    x = x + (y // tall % 2) * wide // 2
    shade = rng.uniform(0.7, 1.1, (height // tall + 1, (width + wide) // wide + 2))
    wall = np.array([170, 80, 60]) * shade[y // tall, x // wide][..., None]
    mortar = (y % tall < 2) | (x % wide < 2)
    return np.where(mortar[..., None], 200, wall) + rng.normal(0, 8, (height, width, 1))


def _landscape(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    top, low = np.array([90, 150, 220]), np.array([250, 200, 160])
    picture = mix(np.clip(y * max(height, width) / height, 0, 1), top, low)
    for layer in range(3):
        ridge = np.interp(x[0], np.linspace(0, 1, 12), rng.uniform(0, 0.25, 12))
        line = (0.35 + 0.2 * layer + ridge) * height / max(height, width)
        hill = np.array([60, 90 - 15 * layer, 70]) + rng.uniform(-25, 25, 3)
        picture = np.where((y > line)[..., None], hill, picture)
    return picture + rng.normal(0, 6, (height, width, 3))


def _water(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    total = np.zeros((height, width))
    for _ in range(6):
        angle, often = rng.uniform(0, 2 * np.pi), rng.uniform(10, 70)
        total += np.sin((y * np.sin(angle) + x * np.cos(angle)) * often + rng.uniform(0, 7))
    return mix(np.abs(total) / 6, np.array([200, 235, 240]), np.array([20, 90, 140]))


def _grass(rng: Generator, height: int, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), (40, 80, 30))
    draw = ImageDraw.Draw(picture)
    for _ in range(height * width // 25):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        green = int(rng.uniform(80, 200))
        tip = (x + rng.normal(0, 4), y - rng.uniform(4, 16))
        draw.line((x, y, *tip), fill=(green // 2, green, green // 4))
    return picture


def _fabric(rng: Generator, height: int, width: int) -> Array:
    y, x = np.mgrid[0:height, 0:width]
    a, b = rng.uniform(0.5, 1.6, 2)
    weave = (np.sin(x * a) * np.sin(y * b) + np.sin((x + y) * a / 2)) / 4 + 0.5
    return mix(weave, colour(rng), colour(rng)) + rng.normal(0, 10, (height, width, 1))


def _lights(rng: Generator, height: int, width: int) -> Array:
    """Soft lamps in the dark."""
    y, x = grid(height, width)
    picture = np.full((height, width, 3), rng.uniform(0, 40, 3))
    for _ in range(rng.integers(4, 14)):
        away = np.hypot(y - rng.uniform(0, y.max()), x - rng.uniform(0, x.max()))
        glow = 1 / (1 + np.exp((away - rng.uniform(0.03, 0.12)) * 90))
        picture = picture + glow[..., None] * rng.uniform(40, 220, 3)
    return picture


def _radial(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    away = np.hypot(y - rng.uniform(0, 1) * y.max(), x - rng.uniform(0, 1) * x.max())
    return mix(away / away.max(), colour(rng), colour(rng))


def _grain(rng: Generator, height: int, width: int) -> Array:
    """Sand or gravel: spots of a few pixels, lit from above."""
    spots = clouds(rng, height, width, 3, 24)
    light = np.clip(np.diff(spots, axis=0, prepend=spots[:1]) * 6 + 0.5, 0, 1)
    stone = np.array([rng.uniform(120, 210)] * 3) * (1, rng.uniform(0.85, 1), rng.uniform(0.6, 1))
    return mix(light, stone * 0.4, stone)


TEXTURES: dict[str, Draw] = {
    "wood": _wood, "marble": _marble, "bricks": _bricks, "landscape": _landscape,
    "water": _water, "grass": _grass, "fabric": _fabric, "lights": _lights, "radial": _radial,
    "grain": _grain,
}  # fmt: skip
HELDOUT = tuple(TEXTURES)
