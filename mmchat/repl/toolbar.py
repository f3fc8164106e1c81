"""The line at the bottom while a question is typed: model, context, pictures, speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmchat.errors import MmchatError
from mmchat.repl.paths import short_name
from mmchat.terminal import sanitize
from mmchat.words import plural

if TYPE_CHECKING:
    from mmchat.repl.chat import Chat


def toolbar_text(chat: Chat, columns: int) -> str:
    """The facts, on as many lines as they need."""
    loaded = chat.session.loaded
    dtype = str(loaded.dtype).removeprefix("torch.")
    parts = [f"{chat.spec.name}, {loaded.device} {dtype}"]
    try:
        budget = chat.budget()
        parts.append(f"context {budget.used:,}/{budget.limit:,}")
    except MmchatError:
        parts.append("context over its limit")
    if chat.attached:
        parts.append(" + ".join(_picture(chat, i) for i in range(len(chat.attached))))
    elif images := chat.session.conversation.images:
        parts.append(f"{plural(len(images), 'picture')} in the chat")
    if chat.last and chat.last.timings.tokens_per_second:
        timings = chat.last.timings
        parts.append(
            f"{timings.tokens_per_second:.1f} tokens/s, first {timings.time_to_first_token:.2f} s"
        )
    lines = [""]
    for part in parts:
        safe = sanitize(part.replace("\n", " "))[: max(columns - 1, 1)]
        joined = f"{lines[-1]} | {safe}" if lines[-1] else safe
        if len(joined) < columns:
            lines[-1] = joined
        else:
            lines.append(safe)
    return "\n".join(lines)


def _picture(chat: Chat, index: int) -> str:
    image = chat.attached[index]
    rows, columns = chat.spec.facts(image).grid
    return f"{short_name(image.source)} {rows}x{columns}"
