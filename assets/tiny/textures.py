"""Pictures from outside the drawn world that teach the model to say that it does not know them.

Held-out scenes have others: `mmchat.evals.scenes.textures`.
"""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from mmchat.evals.scenes.textures import TEXTURES, Array, Draw, clouds, colour, grid, mix


def _blank(rng: Generator, height: int, width: int) -> Array:
    low = 228 if rng.random() < 0.5 else 0
    return np.broadcast_to(rng.integers(low, 256, 3).astype(float), (height, width, 3))


def _gradient(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    along = y * np.sin(angle) + x * np.cos(angle)
    along = (along - along.min()) / (np.ptp(along) + 1e-9)
    return mix(along, colour(rng), colour(rng))


def _noise(rng: Generator, height: int, width: int) -> Array:
    deep = rng.uniform(20, 120)
    channels = 3 if rng.random() < 0.5 else 1
    return colour(rng) + rng.normal(0, deep, (height, width, channels))


def _stripes(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    angle, often = rng.uniform(0, np.pi), rng.uniform(15, 90)
    wave = np.sin((y * np.sin(angle) + x * np.cos(angle)) * often)
    wave = (wave > 0).astype(float) if rng.random() < 0.4 else wave / 2 + 0.5
    return mix(wave, colour(rng), colour(rng))


def _checks(rng: Generator, height: int, width: int) -> Array:
    size = rng.integers(5, 30)
    y, x = np.mgrid[0:height, 0:width] // size
    return mix(((x + y) % 2).astype(float), colour(rng), colour(rng))


def _cloudy(rng: Generator, height: int, width: int) -> Array:
    first = int(rng.integers(1, 8))
    return mix(clouds(rng, height, width, 5, first), colour(rng), colour(rng))


def _mosaic(rng: Generator, height: int, width: int) -> Array:
    y, x = grid(height, width)
    points = rng.random((int(rng.integers(8, 60)), 2))
    near = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    return rng.integers(0, 256, (len(points), 3)).astype(float)[near]


def _discs(rng: Generator, height: int, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), tuple(int(c) for c in colour(rng)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(15, 80)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 25)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in colour(rng)))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6)))


def _scribble(rng: Generator, height: int, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), tuple(int(c) for c in colour(rng)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(8, 40)):
        steps = rng.normal(0, 15, (12, 2)).cumsum(0) + rng.random(2) * (width, height)
        line = [tuple(point) for point in steps.tolist()]
        draw.line(line, fill=tuple(int(c) for c in colour(rng)), width=int(rng.integers(1, 5)))
    return picture


def _blur(rng: Generator, height: int, width: int) -> Image.Image:
    """Large soft patches of colour, as in a photograph out of focus."""
    cells = rng.integers(0, 256, (*rng.integers(2, 7, 2), 3)).astype(np.uint8)
    picture = Image.fromarray(cells, "RGB").resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, rng.uniform(0, 20), (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8), "RGB")


def _shades(rng: Generator, height: int, width: int) -> Array:
    """Two layers of noise with a soft edge between them, lit from one side."""
    edge = clouds(rng, height, width, 4, 2)
    mask = 1 / (1 + np.exp(-(edge - 0.5) * rng.uniform(8, 60)))
    first = mix(clouds(rng, height, width, 6, 4), colour(rng), colour(rng))
    second = mix(clouds(rng, height, width, 6, 8), colour(rng), colour(rng))
    light = 0.6 + 0.6 * grid(height, width)[int(rng.integers(2))]
    return (first + mask[..., None] * (second - first)) * light[..., None]


LEARNT: dict[str, Draw] = {
    "blank": _blank, "gradient": _gradient, "noise": _noise, "stripes": _stripes,
    "checks": _checks, "clouds": _cloudy, "mosaic": _mosaic, "discs": _discs,
    "scribble": _scribble, "blur": _blur, "shades": _shades,
}  # fmt: skip
TEXTURES.update(LEARNT)
