"""One HTML page with the pictures of the questions that were answered wrongly."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmchat.images.png import png_url

if TYPE_CHECKING:
    from mmchat.evals.run import Verdict

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


def contact_sheet(model: str, wrong: Sequence[Verdict], asked: int) -> str:
    """The page as text; pictures are part of it, so that it can be moved and sent."""
    title = html.escape(f"{model}: {len(wrong)} of {asked} answers are wrong")
    return HEAD.format(title=title) + "".join(map(_figure, wrong)) + "</main></html>\n"


def _figure(verdict: Verdict) -> str:
    scene, question = verdict.scene, verdict.question
    pictures = "".join(f'<img alt="" src="{png_url(picture)}">' for picture in scene.pictures)
    asked = "<br>".join(html.escape(each.text) for each in (*question.earlier, question))
    return (
        f"<figure>{pictures}<figcaption><small>{html.escape(question.type)}, scene {scene.seed},"
        f" {html.escape(verdict.group('canvas'))}</small><br>{asked}<br>"
        f"<b>{html.escape(verdict.answer)}</b><br>right: {html.escape(question.answer)}"
        "</figcaption></figure>\n"
    )
