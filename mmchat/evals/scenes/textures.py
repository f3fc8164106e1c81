"""Pictures from outside the drawn world: noise, gradients, blank pages, real-looking textures.

Those in TRAIN teach a model to say that it knows only simple drawings; those in HELDOUT, made in
other ways, measure whether it says so of pictures that it never saw the like of.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

Array = np.ndarray


def draw_texture(name: str, seed: int, height: int, width: int) -> Image.Image:
    """The RGB picture of a texture's name and seed."""
    rng = np.random.default_rng([seed, len(name)])
    picture = TEXTURES[name](rng, height, width)
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8), "RGB")


def _colour(rng: Generator) -> Array:
    return rng.integers(0, 256, 3).astype(float)


def _mix(amount: Array, first: Array, second: Array) -> Array:
    """Between two colours by `amount` [H, W] of 0..1 -> [H, W, 3]."""
    return first + amount[..., None] * (second - first)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0:height, 0:width]
    return y / max(height, width), x / max(height, width)


def _clouds(rng: Generator, height: int, width: int, octaves: int = 5, first: int = 3) -> Array:
    """Smooth noise of several scales, 0..1: [H, W]."""
    total = np.zeros((height, width))
    for octave in range(octaves):
        cells = first * 2**octave
        small = rng.random((cells, cells)).astype(np.float32)
        large = Image.fromarray(small, "F").resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(large) / 2**octave
    low, high = total.min(), total.max()
    return (total - low) / (high - low + 1e-9)


def _blank(rng: Generator, height: int, width: int) -> Array:
    low = 228 if rng.random() < 0.5 else 0
    return np.broadcast_to(rng.integers(low, 256, 3).astype(float), (height, width, 3))


def _gradient(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    along = y * np.sin(angle) + x * np.cos(angle)
    along = (along - along.min()) / (np.ptp(along) + 1e-9)
    return _mix(along, _colour(rng), _colour(rng))


def _noise(rng: Generator, height: int, width: int) -> Array:
    deep = rng.uniform(20, 120)
    channels = 3 if rng.random() < 0.5 else 1
    return _colour(rng) + rng.normal(0, deep, (height, width, channels))


def _stripes(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    angle, often = rng.uniform(0, np.pi), rng.uniform(15, 90)
    wave = np.sin((y * np.sin(angle) + x * np.cos(angle)) * often)
    wave = (wave > 0).astype(float) if rng.random() < 0.4 else wave / 2 + 0.5
    return _mix(wave, _colour(rng), _colour(rng))


def _checks(rng: Generator, height: int, width: int) -> Array:
    size = rng.integers(5, 30)
    y, x = np.mgrid[0:height, 0:width] // size
    return _mix(((x + y) % 2).astype(float), _colour(rng), _colour(rng))


def _cloudy(rng: Generator, height: int, width: int) -> Array:
    first = int(rng.integers(1, 8))
    return _mix(_clouds(rng, height, width, 5, first), _colour(rng), _colour(rng))


def _mosaic(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    points = rng.random((int(rng.integers(8, 60)), 2))
    near = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    return rng.integers(0, 256, (len(points), 3)).astype(float)[near]


def _discs(rng: Generator, height: int, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), tuple(int(c) for c in _colour(rng)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(15, 80)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 25)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in _colour(rng)))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6)))


def _scribble(rng: Generator, height: int, width: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), tuple(int(c) for c in _colour(rng)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(8, 40)):
        steps = rng.normal(0, 15, (12, 2)).cumsum(0) + rng.random(2) * (width, height)
        line = [tuple(point) for point in steps.tolist()]
        draw.line(line, fill=tuple(int(c) for c in _colour(rng)), width=int(rng.integers(1, 5)))
    return picture


def _blur(rng: Generator, height: int, width: int) -> Image.Image:
    """Large soft patches of colour, as in a photograph out of focus."""
    cells = rng.integers(0, 256, (*rng.integers(2, 7, 2), 3)).astype(np.uint8)
    picture = Image.fromarray(cells, "RGB").resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, rng.uniform(0, 20), (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8), "RGB")


def _shades(rng: Generator, height: int, width: int) -> Array:
    """Two layers of noise with a soft edge between them, lit from one side."""
    edge = _clouds(rng, height, width, 4, 2)
    mask = 1 / (1 + np.exp(-(edge - 0.5) * rng.uniform(8, 60)))
    first = _mix(_clouds(rng, height, width, 6, 4), _colour(rng), _colour(rng))
    second = _mix(_clouds(rng, height, width, 6, 8), _colour(rng), _colour(rng))
    light = 0.6 + 0.6 * _grid(height, width)[int(rng.integers(2))]
    return (first + mask[..., None] * (second - first)) * light[..., None]


def _wood(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    rings = np.hypot(y - rng.uniform(-1, 2), 0.25 * (x - rng.uniform(-1, 2)))
    wave = np.sin((rings + 0.08 * _clouds(rng, height, width)) * rng.uniform(60, 160))
    brown = np.array([rng.uniform(110, 190), rng.uniform(70, 120), rng.uniform(30, 80)])
    return _mix(wave / 2 + 0.5, brown, brown * 0.6) + rng.normal(0, 5, (height, width, 1))


def _marble(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    veins = np.abs(np.sin((x + y + 1.5 * _clouds(rng, height, width)) * rng.uniform(6, 14)))
    return _mix(veins**0.4, rng.uniform(40, 150, 3), np.full(3, rng.uniform(200, 250)))


def _bricks(rng: Generator, height: int, width: int) -> Array:
    tall, wide = rng.integers(10, 20), rng.integers(24, 44)
    y, x = np.mgrid[0:height, 0:width]
    x = x + (y // tall % 2) * wide // 2
    shade = rng.uniform(0.7, 1.1, (height // tall + 1, (width + wide) // wide + 2))
    wall = np.array([170, 80, 60]) * shade[y // tall, x // wide][..., None]
    mortar = (y % tall < 2) | (x % wide < 2)
    return np.where(mortar[..., None], 200, wall) + rng.normal(0, 8, (height, width, 1))


def _landscape(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    top, low = np.array([90, 150, 220]), np.array([250, 200, 160])
    picture = _mix(np.clip(y * max(height, width) / height, 0, 1), top, low)
    for layer in range(3):
        ridge = np.interp(x[0], np.linspace(0, 1, 12), rng.uniform(0, 0.25, 12))
        line = (0.35 + 0.2 * layer + ridge) * height / max(height, width)
        hill = np.array([60, 90 - 15 * layer, 70]) + rng.uniform(-25, 25, 3)
        picture = np.where((y > line)[..., None], hill, picture)
    return picture + rng.normal(0, 6, (height, width, 3))


def _water(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    total = np.zeros((height, width))
    for _ in range(6):
        angle, often = rng.uniform(0, 2 * np.pi), rng.uniform(10, 70)
        total += np.sin((y * np.sin(angle) + x * np.cos(angle)) * often + rng.uniform(0, 7))
    return _mix(np.abs(total) / 6, np.array([200, 235, 240]), np.array([20, 90, 140]))


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
    return _mix(weave, _colour(rng), _colour(rng)) + rng.normal(0, 10, (height, width, 1))


def _lights(rng: Generator, height: int, width: int) -> Array:
    """Soft lamps in the dark."""
    y, x = _grid(height, width)
    picture = np.full((height, width, 3), rng.uniform(0, 40, 3))
    for _ in range(rng.integers(4, 14)):
        away = np.hypot(y - rng.uniform(0, y.max()), x - rng.uniform(0, x.max()))
        glow = 1 / (1 + np.exp((away - rng.uniform(0.03, 0.12)) * 90))
        picture = picture + glow[..., None] * rng.uniform(40, 220, 3)
    return picture


def _radial(rng: Generator, height: int, width: int) -> Array:
    y, x = _grid(height, width)
    away = np.hypot(y - rng.uniform(0, 1) * y.max(), x - rng.uniform(0, 1) * x.max())
    return _mix(away / away.max(), _colour(rng), _colour(rng))


def _grain(rng: Generator, height: int, width: int) -> Array:
    """Sand or gravel: spots of a few pixels, lit from above."""
    spots = _clouds(rng, height, width, 3, 24)
    light = np.clip(np.diff(spots, axis=0, prepend=spots[:1]) * 6 + 0.5, 0, 1)
    stone = np.array([rng.uniform(120, 210)] * 3) * (1, rng.uniform(0.85, 1), rng.uniform(0.6, 1))
    return _mix(light, stone * 0.4, stone)


TEXTURES: dict[str, Callable[[Generator, int, int], Array | Image.Image]] = {
    "blank": _blank, "gradient": _gradient, "noise": _noise, "stripes": _stripes,
    "checks": _checks, "clouds": _cloudy, "mosaic": _mosaic, "discs": _discs,
    "scribble": _scribble, "blur": _blur, "shades": _shades,
    "wood": _wood, "marble": _marble, "bricks": _bricks, "landscape": _landscape,
    "water": _water, "grass": _grass, "fabric": _fabric, "lights": _lights, "radial": _radial,
    "grain": _grain,
}  # fmt: skip
