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
    """`480 x 640 px`, height first."""
    return f"{height_width[0]} x {height_width[1]} px"


def grid(tiles: tuple[int, int]) -> str:
    """`2 x 1 tiles`, rows first."""
    total = tiles[0] * tiles[1]
    return f"{tiles[0]} x {tiles[1]} tile{'s' * (total > 1)}"
