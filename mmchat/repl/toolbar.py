"""The line at the bottom while a question is typed: model, context, pictures, speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.errors import MmchatError
from mmchat.terminal import one_line, sanitize
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat

GAP = 3  # columns between two facts
NAME = 20  # columns of a name
LAYOUTS = (
    "name device labelled pictures speed",
    "name labelled pictures speed",
    "name context pictures speed",
    "name context pictures",
    "context pictures",
)


def toolbar_text(chat: Chat, columns: int) -> str:
    """The facts on one line, each in a place of its own; on a narrow one those that matter most."""
    new, pictures = len(chat.attached), len(chat.pictures())
    attached = plural(pictures, "picture") + f", {new} new" * bool(new)
    if chat.loading and chat.is_loading:
        return _cut(f"{chat.loading.stage}{' ' * GAP}{attached}", columns)
    loaded = chat.session.loaded
    limit = f"{loaded.max_seq_len:,}"
    try:
        context = f"{chat.budget().used:,}/{limit}"
    except MmchatError:
        context = f"over {limit}"
    speed = chat.last and chat.last.timings.tokens_per_second
    facts = {
        "name": _short(min(chat.spec.name, *chat.spec.aliases[:1], key=len)),
        "device": f"{loaded.device} {loaded.dtype}".replace("torch.", ""),
        "context": context,
        "labelled": f"context {context}",
        "pictures": attached,
        "speed": f"{speed:.1f} tokens/s" if speed else "",
    }
    most = {key: len(text) for key, text in facts.items()}  # columns that a fact may ever need
    most |= {"context": 2 * len(limit) + 1, "labelled": 2 * len(limit) + 9}
    most |= {"pictures": len("16 pictures, 1 new"), "speed": len("999.9 tokens/s")}
    fitting = [
        layout.split()
        for layout in LAYOUTS
        if sum(most[key] + GAP for key in layout.split()) - GAP < columns
    ]
    shown = fitting[0] if fitting else ["context"]
    line = (" " * GAP).join(facts[key].ljust(most[key]) for key in shown)
    return _cut(line, columns)


def _cut(line: str, columns: int) -> str:
    return sanitize(line)[: max(columns - 1, 1)].rstrip()


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= NAME else name[: NAME - 1] + "…"
