"""The words in which people ask: plain ones, many more for training, and some it never sees.

The lists are text files in `words`, a phrasing a line under its kind of question. A pattern
such as "(show|tell) me (the|) dog" stands for all its readings. `{}` is the name that is asked
about; for presence {0} is "a red dog", {1} "red dog" and {2} "red dogs".
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

Wording = Literal["plain", "rich", "unseen"]
# Questions about the other end of a line, made from those about the one.
_TURNED = {
    "right": ("left", {"left": "right"}),
    "below": (
        "above",
        {
            "higher": "lower",
            "above": "below",
            "up": "down",
            "on top": "underneath",
            "top": "bottom",
        },
    ),
}
_INNERMOST = re.compile(r"\(([^()]*)\)")


@cache
def phrasings(wording: Wording) -> dict[str, tuple[str, ...]]:
    """Kind of question -> its patterns."""
    path = Path(__file__).with_name("words") / f"{wording}.txt"
    found: dict[str, list[str]] = {}
    key = ""
    for line in filter(None, path.read_text(encoding="ascii").splitlines()):
        if line.startswith("["):
            key = line.strip("[]")
            found[key] = []
        else:
            found[key].append(line)
    if wording == "rich":
        for key, (other, words) in _TURNED.items():
            found[key] = [_turn(pattern, words) for pattern in found[other]]
    return {key: tuple(patterns) for key, patterns in found.items()}


def _turn(pattern: str, words: dict[str, str]) -> str:
    for word, opposite in words.items():
        pattern = re.sub(rf"\b{word}", opposite, pattern)
    return pattern


@cache
def readings(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Every phrasing that the patterns stand for."""
    found: dict[str, None] = {}
    waiting = list(reversed(patterns))
    while waiting:
        pattern = waiting.pop()
        group = _INNERMOST.search(pattern)
        if group is None:
            found[_tidy(pattern)] = None
            continue
        head, tail = pattern[: group.start()], pattern[group.end() :]
        waiting += [head + choice + tail for choice in reversed(group[1].split("|"))]
    return tuple(found)


def choose(rng: Random, key: str, wording: Wording) -> str:
    """A phrasing with places for names; "rich" is mostly a random reading."""
    plain, table = phrasings("plain"), phrasings(wording)
    if wording == "plain" or (wording == "rich" and key in plain and rng.random() < 0.3):
        return rng.choice(readings(plain[key]))
    return _random_reading(rng, rng.choice(table[key]))


def _random_reading(rng: Random, pattern: str) -> str:
    while group := _INNERMOST.search(pattern):
        choice = rng.choice(group[1].split("|"))
        pattern = pattern[: group.start()] + choice + pattern[group.end() :]
    return _tidy(pattern)


def _tidy(text: str) -> str:
    """A capital at the start, single spaces, none before a full stop."""
    text = re.sub(r" +([?.!,]|$)|( ) +", r"\1\2", text).strip()
    return text[0].upper() + text[1:]
