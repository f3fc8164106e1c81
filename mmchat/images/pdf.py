"""Draws pages of a PDF. The only place that hands outside bytes to PDFium.

Like all decoding it runs in the decode worker, with its bounds on time and memory. How large a page
is drawn does not follow from the file alone: `limits` bounds it, whatever the page measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from mmchat import limits
from mmchat.images.bounds import RefusedError, check_pdf_end

if TYPE_CHECKING:
    from PIL import Image as PILImage

_WHITE = 255, 255, 255, 255


def count_pages(data: bytes) -> int:
    """Raises RefusedError, as all here."""
    with _opened(data) as document:
        return len(document)


def page_size(data: bytes, number: int) -> tuple[int, int]:
    """Width and height in pixels that `draw` gives page `number`, which counts from 1."""
    with _page(data, number) as (page, scale):
        width, height = page.get_size()
        return math.ceil(width * scale), math.ceil(height * scale)


def draw(data: bytes, number: int) -> PILImage.Image:
    """Page `number`, from 1, upright on white, with what is filled in, as RGB."""
    with _page(data, number) as (page, scale):
        drawn = page.render(scale=scale, fill_color=_WHITE, rev_byteorder=True)
        return drawn.to_pil().copy()  # of memory that ends with the page


@contextmanager
def _page(data: bytes, number: int) -> Iterator[tuple[Any, float]]:
    """A page, and the pixels that a point of it takes."""
    with _opened(data) as document:
        if number > len(document):
            raise RefusedError(f"has no page {number:,}")
        document.init_forms()  # else what is filled in is not drawn
        with closing(document[number - 1]) as page:
            size = page.get_size()
            if not (min(size) > 0 and max(size) <= limits.PDF_PAGE_POINTS):
                raise RefusedError(
                    f"measures {size[0]:.4g} x {size[1]:.4g} points (1/72 inch); at most"
                    f" {limits.PDF_PAGE_POINTS:,} on a side are drawn; scale it down"
                )
            scale = min(limits.PDF_DOTS_PER_INCH / 72, limits.PDF_SIDE_PIXELS / max(size))
            yield page, scale * (1 - 1e-9)  # sizes are rounded up, and 1792.0000000000002 is 1792


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    try:
        import pypdfium2
        from pypdfium2 import raw
    except ImportError:
        raise RefusedError(
            "is a PDF; to read it run: pip install 'mmchat[pdf]'", missing_extra=True
        ) from None
    check_pdf_end(data)
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as problem:
        # of a document without pages the code is what the one before left
        codes = raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY
        if problem.err_code in codes and b"/Encrypt" in data:
            raise RefusedError(
                "is locked with a password; save it without one, or save the pages as PNG"
            ) from None
        raise RefusedError(
            "is damaged or has no pages; copy or download it again, or export it anew"
        ) from None
    with closing(document):
        yield document
