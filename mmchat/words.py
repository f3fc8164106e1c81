"""What is said about sizes, pictures, stages and answers, once for every front end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmchat.engine.events import Finished

# Of names of pictures; the last ones are not read, but the reason is then given.
_ENDINGS = (
    "jpg jpeg jpe jfif jif pjpeg pjp mpo png apng webp gif bmp dib tif tiff avif avifs heic heif"
    " heics hif pdf svg jxl jp2 j2k ico psd dng cr2 cr3 nef arw"
)
PICTURE_ENDINGS = frozenset(_ENDINGS.split())
STAGES = {  # by the name of a Progress event
    "preprocessing": "laying out the pictures",
    "vision": "looking at the pictures",
    "prefill": "reading the prompt",
}

USUAL_QUESTION = "What's in this image?"  # of pictures without any
TEXT_ALONE = "the checkpoint holds the language model alone, which sees no pictures"


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


def held(quantize: str, kv: str) -> str:
    """`, weights in int4, keys and values in int8`: what is not held in the model's dtype."""
    weights = "" if quantize == "none" else f", weights in {quantize}"
    return weights + ("" if kv == "auto" else f", keys and values in {kv}")


def plural(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def first_pictures(fits: Callable[[int], bool], count: int) -> str:
    """`; the first 3 of its 12 pictures fit, …`: the most that do; empty if none or all do.

    fits: whether that many of `count` do.
    """
    most = next((number for number in range(count - 1, 0, -1) if fits(number)), 0)
    if not most:
        return ""
    which, pages = ("first", "#1") if most == 1 else (f"first {most}", f"#1-{most}")
    return f"; the {which} of its {count} pictures would fit (of a document: paper.pdf{pages})"


def pace(speed: float) -> str:
    """Tokens a second in two significant digits, as an estimate deserves."""
    return f"{speed:.0f}" if speed >= 9.5 else f"{speed:.1f}" if speed >= 0.95 else f"{speed:.2g}"


def pixels(height_width: Sequence[int]) -> str:
    """`640 x 480 px`, width first as people say it."""
    return f"{height_width[1]} x {height_width[0]} px"


def table(
    rows: Sequence[Sequence[str]], right: Collection[int] = (), most: float = math.inf
) -> str:
    """Lines of cells in columns as wide as their widest; those in `right` end at one place.

    most: characters of a line; where there are more, one space stands between columns, not two.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) - 2 <= most else " "
    return "\n".join(
        gap.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def cut(finished: Finished, most_tokens: int, positions: int, longer: str, roomier: str) -> str:
    """That an answer was cut, and what helps; empty if it came to its end or was stopped.

    most_tokens: allowed for the answer, `longer` allows more. positions: of the context, for which
    `roomier` is the advice.
    """
    if finished.reason != "length":
        return ""
    if len(finished.output_ids) >= most_tokens:
        return f"cut at {most_tokens} tokens; {longer} allows more"
    return f"cut because the context of {positions:,} positions is full; {roomier}"


def timings(finished: Finished) -> list[tuple[str, str]]:
    """(label, value) of each stage of an answer, of its speed and of its memory."""
    spent, usage = finished.timings, finished.usage
    new = usage.prompt_tokens - usage.cached_tokens
    return [
        ("load", f"{spent.load_seconds:.3f} s"),
        ("pictures", f"{spent.preprocessing_seconds:.3f} s to lay out"),
        ("vision", f"{spent.vision_seconds:.3f} s for {usage.image_count} in the chat"),
        ("prompt", f"{spent.prefill_seconds:.3f} s for {new} new of {usage.prompt_tokens} tokens"),
        ("first token", f"{spent.time_to_first_token:.3f} s"),
        ("answer", f"{spent.decode_seconds:.3f} s for {usage.completion_tokens} tokens"),
        ("speed", f"{spent.tokens_per_second or 0:.1f} tokens/s"),
        ("memory", f"{size(spent.peak_memory_bytes)} at most"),
        ("seed", str(finished.seed)),
    ]
