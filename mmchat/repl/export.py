"""A chat as a document: Markdown, JSON, or a web page that runs nothing and loads nothing."""

from __future__ import annotations

import html

from mmchat.conversation import Conversation, Image
from mmchat.images.png import png_url
from mmchat.repl import saving
from mmchat.repl.paths import short_name

KINDS = ("md", "json", "html")
PICTURE_SIDE = 640  # pixels; pictures in documents are for reading
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; }}
section {{ white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem 1rem; margin: .6rem 0;
 border-radius: .6rem; }}
.user {{ background: #e8eef7; color: #111; }} .system {{ color: #666; font-style: italic; }}
img {{ display: block; max-width: 100%; border-radius: .4rem; margin: .3rem 0; }}
footer {{ color: #777; font-size: .85rem; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181c; color: #ddd; }} }}
</style></head><body>
{body}
<footer>{title}</footer></body></html>
"""


def document(kind: str, chat: Conversation, model: str) -> str:
    """The whole chat as text of `kind`, pictures inside."""
    if kind == "json":
        return saving.to_json(saving.SavedChat(chat, model), pictures_inside=True)
    return _html(chat, model) if kind == "html" else _markdown(chat, model)


def _data_url(image: Image) -> str:
    small = image.pixels.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return png_url(small)


def _markdown(chat: Conversation, model: str) -> str:
    lines = [f"# Chat with {model}", ""]
    if chat.system:
        lines += [f"*System: {chat.system}*", ""]
    for turn in chat.turns:
        lines.append("## You")
        for part in turn.question.content:
            if isinstance(part, Image):
                name = short_name(part.source).replace("]", "").replace("[", "")
                lines += ["", f"![{name}]({_data_url(part)})"]
            else:
                lines += ["", part.text]
        mark = " (interrupted)" if turn.reason == "interrupted" else ""
        lines += ["", f"## {model}{mark}", "", turn.answer, ""]
    return "\n".join(lines)


def _html(chat: Conversation, model: str) -> str:
    title = html.escape(f"Chat with {model}")
    parts = []
    if chat.system:
        parts.append(f'<section class="system">{html.escape(chat.system)}</section>')
    for turn in chat.turns:
        inside = "".join(
            f'<img alt="{html.escape(short_name(part.source))}" src="{_data_url(part)}">'
            if isinstance(part, Image)
            else html.escape(part.text)
            for part in turn.question.content
        )
        parts.append(f'<section class="user">{inside}</section>')
        mark = "\n(interrupted)" if turn.reason == "interrupted" else ""
        parts.append(f'<section class="model">{html.escape(turn.answer + mark)}</section>')
    return _PAGE.format(title=title, body="\n".join(parts))
