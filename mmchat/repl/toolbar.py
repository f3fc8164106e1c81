"""The line at the bottom while a question is typed: model, context, pictures, speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.errors import MmchatError
from mmchat.terminal import one_line, sanitize
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat

NAME = 20  # columns of a name
LAYOUTS = (  # the widest first
    "{name}   {device}   context {context}   {pictures}   {speed}",
    "{name}   context {context}   {pictures}   {speed}",
    "{name}   {context}   {pictures}   {speed}",
    "{name}   {context}   {pictures}",
    "{context}   {pictures}",
    "{context}",
)


def toolbar_text(chat: Chat, columns: int) -> str:
    """The facts on one line, each in a place of its own; on a narrow one those that matter most."""
    new, pictures = len(chat.attached), len(chat.pictures())
    attached = plural(pictures, "picture") + f", {new} new" * bool(new)
    if chat.loading and chat.is_loading:
        return _cut(f"{chat.loading.stage}   {attached}", columns)
    loaded = chat.session.loaded
    limit = f"{loaded.max_seq_len:,}"
    try:
        context = f"{chat.budget().used:,}/{limit}"
    except MmchatError:
        context = f"over {limit}"
    speed = chat.last and chat.last.timings.tokens_per_second
    name = one_line(min(chat.spec.name, *chat.spec.aliases[:1], key=len))
    facts = {  # as wide as they may ever become
        "name": name if len(name) <= NAME else name[: NAME - 1] + "…",
        "device": f"{loaded.device} {loaded.dtype}".replace("torch.", ""),
        "context": context.ljust(2 * len(limit) + 1),
        "pictures": attached.ljust(len("16 pictures, 1 new")),
        "speed": (f"{speed:.1f} tokens/s" if speed else "").ljust(len("999.9 tokens/s")),
    }
    lines = [layout.format(**facts) for layout in LAYOUTS]
    return _cut(next((line for line in lines if len(line) < columns), lines[-1]), columns)


def _cut(line: str, columns: int) -> str:
    return sanitize(line)[: max(columns - 1, 1)].rstrip()
