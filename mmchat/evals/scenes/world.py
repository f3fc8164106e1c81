"""What scenes are made of: kinds, colours, places, printed words, and how they are arranged.

A scene is a few items on a grid of cells. Square-ish pictures have 3 x 3 cells, wide ones one row
of three, tall ones one column of three, so that every cell has a name ("top left", "right", ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")
THINGS = ("dog", "cat", "fish", "house", "tree", "car", "sun", "flower")
KINDS = SHAPES + THINGS
ANIMALS = ("dog", "cat", "fish")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 85, 220),
    "purple": (135, 45, 175),
    "pink": (250, 150, 195),
    "brown": (125, 75, 35),
    "black": (25, 25, 25),
}
USUAL_COLOURS = {
    "dog": ("brown", "black"),
    "cat": ("black", "orange"),
    "fish": ("orange", "blue"),
    "house": ("red", "yellow"),
    "tree": ("green", "green"),
    "car": ("red", "blue"),
    "sun": ("yellow", "orange"),
    "flower": ("pink", "red"),
}
WORDS = (
    "STOP", "OPEN", "EXIT", "HELLO", "TAXI", "BUS", "CAFE", "MILK", "TEA", "SALE", "LOVE", "ZOO",
)  # fmt: skip
NUMBERS = tuple(str(number) for number in range(21))
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")

Kind = Literal["objects", "count", "text", "pair", "talk", "outside"]
SCENE_KINDS: tuple[Kind, ...] = ("objects", "count", "text", "pair", "talk", "outside")
MAX_LEVEL = 2
# Canvas (tiles_h, tiles_w) -> least and greatest picture height and width, in tiles.
CANVAS_SIDES = {
    (1, 1): ((0.75, 1.0), (0.75, 1.0)),
    (1, 2): ((0.8, 1.0), (1.3, 2.0)),
    (2, 1): ((1.3, 2.0), (0.8, 1.0)),
    (2, 2): ((1.4, 2.0), (1.4, 2.0)),
    (1, 3): ((0.75, 1.0), (2.25, 3.0)),
    (3, 1): ((2.25, 3.0), (0.75, 1.0)),
    (1, 4): ((0.8, 1.0), (3.2, 4.0)),
    (4, 1): ((3.2, 4.0), (0.8, 1.0)),
}
TILE = 112  # pixels; the side of one tile of the built-in model


@dataclass(frozen=True)
class Item:
    """One drawn thing, shape or printed text.

    cell: (row, column), each 0..2. box: left, top, width, height in picture pixels.
    kind: one of KINDS, "word" or "number"; `text` is what is printed.
    """

    kind: str
    colour: str
    cell: tuple[int, int]
    box: tuple[int, int, int, int]
    flip: bool = False
    text: str = ""

    @property
    def place(self) -> str:
        """Where in the picture: "top left", "right", "middle", ..."""
        row, column = self.cell
        return f"{ROWS[row]} {COLUMNS[column]}".strip() or "middle"


@dataclass(frozen=True)
class View:
    """One picture as a description: size in pixels, background, items in reading order.

    Reading order is left to right, then top to bottom; a counted group comes first. texture: the
    name and seed of a picture that is no drawing of this world.
    """

    height: int
    width: int
    background: tuple[int, int, int]
    items: tuple[Item, ...]
    texture: tuple[str, int] | None = None


def in_reading_order(items: list[Item]) -> tuple[Item, ...]:
    """Sort by column, then by row; groups of equal kind first."""
    kinds = [item.kind for item in items]
    return tuple(sorted(items, key=lambda it: (kinds.count(it.kind) == 1, it.cell[1], it.cell[0])))


class Arranger:
    """Places items in one picture; all randomness comes from `rng`."""

    def __init__(self, rng: Random, canvas: tuple[int, int], *, full_size: bool = False) -> None:
        self.rng = rng
        sides = CANVAS_SIDES[canvas]
        height, width = (round(rng.uniform(low, high) * TILE) for low, high in sides)
        if full_size and canvas == (1, 1):
            height, width = (max(side, 100) for side in (height, width))
            height, width = (TILE, width) if rng.random() < 0.5 else (height, TILE)
        self.height, self.width = height, width
        wide, tall = canvas[1] > 2, canvas[0] > 2
        self.rows = (1,) if wide else (0, 1, 2)
        self.columns = (1,) if tall else (0, 1, 2)
        self.background = (rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255))

    def cells(self) -> list[tuple[int, int]]:
        """All cells of the grid in random order."""
        cells = [(row, column) for row in self.rows for column in self.columns]
        self.rng.shuffle(cells)
        return cells

    def cell_size(self) -> tuple[float, float]:
        """Height and width of one cell, pixels."""
        return self.height / len(self.rows), self.width / len(self.columns)

    def centre(self, cell: tuple[int, int]) -> tuple[float, float]:
        """Centre (y, x) of a cell, pixels."""
        height, width = self.cell_size()
        row, column = self.rows.index(cell[0]), self.columns.index(cell[1])
        return (row + 0.5) * height, (column + 0.5) * width

    def place(self, kind: str, colour: str, cell: tuple[int, int], scale: float) -> Item:
        """An item in a cell; scale 1 fills the cell's shorter side."""
        cell_height, cell_width = self.cell_size()
        side = scale * min(cell_height, cell_width)
        slack_y = max(0.0, min(0.1 * cell_height, (cell_height - side) / 2))
        slack_x = max(0.0, min(0.1 * cell_width, (cell_width - side) / 2))
        y, x = self.centre(cell)
        y += self.rng.uniform(-slack_y, slack_y)
        x += self.rng.uniform(-slack_x, slack_x)
        size = max(8, round(side))
        left = min(max(round(x - size / 2), 0), self.width - size)
        top = min(max(round(y - size / 2), 0), self.height - size)
        return Item(kind, colour, cell, (left, top, size, size), self.rng.random() < 0.5)

    def print(self, text: str, row: int, size: int) -> Item:
        """Text of `size` pixels, centred in a row."""
        y, _ = self.centre((row, 1))
        width, height = round(0.72 * size * len(text)), round(1.2 * size)
        slack = max(0, (self.width - width) // 2 - 1)
        left = (self.width - width) // 2 + self.rng.randint(-min(slack, 12), min(slack, 12))
        top = min(max(round(y - height / 2), 0), self.height - height)
        kind = "number" if text.isdigit() else "word"
        colour = self.rng.choice(("black", "blue", "red"))
        return Item(kind, colour, (row, 1), (left, top, width, height), text=text)

    def view(self, items: list[Item]) -> View:
        return View(self.height, self.width, self.background, in_reading_order(items))


def pick_colour(rng: Random, kind: str) -> str:
    """A colour; things have one of their usual colours half of the time."""
    if kind in USUAL_COLOURS and rng.random() < 0.5:
        return rng.choice(USUAL_COLOURS[kind])
    return rng.choice(tuple(COLOURS))


def arrange_objects(rng: Random, canvas: tuple[int, int], level: int) -> View:
    """One to three different objects; level 0 has one, level 1 at most two."""
    arranger = Arranger(rng, canvas)
    cells = arranger.cells()
    most = (1, 2, 3)[level]
    count = rng.choice([n for n in (1, 1, 1, 1, 2, 2, 2, 2, 3, 3) if n <= most])
    if count == 1 and rng.random() < 0.3:
        kind = rng.choice(KINDS)
        scale = rng.uniform(1.0, 2.2) if len(arranger.rows) == len(arranger.columns) else 0.95
        return arranger.view([arranger.place(kind, pick_colour(rng, kind), (1, 1), scale)])
    kinds = rng.sample(KINDS, count)
    spread = rng.choice(((0.85, 0.92, 1.0), (0.85, 0.92, 1.0), (0.66, 1.0)))
    scales = [rng.choice(spread) for _ in kinds]
    chosen = zip(kinds, cells[:count], scales, strict=True)
    return arranger.view([arranger.place(k, pick_colour(rng, k), c, s) for k, c, s in chosen])


def arrange_count(rng: Random, canvas: tuple[int, int], level: int) -> View:
    """Two to four equal objects, sometimes with one other beside them."""
    arranger = Arranger(rng, canvas)
    cells = arranger.cells()
    count = rng.randint(2, min(4, len(cells)))
    kind, other = rng.sample(KINDS, 2)
    colour = pick_colour(rng, kind)
    scale = rng.uniform(0.85, 1.0)
    items = [arranger.place(kind, colour, cell, scale) for cell in cells[:count]]
    if level > 0 and len(cells) > count and rng.random() < 0.4:
        items.append(arranger.place(other, pick_colour(rng, other), cells[count], scale))
    return arranger.view(items)


def arrange_text(rng: Random, canvas: tuple[int, int], level: int) -> View:
    """One printed word or number, sometimes with one object in another row."""
    arranger = Arranger(rng, canvas, full_size=True)
    text = rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(NUMBERS)
    size = rng.randint(22, 28)
    row = rng.choice(arranger.rows)
    items = [arranger.print(text, row, size)]
    free = [cell for cell in arranger.cells() if cell[0] != row]
    if level > 0 and free and rng.random() < 0.5:
        kind = rng.choice(KINDS)
        items.append(arranger.place(kind, pick_colour(rng, kind), free[0], rng.uniform(0.85, 1.0)))
    return arranger.view(items)


def arrange_pair(rng: Random, canvas: tuple[int, int]) -> tuple[View, View, str]:
    """Two pictures of one object, and what differs: "", "colour", "position" or "object"."""
    arranger = Arranger(rng, canvas)
    first_cell, second_cell = arranger.cells()[:2]
    kind, other_kind = rng.sample(KINDS, 2)
    colour, other_colour = rng.sample(tuple(COLOURS), 2)
    scale = rng.uniform(0.75, 1.0)
    first = arranger.place(kind, colour, first_cell, scale)
    change = rng.choice(("", "", "colour", "position", "object"))
    second = {
        "": first,
        "colour": replace(first, colour=other_colour),
        "position": arranger.place(kind, colour, second_cell, scale),
        "object": replace(first, kind=other_kind),
    }[change]
    return arranger.view([first]), arranger.view([replace(second, flip=first.flip)]), change


def arrange_outside(rng: Random, canvas: tuple[int, int], names: Sequence[str]) -> View:
    """A texture, gradient, noise or blank page: nothing of this world."""
    arranger = Arranger(rng, canvas)
    texture = rng.choice(names), rng.randrange(2**31)
    return View(arranger.height, arranger.width, arranger.background, (), texture)
