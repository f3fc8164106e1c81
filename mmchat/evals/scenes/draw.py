"""Draws a scene's picture with Pillow, at its final size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

from mmchat.evals.scenes.world import COLOURS, Item, View

Colour = tuple[int, int, int]
Point = tuple[float, float]
DARK: Colour = (45, 40, 40)
GLASS: Colour = (205, 230, 245)
WOOD: Colour = (110, 70, 35)


class Pen:
    """Draws in the unit square of one item: (0, 0) is its top left, (1, 1) its bottom right."""

    def __init__(self, draw: ImageDraw.ImageDraw, item: Item, colour: Colour) -> None:
        self.draw, self.colour = draw, colour
        self.left, self.top, self.side, _ = item.box
        self.flip = item.flip

    def _x(self, x: float) -> float:
        return self.left + (1 - x if self.flip else x) * (self.side - 1)

    def _y(self, y: float) -> float:
        return self.top + y * (self.side - 1)

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[float]:
        left, right = sorted((self._x(x0), self._x(x1)))
        return [left, self._y(y0), right, self._y(y1)]

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.draw.ellipse(self._box(x0, y0, x1, y1), fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.draw.rectangle(self._box(x0, y0, x1, y1), fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self.draw.polygon([(self._x(x), self._y(y)) for x, y in points], fill=fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        thickness = max(1, round(width * self.side))
        self.draw.line([(self._x(x), self._y(y)) for x, y in points], fill=fill, width=thickness)


def _circle(pen: Pen) -> None:
    pen.ellipse(0, 0, 1, 1, pen.colour)


def _square(pen: Pen) -> None:
    pen.box(0.05, 0.05, 0.95, 0.95, pen.colour)


def _triangle(pen: Pen) -> None:
    pen.polygon([(0.5, 0), (1, 1), (0, 1)], pen.colour)


def _star(pen: Pen) -> None:
    points = []
    for corner in range(10):
        radius = 0.53 if corner % 2 == 0 else 0.21
        angle = corner * pi / 5 - pi / 2
        points.append((0.5 + radius * cos(angle), 0.53 + radius * sin(angle)))
    pen.polygon(points, pen.colour)


def _heart(pen: Pen) -> None:
    pen.ellipse(0, 0.03, 0.53, 0.56, pen.colour)
    pen.ellipse(0.47, 0.03, 1, 0.56, pen.colour)
    pen.polygon([(0.04, 0.42), (0.5, 0.3), (0.96, 0.42), (0.5, 1)], pen.colour)


def _cross(pen: Pen) -> None:
    pen.box(0.34, 0, 0.66, 1, pen.colour)
    pen.box(0, 0.34, 1, 0.66, pen.colour)


def _ring(pen: Pen) -> None:
    width = max(2, round(0.2 * pen.side))
    pen.draw.ellipse(pen._box(0, 0, 1, 1), outline=pen.colour, width=width)


def _dog(pen: Pen) -> None:
    pen.line([(0.16, 0.55), (0.02, 0.22)], pen.colour, 0.08)
    pen.box(0.12, 0.45, 0.74, 0.74, pen.colour)
    for x in (0.12, 0.26, 0.5, 0.63):
        pen.box(x, 0.7, x + 0.1, 1, pen.colour)
    pen.ellipse(0.54, 0.1, 0.9, 0.56, pen.colour)
    pen.box(0.75, 0.33, 1, 0.5, pen.colour)
    pen.ellipse(0.5, 0.12, 0.64, 0.52, DARK)
    pen.ellipse(0.92, 0.31, 1, 0.4, DARK)
    pen.ellipse(0.74, 0.21, 0.82, 0.3, (255, 255, 255))


def _cat(pen: Pen) -> None:
    pen.line([(0.7, 0.92), (0.95, 0.85), (0.95, 0.5)], pen.colour, 0.08)
    pen.ellipse(0.2, 0.42, 0.78, 1.05, pen.colour)
    pen.polygon([(0.16, 0.02), (0.2, 0.4), (0.48, 0.2)], pen.colour)
    pen.polygon([(0.82, 0.02), (0.78, 0.4), (0.5, 0.2)], pen.colour)
    pen.ellipse(0.15, 0.14, 0.83, 0.62, pen.colour)
    pen.ellipse(0.28, 0.28, 0.4, 0.42, (190, 240, 120))
    pen.ellipse(0.58, 0.28, 0.7, 0.42, (190, 240, 120))
    pen.polygon([(0.44, 0.44), (0.54, 0.44), (0.49, 0.51)], (250, 190, 190))


def _fish(pen: Pen) -> None:
    pen.polygon([(0.3, 0.5), (0, 0.2), (0, 0.8)], pen.colour)
    pen.ellipse(0.18, 0.2, 1, 0.8, pen.colour)
    pen.polygon([(0.5, 0.25), (0.65, 0.05), (0.75, 0.28)], pen.colour)
    pen.ellipse(0.76, 0.36, 0.88, 0.48, (255, 255, 255))
    pen.line([(0.6, 0.32), (0.55, 0.5), (0.6, 0.68)], DARK, 0.03)


def _house(pen: Pen) -> None:
    pen.box(0.12, 0.42, 0.88, 1, pen.colour)
    pen.polygon([(0.5, 0), (1, 0.44), (0, 0.44)], DARK)
    pen.box(0.42, 0.66, 0.6, 1, WOOD)
    pen.box(0.2, 0.52, 0.36, 0.7, GLASS)
    pen.box(0.66, 0.52, 0.8, 0.7, GLASS)


def _tree(pen: Pen) -> None:
    pen.box(0.42, 0.55, 0.58, 1, WOOD)
    pen.ellipse(0.2, 0, 0.8, 0.5, pen.colour)
    pen.ellipse(0.05, 0.2, 0.55, 0.68, pen.colour)
    pen.ellipse(0.45, 0.2, 0.95, 0.68, pen.colour)


def _car(pen: Pen) -> None:
    pen.polygon([(0.18, 0.5), (0.3, 0.2), (0.68, 0.2), (0.82, 0.5)], pen.colour)
    pen.box(0, 0.46, 1, 0.76, pen.colour)
    pen.polygon([(0.28, 0.46), (0.35, 0.27), (0.47, 0.27), (0.47, 0.46)], GLASS)
    pen.polygon([(0.53, 0.46), (0.53, 0.27), (0.64, 0.27), (0.73, 0.46)], GLASS)
    for x in (0.12, 0.64):
        pen.ellipse(x, 0.64, x + 0.24, 0.88, DARK)
        pen.ellipse(x + 0.07, 0.71, x + 0.17, 0.81, (190, 190, 190))


def _sun(pen: Pen) -> None:
    for ray in range(8):
        x, y = cos(ray * pi / 4), sin(ray * pi / 4)
        pen.line([(0.5 + 0.3 * x, 0.5 + 0.3 * y), (0.5 + 0.5 * x, 0.5 + 0.5 * y)], pen.colour, 0.07)
    pen.ellipse(0.23, 0.23, 0.77, 0.77, pen.colour)
    pen.ellipse(0.37, 0.4, 0.45, 0.48, DARK)
    pen.ellipse(0.55, 0.4, 0.63, 0.48, DARK)


def _flower(pen: Pen) -> None:
    pen.line([(0.5, 0.4), (0.5, 1)], (50, 140, 60), 0.07)
    pen.polygon([(0.5, 0.9), (0.8, 0.68), (0.66, 0.9)], (50, 140, 60))
    for petal in range(6):
        x, y = 0.5 + 0.2 * cos(petal * pi / 3), 0.35 + 0.2 * sin(petal * pi / 3)
        pen.ellipse(x - 0.15, y - 0.15, x + 0.15, y + 0.15, pen.colour)
    pen.ellipse(0.37, 0.22, 0.63, 0.48, (255, 250, 170))


DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart,
    "cross": _cross, "ring": _ring, "dog": _dog, "cat": _cat, "fish": _fish, "house": _house,
    "tree": _tree, "car": _car, "sun": _sun, "flower": _flower,
}  # fmt: skip


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_item(draw: ImageDraw.ImageDraw, item: Item) -> None:
    """Draw one item."""
    colour = COLOURS[item.colour]
    if item.text:
        left, top, width, height = item.box
        middle = (left + width / 2, top + height / 2)
        font = _font(round(height / 1.2))
        draw.text(middle, item.text, fill=colour, font=font, anchor="mm")
    else:
        DRAWINGS[item.kind](Pen(draw, item, colour))


def draw_view(view: View) -> Image.Image:
    """The RGB picture of one view."""
    if view.texture is not None:
        from mmchat.evals.scenes.textures import draw_texture

        return draw_texture(*view.texture, view.height, view.width)
    picture = Image.new("RGB", (view.width, view.height), view.background)
    draw = ImageDraw.Draw(picture)
    for item in view.items:
        draw_item(draw, item)
    return picture
