"""What is checked about a picture file before a decoder sees its pixels: its size, and its parts.

A small file can keep a decoder busy without holding many pixels: by scans that each go over the
whole picture, or by metadata in so many pieces that joining them takes quadratic time. The parts
are counted here, in one pass over the file, and `limits` says how many there may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import repeat

from mmchat import limits

# A marker of JPEG: not a stuffed zero byte, not a restart marker, not a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_SCAN, _JPEG_END, _JPEG_APP1 = 0xDA, 0xD9, 0xE1
_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_JPEG_WITHOUT_LENGTH = frozenset({0x01, 0xD8})
_GIF_EXTENSION, _GIF_COMMENT = 0x21, 0xFE
_TIFF_KIND, _TIFF_SHORT = 254, 3
_TIFF_EXTRA = 0b101  # of the bits: a smaller copy, a mask
_PDF_OBJECT = re.compile(rb"[0-9]\s+[0-9]+\s+obj")


class RefusedError(Exception):
    """A picture that is not read. Its text ends a sentence that begins with the picture's name.

    missing_extra: whether an optional dependency is what is missing.
    """

    def __init__(self, reason: str, *, missing_extra: bool = False) -> None:
        super().__init__(reason)
        self.missing_extra = missing_extra


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise RefusedError if a picture of `size` (width, height) is too large or has no pixels."""
    width, height = size
    if min(size) < 1:
        raise RefusedError(f"shows nothing: its size is {width} x {height}")
    if max(size) > limits.IMAGE_SIDE_PIXELS or width * height > max_pixels:
        raise RefusedError(
            f"has {width} x {height} pixels; at most {max_pixels:,} and "
            f"{limits.IMAGE_SIDE_PIXELS:,} on a side are read; make it smaller"
        )


def check_parts(data: bytes, kind: str) -> None:
    """Raise RefusedError if the file has more parts than `limits` allows. kind: Pillow's name."""
    counters = {"JPEG": _jpeg_parts, "PNG": _png_parts, "GIF": _gif_parts}
    if kind not in counters:
        return
    counts: dict[str, int] = {}
    for part, limit in counters[kind](data):
        counts[part] = counts.get(part, 0) + 1
        if counts[part] > limit:
            raise RefusedError(f"has more than {limit:,} {part}; save it anew in another program")


def tiff_pages(data: bytes) -> list[int]:
    """The frames of a TIFF that are pages, numbered from 0 along their chain.

    Behind the first, smaller copies of a page and masks are none. At most limits.TIFF_PAGES frames
    and one more are looked at.
    """
    order = "little" if data[:2] == b"II" else "big"
    is_big = data[2:4] in (b"+\0", b"\0+")
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if is_big else (2, 12, 4)

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    def is_extra(entry: int) -> bool:
        """What the first entry says, which is the one on the kind of frame where there is one."""
        size = 2 if number(entry + 2, 2) == _TIFF_SHORT else 4
        value = number(entry + entry_bytes - offset_bytes, size)
        return number(entry, 2) == _TIFF_KIND and bool(value & _TIFF_EXTRA)

    seen: set[int] = set()
    pages: list[int] = []
    at = number(8, 8) if is_big else number(4, 4)
    while at and at not in seen and at < len(data) and len(seen) <= limits.TIFF_PAGES:
        if not (seen and is_extra(at + count_bytes)):
            pages.append(len(seen))
        seen.add(at)
        at = number(at + count_bytes + entry_bytes * number(at, count_bytes), offset_bytes)
    return pages


def check_pdf_end(data: bytes) -> None:
    """Raise RefusedError if a PDF does not end as one does.

    A reader repairs a file that is cut short, with fewer pages or those of an older state.
    """
    end = data.rfind(b"startxref")
    if end < 0 or _PDF_OBJECT.search(data, end):
        raise RefusedError("is cut short; copy or download it again")


def all_scans_begin(data: bytes) -> bool:
    """Whether the scans of a JPEG, together, give each coefficient its last bit.

    A progressive JPEG that is cut between two scans is a picture, but a blurred one.
    """
    components, final = 0, set()
    for marker, at in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            components = data[at + 7] if at + 7 < len(data) else 0
        elif marker == _JPEG_SCAN:
            # length, count, (component, tables) for each, first and last coefficient, bits
            header = data[at + 2 : at + int.from_bytes(data[at : at + 2], "big")]
            if len(header) >= 4 and header[-1] & 15 == 0:
                coefficients = range(header[-3], header[-2] + 1)
                final |= {(name, k) for name in header[1:-3:2] for k in coefficients}
    return len(final) >= components * 64


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each segment of the first picture of a JPEG: its marker, and where its length stands.

    An end marker ahead of the first scan ends nothing: decoders read on.
    """
    at, is_header = 2, True
    while found := _JPEG_MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _JPEG_END and not is_header:
            return
        if marker != _JPEG_END and marker not in _JPEG_WITHOUT_LENGTH:
            yield marker, at
            at += int.from_bytes(data[at : at + 2], "big")
            is_header = is_header and marker != _JPEG_SCAN


def _jpeg_parts(data: bytes) -> Iterator[tuple[str, int]]:
    """The parts of the first picture of a JPEG, each with how many there may be."""
    end, is_header = 2, True
    for marker, at in _jpeg_segments(data):
        if is_header:
            yield from _jpeg_gap(at - 2 - end)
        end = at + int.from_bytes(data[at : at + 2], "big")
        is_header = is_header and marker != _JPEG_SCAN
        yield "segments", limits.JPEG_SEGMENTS
        if marker == _JPEG_SCAN:
            yield "scans", limits.JPEG_SCANS
        if marker == _JPEG_APP1 and data[at + 2 : at + 6] == b"Exif":
            yield "pieces of Exif metadata", limits.JPEG_EXIF_SEGMENTS
    if is_header:
        yield from _jpeg_gap(len(data) - end)


def _jpeg_gap(size: int) -> Iterator[tuple[str, int]]:
    """What stands between two segments of a header."""
    yield from repeat(("KiB between its segments", limits.JPEG_GAP_KIB), size // limits.KIB)


def _png_parts(data: bytes) -> Iterator[tuple[str, int]]:
    at = 8
    while at < len(data):
        yield "chunks", limits.PNG_CHUNKS
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _gif_parts(data: bytes) -> Iterator[tuple[str, int]]:
    """What stands before the first frame: extensions, cut into blocks of at most 255 bytes."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while at + 2 < len(data) and data[at] == _GIF_EXTENSION:
        is_comment = data[at + 1] == _GIF_COMMENT
        at += 2
        while at < len(data) and data[at]:
            yield "blocks of metadata", limits.GIF_BLOCKS
            if is_comment:
                yield "pieces of comments", limits.GIF_COMMENT_BLOCKS
            at += 1 + data[at]
        at += 1
