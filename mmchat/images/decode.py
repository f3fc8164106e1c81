"""Decodes a picture file. The only place that hands outside bytes to Pillow (`pdf`: to PDFium).

It runs in the decode worker, a process of its own with bounds on time and memory (`worker`). What
makes decoding long without making the picture large (scans, segments, pages) is counted before
Pillow sees the file, and the size is checked from the header before anything is decoded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image as PILImage

from mmchat import limits
from mmchat.errors import quoted
from mmchat.images import pdf
from mmchat.images.bounds import RefusedError, all_scans_begin, check_parts, check_size, tiff_pages
from mmchat.images.colour import eight_bits
from mmchat.images.formats import HEIF, PAGED, PDF, READ

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
_JPEG_END = b"\xff\xd9"
# Codes of many lengths, first alone and then behind each restart marker.
_JPEG_FILLERS = [
    b"".join(bytes((*codes, 0xFF, 0xD0 + i % 8)) for i in range(16))
    for codes in (range(3, 254, 7), range(251, 2, -7))
]
# Codecs inside TIFF that are rare in pictures and large in attack surface stay out.
_TIFF_COMPRESSIONS = frozenset(
    {"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"}
    | {"tiff_ccitt", "group3", "group4"}
)


def decode(
    data: bytes, kind: str, max_pixels: int, page: int | None = None
) -> tuple[PILImage.Image, list[str]]:
    """The first frame, upright, in its own mode of at most 8 bits, and the notices.

    kind: as `formats.picture_format` tells it. page: of a document, from 1; None: the first, with
    a notice if there are more. Raises RefusedError, whatever is wrong.
    """
    max_pixels = _most_pixels(kind, max_pixels)
    with _reasons(max_pixels):
        check_parts(data, kind)
        if kind in PAGED:
            picture, notices = _decode_page(data, kind, max_pixels, page)
        else:
            read = {HEIF: _decode_heif, "JPEG": _decode_jpeg}.get(kind, _decode)
            picture, notices = read(data, kind, max_pixels)
        picture, dark = eight_bits(picture)
        return picture, notices + dark


def count_pages(data: bytes, kind: str) -> int:
    """How many pages a document has. Raises RefusedError."""
    with _reasons(0):
        return pdf.count_pages(data) if kind == PDF else len(tiff_pages(data))


def announced_size(
    data: bytes, kind: str, max_pixels: int, page: int | None = None
) -> tuple[int, int]:
    """Width and height that `decode` will give the picture, turned or not; only headers are read.

    Raises RefusedError.
    """
    max_pixels = _most_pixels(kind, max_pixels)
    with _reasons(max_pixels):
        check_parts(data, kind)
        if kind == HEIF:
            return _heif_container(data, max_pixels).size
        if kind == PDF:
            return pdf.page_size(data, page or 1)
        with _opened(data, kind, max_pixels, _frame(data, kind, page)) as (picture, _):
            return picture.size


def _most_pixels(kind: str, max_pixels: int) -> int:
    return min(max_pixels, limits.WEBP_PIXELS) if kind == "WEBP" else max_pixels


@contextmanager
def _reasons(max_pixels: int) -> Iterator[None]:
    """Within the block, whatever is raised becomes RefusedError."""
    try:
        yield
    except RefusedError:
        raise
    except Exception as problem:  # Pillow raises almost anything on damaged files
        raise RefusedError(_reason(problem, max_pixels)) from None


def _decode_jpeg(data: bytes, kind: str, max_pixels: int) -> tuple[PILImage.Image, list[str]]:
    """Decode a JPEG, also one that lacks nothing but its end marker.

    With an end marker put behind it, libjpeg decodes any beginning of a JPEG, and makes up what is
    missing. Whether something is: then the pixels depend on bytes put before that marker.
    """
    try:
        return _decode(data, kind, max_pixels)
    except OSError as problem:
        if "truncated" not in str(problem) or not all_scans_begin(data):
            raise
        data = data.rstrip(b"\xff")  # the first half of the marker
        picture, notices = _decode(data + _JPEG_END, kind, max_pixels)
        for filler in _JPEG_FILLERS:
            other, _ = _decode(data + filler + _JPEG_END, kind, max_pixels)
            if picture.tobytes() != other.tobytes():
                raise
        return picture, [*notices, "its end marker is missing; the picture is whole"]


def _decode_page(
    data: bytes, kind: str, max_pixels: int, page: int | None
) -> tuple[PILImage.Image, list[str]]:
    if kind == PDF:
        picture, notices = pdf.draw(data, page or 1), []
    else:
        picture, notices = _decode(data, kind, max_pixels, _frame(data, kind, page))
    count = count_pages(data, kind) if page is None else 1
    if count > 1:
        is_all = kind == PDF or count <= limits.TIFF_PAGES
        shown = f"{count:,}" if is_all else f"more than {limits.TIFF_PAGES:,}"
        notices.append(f"only the first of {shown} pages is used")
    return picture, notices


def _frame(data: bytes, kind: str, page: int | None) -> int:
    """Where a page of a TIFF stands among its frames, from 0."""
    if kind != "TIFF" or page is None:
        return 0
    frames = tiff_pages(data)
    if page > len(frames):
        raise RefusedError(f"has no page {page:,}")
    return frames[page - 1]


def _decode(
    data: bytes, kind: str, max_pixels: int, frame: int = 0
) -> tuple[PILImage.Image, list[str]]:
    with _opened(data, kind, max_pixels, frame) as (picture, notices):
        _check_kind(picture)
        orientation = _orientation(picture) if kind == "TIFF" else 1
        picture.load()
        if kind == "PNG":
            _scale_transparent_colour(picture, depth=data[24])
        check_size(picture.size, max_pixels)  # a frame of a GIF may enlarge it
        # Pillow turns a TIFF itself while loading, and then reports it as upright.
        remaining = _orientation(picture)
        upright = picture
        if remaining != 1:
            upright = picture.transpose(_TURNS[remaining])
        elif kind != "JPEG":  # which has no other frame to be looked at; new memory is slow
            upright = picture.copy()
        if remaining != 1 or orientation != 1:
            notices.append("turned upright, as its metadata says")
        notices.extend(_frames_notice(picture, kind))
    return upright, notices


@contextmanager
def _opened(
    data: bytes, kind: str, max_pixels: int, frame: int = 0
) -> Iterator[tuple[PILImage.Image, list[str]]]:
    """A picture whose header alone is read, and whose size is checked; and the notices."""
    if kind not in READ:
        raise ValueError(kind)
    notices = []
    with PILImage.open(io.BytesIO(data), formats=(kind,)) as picture:
        if frame:
            picture.seek(frame)
        if picture.width * picture.height > max_pixels and _halve(picture):
            notices.append("decoded at half its size, because it is larger than the limit")
        check_size(picture.size, max_pixels)
        yield picture, notices


def _scale_transparent_colour(picture: PILImage.Image, depth: int) -> None:
    """Bring the one transparent grey or colour of a PNG to the scale that Pillow brings pixels to.

    depth: bits per sample in the file. Of 16-bit colour Pillow keeps the high bytes, so a colour
    that differs from the transparent one in the low bytes alone becomes transparent as well.
    """
    key = picture.info.get("transparency")
    if isinstance(key, int) and picture.mode == "L":
        picture.info["transparency"] = (key & (1 << depth) - 1) * 255 // ((1 << depth) - 1)
    elif isinstance(key, tuple):
        picture.info["transparency"] = tuple(k >> 8 if depth == 16 else k & 255 for k in key)


def _decode_heif(data: bytes, _kind: str, max_pixels: int) -> tuple[PILImage.Image, list[str]]:
    """Decode the primary picture of a HEIC file, which the library turns upright itself."""
    container = _heif_container(data, max_pixels)
    notices = []
    if len(container) > 1:
        notices.append(f"only the main one of {len(container)} pictures is used")
    return container.to_pillow(), notices


def _heif_container(data: bytes, max_pixels: int) -> Any:
    try:
        import pillow_heif
    except ImportError:
        raise RefusedError(
            "is a HEIC picture; to read it run: pip install 'mmchat[heif]'", missing_extra=True
        ) from None
    container = pillow_heif.open_heif(io.BytesIO(data))
    check_size(container.size, max_pixels)
    return container


def _halve(picture: PILImage.Image) -> bool:
    """Let libjpeg decode at half the size; only a baseline JPEG saves memory that way."""
    if picture.format not in ("JPEG", "MPO") or "progressive" in picture.info:
        return False
    return picture.draft(None, (picture.width // 2, picture.height // 2)) is not None


def _check_kind(picture: PILImage.Image) -> None:
    """Refuse what Pillow could open but should not, or cannot turn into RGB."""
    compression = picture.info.get("compression", "raw") if picture.format == "TIFF" else "raw"
    if compression not in _TIFF_COMPRESSIONS:
        raise RefusedError(
            f"is a TIFF with {quoted(compression)} compression, which is not read; "
            "save it as PNG first"
        )
    if picture.mode == "LAB":
        raise RefusedError("is in the LAB colour space; save it as RGB first")


def _orientation(picture: PILImage.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the metadata is missing or damaged."""
    try:
        value = picture.getexif().get(_ORIENTATION_TAG, 1)
        return value if value in _TURNS else 1
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1


def _frames_notice(picture: Any, kind: str) -> list[str]:
    """What is left out of a file with several frames; phones add a hidden second one to JPEG."""
    if kind in ("JPEG", "TIFF"):  # pages of a TIFF are no frames
        return []
    try:
        if kind == "GIF":  # counting would mean to read the whole file
            animated = getattr(picture, "is_animated", False)
            return ["only the first frame of the animation is used"] if animated else []
        count = getattr(picture, "n_frames", 1)
    except Exception:  # a damaged second frame does not make the first unreadable
        return []
    return [f"only the first of {count} frames is used"] if count > 1 else []


def _reason(problem: Exception, max_pixels: int) -> str:
    """What an error of Pillow means; its own text may hold memory addresses and is not shown."""
    text = str(problem).lower()
    if isinstance(problem, PILImage.DecompressionBombError):
        count = re.search(r"\((\d+) pixels\)", text)
        pixels = f"{int(count[1]):,}" if count else "far too many"
        return f"has {pixels} pixels; at most {max_pixels:,} are read; make it smaller"
    if isinstance(problem, MemoryError):
        return "needs more memory than there is for one picture; make it smaller"
    if isinstance(problem, EOFError) or "truncated" in text:
        return "is cut short; copy or download it again"
    return "is damaged and cannot be read; copy or download it again"
