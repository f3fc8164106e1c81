"""One HTML page of pictures with words beside them; pictures are part of it, so it can be moved."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mmchat.images.png import png_url

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 1em; color: #222; background: #fff }}
main {{ display: flex; flex-wrap: wrap; gap: 1em }}
figure {{ margin: 0; padding: .6em; border: 1px solid #ccc; max-width: 30em }}
img {{ max-height: 160px; max-width: 100%; margin-right: .3em; border: 1px solid #eee }}
small {{ color: #666 }}
</style>
<h1>{title}</h1>
<main>
"""


def contact_sheet(title: str, figures: Iterable[tuple[Sequence[Image], str]]) -> str:
    """The page as text. figures: pictures, and the HTML below them."""
    page = HEAD.format(title=html.escape(title))
    for pictures, caption in figures:
        shown = "".join(f'<img alt="" src="{png_url(picture)}">' for picture in pictures)
        page += f"<figure>{shown}<figcaption>{caption}</figcaption></figure>\n"
    return page + "</main></html>\n"
