"""Tells by its first bytes what a file is: a format that is read, one that is not, no picture."""

from __future__ import annotations

import base64
import re

# Pillow's names of the formats that are read. Never those with interpreters or rare decoders.
READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEIF = "HEIF"
PDF = "PDF"
PAGED = (PDF, "TIFF")  # documents, of which each page is a picture

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"%PDF-": PDF,
}
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})

_CONVERT = "save it as PNG or JPEG first"
_FOREIGN = {
    b"\0\0\0\x0cJXL ": f"is a JPEG XL picture, which is not read; {_CONVERT}",
    b"\xff\x0a": f"is a JPEG XL picture, which is not read; {_CONVERT}",
    b"\0\0\0\x0cjP  ": f"is a JPEG 2000 picture, which is not read; {_CONVERT}",
    b"\xff\x4f\xff\x51": f"is a JPEG 2000 picture, which is not read; {_CONVERT}",
    b"8BPS": f"is a Photoshop file; {_CONVERT}",
    b"%!PS": f"is a PostScript file; {_CONVERT}",
    b"\xc5\xd0\xd3\xc6": f"is a PostScript file; {_CONVERT}",
    b"\0\0\1\0": f"is an icon file; {_CONVERT}",
    b"PK\x03\x04": "is a zip archive; unpack it and give a picture",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\x1aE\xdf\xa3": "is a video; save one frame as PNG",
    b"version https://git-lfs": "is a Git LFS pointer, not the picture itself; run git lfs pull",
}
_BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, white space
_DATA_URL = re.compile(rb"data:[^,]{0,100},", re.IGNORECASE)
_URL_LETTERS = bytes.maketrans(b"-_", b"+/")
_TEXT = (
    (re.compile(rb"<svg[\s>]"), "is an SVG drawing; convert it to PNG first"),
    (
        re.compile(rb"<!doctype html|<html|<head|<body"),
        "is a web page, not a picture; copy the address of the picture itself",
    ),
)


def picture_format(data: bytes) -> str | None:
    """Pillow's name of the format that `data` starts like, "HEIF", "PDF", or None."""
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    brands = _brands(data)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return HEIF if brands & _HEIF_BRANDS else None


def explain_foreign(data: bytes) -> str:
    """Why `data` is no picture that is read, as the end of a sentence that starts with its name."""
    if not data:
        return "is empty"
    for magic, reason in _FOREIGN.items():
        if data.startswith(magic):
            return reason
    if _brands(data):
        return "is a video; save one frame as PNG"
    if kind := format_in_base64(data):
        what = "what follows its comma" if is_data_url(data) else "it"
        return f"is base64 text of a picture ({kind}), not its bytes; decode {what} with base64 -d"
    text = data[:4096].lower()
    if text.lstrip(_BEFORE_TEXT).startswith(b"<"):
        for pattern, reason in _TEXT:
            if pattern.search(text):
                return reason
    return "is not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, PDF)"


def is_data_url(data: bytes) -> bool:
    """Whether text begins like a `data:` URL."""
    return data[:64].lstrip(_BEFORE_TEXT)[:5].lower() == b"data:"


def format_in_base64(data: bytes) -> str | None:
    """The format of the picture that text begins in base64, bare or as a `data:` URL, or None."""
    text = _DATA_URL.sub(b"", data[:1024].lstrip(_BEFORE_TEXT))
    letters = text.translate(_URL_LETTERS, delete=b" \t\r\n=")
    try:
        return picture_format(base64.b64decode(letters[: len(letters) // 4 * 4], validate=True))
    except ValueError:
        return None


def _brands(data: bytes) -> set[bytes]:
    """Major and compatible brands of an ISO media file."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[i : i + 4] for i in range(16, end, 4))}
