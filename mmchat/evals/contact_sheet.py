"""One HTML page with the pictures of the questions that were answered wrongly."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmchat.images import contact_sheet

if TYPE_CHECKING:
    from mmchat.evals.run import Verdict


def wrong_answers(model: str, wrong: Sequence[Verdict], asked: int) -> str:
    """The page as text."""
    title = f"{model}: {len(wrong)} of {asked} answers are wrong"
    figures = ((verdict.scene.pictures, _caption(verdict)) for verdict in wrong)
    return contact_sheet.contact_sheet(title, figures)


def _caption(verdict: Verdict) -> str:
    scene, question = verdict.scene, verdict.question
    asked = "<br>".join(html.escape(each.text) for each in (*question.earlier, question))
    return (
        f"<small>{html.escape(question.type)}, scene {scene.seed},"
        f" {html.escape(verdict.group('canvas'))}</small><br>{asked}<br>"
        f"<b>{html.escape(verdict.answer)}</b><br>right: {html.escape(question.answer)}"
    )
