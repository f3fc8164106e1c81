"""Which pages of a document are meant: `paper.pdf#3`, `paper.pdf#3-5`, `paper.pdf#1,4-6`."""

from __future__ import annotations

import re

from mmchat import limits
from mmchat.errors import quoted
from mmchat.images.bounds import RefusedError

HOW = "pages are written '#3', '#3-5' or '#1,4'"
# `#page=3` is how browsers have it
_PAGES = re.compile(r"#(?:page=)?([0-9][0-9,-]*)\Z", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7}))?")


def split_pages(place: str) -> tuple[str, str]:
    """A path or address without the pages behind it, and the pages; "" if it has none."""
    found = _PAGES.search(place)
    return (place[: found.start()], found[1]) if found else (place, "")


def page_numbers(pages: str, count: int) -> list[int]:
    """The numbers, from 1, of the pages that are meant of a document of `count`; "" means all.

    Raises RefusedError for pages that are not there, and for too many.
    """
    most = limits.DOCUMENT_PAGES
    numbers: list[int] = []
    for part in pages.split(",") if pages else [f"1-{count}"]:
        found = _RANGE.fullmatch(part)
        if not found:
            raise RefusedError(f"has no pages {quoted('#' + pages)}; {HOW}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= count:
            has = "one page" if count == 1 else f"{count:,} pages"
            raise RefusedError(f"has {has}, and no {quoted('#' + part)}; {HOW}")
        if len(numbers) + last - first >= most:
            has = "more pages are named" if pages else f"it has {count:,} pages"
            raise RefusedError(
                f"does not fit: {has}, and at most {most} go into one prompt; name some behind"
                f" its name: '#1-{most}'"
            )
        numbers += range(first, last + 1)
    return numbers
