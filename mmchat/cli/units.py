"""Numbers as people read them."""

from __future__ import annotations


def size(number: float) -> str:
    """Bytes in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def count(number: float) -> str:
    """A large count, shortened: `10.7 B`, `7.2 M`."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:,.0f}"


def pixels(height_width: tuple[int, int]) -> str:
    """`640 x 480 px`, width first as people say it."""
    return f"{height_width[1]} x {height_width[0]} px"


def grid(tiles: tuple[int, int]) -> str:
    """`2 tiles (2 rows, 1 column)`; `tiles` is (rows, columns)."""
    rows, columns = tiles
    shape = f"{plural(rows, 'row')}, {plural(columns, 'column')}"
    return f"{plural(rows * columns, 'tile')} ({shape})"


def plural(number: int, noun: str) -> str:
    """`1 tile`, `2 tiles`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
