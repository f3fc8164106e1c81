"""Opens pictures. The only place that hands outside bytes to Pillow.

Every picture becomes RGB with its orientation applied; all metadata is dropped. Sizes are checked
from the header before anything is decoded. Grey pictures of more than 8 bits are scaled to 8 bits
as Pillow scales 16-bit colour (the high byte stays). Here we differ from the Hub's processor and
from Meta's reference on purpose: Pillow's own conversion makes everything above 255 white.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from PIL import Image as PILImage

from mmchat import limits
from mmchat.errors import ImageError, MissingExtra, quoted
from mmchat.images.formats import HEIF, READ, explain_foreign, picture_format
from mmchat.images.in_memory import upright_picture
from mmchat.images.sources import Source, read_source
from mmchat.messages import Image

if TYPE_CHECKING:
    import numpy as np
    import torch

    Held = PILImage.Image | np.ndarray | torch.Tensor  # what a program holds in memory

Alpha = Literal["white", "drop"]

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
# Codecs inside TIFF that are rare in pictures and large in attack surface stay out.
_TIFF_COMPRESSIONS = frozenset(
    {"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"}
    | {"tiff_ccitt", "group3", "group4"}
)
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_BAND_ROWS = 512  # rows worked on at a time, so that large pictures are not copied whole

_pillow_lock = threading.Lock()


def load_image(
    source: Source | Held,
    *,
    alpha: Alpha = "white",
    name: str | None = None,
    allow_fetch: bool = True,
) -> Image:
    """Open a picture from a path, an address, a `data:` URL, bytes or a binary stream.

    Or take one that is in memory: of Pillow, an array of numpy, a tensor (see `in_memory`).

    alpha: "white" composites transparent pixels over white, "drop" ignores their transparency.
    name: shown in place of the source. allow_fetch: whether http and https addresses are fetched.
    Raises ImageError if it cannot be read, is over the limits or is no picture; NetworkError if a
    fetch fails; MissingExtra for HEIC without pillow-heif.
    """
    held = upright_picture(source)
    if held is not None:
        return _of_held(held, name or "picture", alpha)
    encoded = read_source(source, name=name, allow_fetch=allow_fetch)  # type: ignore[arg-type]
    shown = quoted(encoded.name)
    kind = picture_format(encoded.data)
    if kind is None:
        raise ImageError(f"{shown} {explain_foreign(encoded.data)}")
    try:
        with _quiet_pillow():
            if kind == HEIF:
                picture, notices = _decode_heif(encoded.data, shown)
            else:
                picture, notices = _decode(encoded.data, kind, shown)
            picture = _to_rgb(picture, alpha)
    except (ImageError, MissingExtra):
        raise
    except Exception as problem:  # Pillow raises almost anything on damaged files
        raise ImageError(f"{shown} {_reason(problem)}") from None
    return Image(picture, encoded.name, content_hash(picture), tuple(notices))


def _of_held(picture: PILImage.Image, name: str, alpha: Alpha) -> Image:
    try:
        return from_pil(picture, source=name, alpha=alpha)
    except Exception as problem:  # Pillow raises almost anything
        kind = type(problem).__name__
        raise ImageError(f"a picture of mode {picture.mode} is not read ({kind})") from None


def from_pil(picture: PILImage.Image, *, source: str = "picture", alpha: Alpha = "white") -> Image:
    """Make an Image of a Pillow picture drawn by this program; no orientation is applied."""
    with _quiet_pillow():
        rgb = _to_rgb(picture, alpha)
    return Image(rgb, source, content_hash(rgb))


def load_clipboard(*, alpha: Alpha = "white") -> Image:
    """The picture on the system's clipboard, or the file that was copied there.

    Raises ImageError if there is none.
    """
    from mmchat.images.clipboard import clipboard

    found = clipboard()
    if isinstance(found, str):
        return load_image(found, alpha=alpha)
    if isinstance(found, bytes):
        return load_image(found, alpha=alpha, name="clipboard")
    _check_size(found.size, "the picture on the clipboard")
    return from_pil(found, source="clipboard", alpha=alpha)


def _to_rgb(picture: PILImage.Image, alpha: Alpha) -> PILImage.Image:
    """A new RGB picture without metadata. The results are those of the Hub's processor ("white")
    and of Meta's reference ("drop"), but for deep grey, see the top of this file.
    """
    if picture.mode in _DEEP_MODES:
        picture = _eight_bit(picture)
    has_alpha = "A" in picture.getbands() or picture.info.get("transparency") is not None
    if not (has_alpha and alpha == "white"):
        rgb = picture.convert("RGB")
        rgb.info.clear()
        return rgb
    rgb = PILImage.new("RGB", picture.size)
    for box in _bands(picture):
        band = picture.crop(box).convert("RGBA")
        white = PILImage.new("RGBA", band.size, (255, 255, 255, 255))
        rgb.paste(PILImage.alpha_composite(white, band).convert("RGB"), box)
    return rgb


def content_hash(picture: PILImage.Image) -> str:
    """sha256 over mode, width, height and pixels, so that equal bytes of another shape differ."""
    digest = hashlib.sha256(f"{picture.mode} {picture.width} {picture.height}\n".encode())
    for box in _bands(picture):
        digest.update(picture.crop(box).tobytes())
    return digest.hexdigest()


def _bands(picture: PILImage.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) that cover the picture from top to bottom."""
    for top in range(0, picture.height, _BAND_ROWS):
        yield 0, top, picture.width, min(top + _BAND_ROWS, picture.height)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about metadata and sizes; the sizes are checked here.

    The filters belong to the process, so threads take turns; they are put back at the end.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(data: bytes, kind: str, shown: str) -> tuple[PILImage.Image, list[str]]:
    """Decode the first frame and turn it upright: the picture in its own mode, and the notices."""
    if kind not in READ:
        raise ValueError(kind)
    notices = []
    with PILImage.open(io.BytesIO(data), formats=(kind,)) as picture:
        if picture.width * picture.height > limits.IMAGE_PIXELS and _halve(picture):
            notices.append("decoded at half its size, because it is larger than the limit")
        _check_size(picture.size, shown)
        _check_kind(picture, shown)
        orientation = _orientation(picture) if kind == "TIFF" else 1
        picture.load()
        _check_size(picture.size, shown)  # a frame of a GIF may enlarge it
        # Pillow turns a TIFF itself while loading, and then reports it as upright.
        remaining = _orientation(picture)
        upright = picture.transpose(_TURNS[remaining]) if remaining != 1 else picture.copy()
        if remaining != 1 or orientation != 1:
            notices.append("turned upright, as its metadata says")
        notices.extend(_frames_notice(picture, kind))
    return upright, notices


def _decode_heif(data: bytes, shown: str) -> tuple[PILImage.Image, list[str]]:
    """Decode the primary picture of a HEIC file, which the library turns upright itself."""
    try:
        import pillow_heif
    except ImportError:
        raise MissingExtra(
            f"{shown} is a HEIC picture; to read it run: pip install 'mmchat[heif]'"
        ) from None
    container = pillow_heif.open_heif(io.BytesIO(data))
    _check_size(container.size, shown)
    notices = []
    if len(container) > 1:
        notices.append(f"only the main one of {len(container)} pictures is used")
    return container.to_pillow(), notices


def _halve(picture: PILImage.Image) -> bool:
    """Let libjpeg decode at half the size; only a baseline JPEG saves memory that way."""
    if picture.format not in ("JPEG", "MPO") or "progressive" in picture.info:
        return False
    return picture.draft(None, (picture.width // 2, picture.height // 2)) is not None


def _check_size(size: tuple[int, int], shown: str) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{shown} is damaged: its size is {width} x {height}")
    if max(size) > limits.IMAGE_SIDE_PIXELS or width * height > limits.IMAGE_PIXELS:
        raise ImageError(
            f"{shown} has {width} x {height} pixels; at most {limits.IMAGE_PIXELS:,} and "
            f"{limits.IMAGE_SIDE_PIXELS:,} on a side are read; make it smaller"
        )


def _check_kind(picture: PILImage.Image, shown: str) -> None:
    """Refuse what Pillow could open but should not, or cannot turn into RGB."""
    compression = picture.info.get("compression", "raw") if picture.format == "TIFF" else "raw"
    if compression not in _TIFF_COMPRESSIONS:
        raise ImageError(
            f"{shown} is a TIFF with {quoted(compression)} compression, which is not read; "
            "save it as PNG first"
        )
    if picture.mode == "LAB":
        raise ImageError(f"{shown} is in the LAB colour space; save it as RGB first")


def _orientation(picture: PILImage.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the metadata is missing or damaged."""
    try:
        value = picture.getexif().get(_ORIENTATION_TAG, 1)
        return value if value in _TURNS else 1
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1


def _frames_notice(picture: PILImage.Image, kind: str) -> list[str]:
    """What is left out of a file with several frames; phones add a hidden second one to JPEG."""
    if kind == "JPEG":
        return []
    try:
        if kind == "GIF":  # counting would mean to read the whole file
            animated = getattr(picture, "is_animated", False)
            return ["only the first frame of the animation is used"] if animated else []
        count = getattr(picture, "n_frames", 1)
    except Exception:  # a damaged second frame does not make the first unreadable
        return []
    parts = "pages" if kind == "TIFF" else "frames"
    return [f"only the first of {count} {parts} is used"] if count > 1 else []


def _eight_bit(picture: PILImage.Image) -> PILImage.Image:
    """Scale a grey picture of 16 or 32 bits, or of real numbers, to 8 bits ("L").

    16 bits: the high byte. 32 bits and real numbers: by the range that the values use (0..1,
    0..255, 0..65535), else stretched from their least to their greatest.
    """
    import numpy as np

    values = np.asarray(picture)
    if values.dtype.itemsize == 2:
        return PILImage.fromarray((values >> 8).astype(np.uint8))
    real = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(real.min()), float(real.max())
    if low < 0 or high > 65_535 or (picture.mode == "F" and high > 255):
        scale = 255 / ((high - low) or 1)
        real = real * np.float32(scale) - np.float32(low * scale)
    elif high > 255:
        real = np.floor(real / 256)
    elif picture.mode == "F" and high <= 1:
        real = real * 255
    return PILImage.fromarray(real.clip(0, 255).astype(np.uint8))


def _reason(problem: Exception) -> str:
    """What an error of Pillow means; its own text may hold memory addresses and is not shown."""
    text = str(problem).lower()
    if isinstance(problem, PILImage.DecompressionBombError):
        count = re.search(r"\((\d+) pixels\)", text)
        pixels = f"{int(count[1]):,}" if count else "far too many"
        return f"has {pixels} pixels; at most {limits.IMAGE_PIXELS:,} are read; make it smaller"
    if isinstance(problem, MemoryError):
        return "needs more memory than there is; make it smaller"
    if isinstance(problem, EOFError) or "truncated" in text:
        return "is cut short; copy or download it again"
    return "is damaged and cannot be read; copy or download it again"
