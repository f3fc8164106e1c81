"""Pictures as PNG: for files, pages and terminals."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def png_bytes(picture: Image, compress_level: int = 6) -> bytes:
    """A picture without loss; compress_level: 1 is fast, 9 is small."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def png_url(picture: Image) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"
