"""Draw curves.svg from the logs of a training run: `python assets/tiny/draw_curves.py`.

loss.csv (pictures, loss of the answers' tokens) and accuracy.csv (pictures, share of exact answers
on held-out scenes) lie beside this file.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, MARGIN = 640, 300, 48
INK, LOSS, ACCURACY = "#555", "#c0504d", "#2e75b6"


def read(name: str) -> list[tuple[float, float]]:
    """(pictures, value) of each row of a log."""
    with (HERE / name).open(newline="") as stream:
        return [(float(row[0]), float(row[1])) for row in csv.reader(stream)]


def line(points: list[tuple[float, float]], most: float, low: float, high: float) -> str:
    """The points of a polyline; `low` is at the bottom of the frame, `high` at its top."""
    wide, tall = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    return " ".join(
        f"{MARGIN + wide * x / most:.1f},{HEIGHT - MARGIN - tall * (y - low) / (high - low):.1f}"
        for x, y in points
    )


def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def main() -> None:
    loss, accuracy = read("loss.csv"), read("accuracy.csv")
    most = max(x for x, _ in (*loss, *accuracy))
    logs = [(x, math.log10(y)) for x, y in loss]
    low, high = math.floor(min(y for _, y in logs)), math.ceil(max(y for _, y in logs))
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    tall = HEIGHT - 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{right}V{MARGIN}" fill="none" stroke="{INK}"/>',
        text(MARGIN, MARGIN - 12, "loss", LOSS),
        text(right, MARGIN - 12, "exact answers", ACCURACY),
        text(WIDTH / 2, HEIGHT - 8, "pictures"),
    ]
    for power in range(low, high + 1):
        y = bottom - tall * (power - low) / (high - low)
        parts.append(text(MARGIN - 6, y + 4, f"{10.0**power:g}", LOSS, "end"))
    for percent in range(50, 101, 10):
        y = bottom - tall * (percent - 50) / 50
        parts.append(text(right + 6, y + 4, f"{percent} %", ACCURACY, "start"))
    for step in range(5):
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / 4
        parts.append(text(x, bottom + 16, f"{most * step / 4000:.0f} k"))
    for colour, points in (
        (LOSS, line(logs, most, low, high)),
        (ACCURACY, line(accuracy, most, 0.5, 1.0)),
    ):
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    (HERE / "curves.svg").write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
