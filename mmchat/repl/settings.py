r"""What `\set` and `\retry` can change: how answers are chosen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmchat.engine import grammar, schema
from mmchat.errors import UsageError, quoted
from mmchat.repl import facts
from mmchat.repl.paths import plain
from mmchat.spelling import closest

if TYPE_CHECKING:
    from mmchat.engine.sampling import SamplingParams
    from mmchat.repl.chat import Chat

IMAGE_TAGS = "image_tags"  # which is none of sampling
_NONE = {"stop": (), "seed": None, "schema": None}  # what "none" sets
_QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+')""")


def candidates(chat: Chat, argument: str) -> Iterable[str]:
    words = argument.split(" ")
    settings = facts.setting_names(chat.sampling)
    has_tags = not chat.is_loading and chat.session.loaded.processor.name_tags is not None
    if len(words) < 2:
        return [*settings, IMAGE_TAGS] if has_tags else settings
    if words[0] == IMAGE_TAGS and has_tags:
        return [f"{IMAGE_TAGS} on", f"{IMAGE_TAGS} off"]
    if words[0] not in settings:
        return []
    known = {
        "temperature": ["0", "0.6", "1"],
        "top_p": ["0.9", "1"],
        "seed": ["none", "0"],
        "speculate": ["auto", "off"],
    }
    if words[0] == "schema":  # files are offered beside it
        return ["schema none"]
    current = facts.shown(getattr(chat.sampling, words[0]))
    return dict.fromkeys(f"{words[0]} {v}" for v in [current, *known.get(words[0], [])])


def changed(sampling: SamplingParams, argument: str, command: str = "set") -> SamplingParams:
    """Raises UsageError for an unknown name or a value that does not fit; command: who asks."""
    name, _, text = argument.partition(" ")
    text = text.strip()
    settings = facts.setting_names(sampling)
    if name not in settings:
        close = closest(name, settings, cutoff=0.4)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(settings)}"
        raise UsageError(f"there is no setting {quoted(name)}; {advice}")
    if not text:
        shown = facts.shown(getattr(sampling, name))
        raise UsageError(f"write \\{command} {name} VALUE; it is {shown} now")
    return replace(sampling, **{name: _value(name, text)})


def _value(name: str, text: str) -> Any:
    if text == "none" and name in _NONE:
        return _NONE[name]
    if name == "stop":
        return _strings(text)
    if name == "schema":
        found = schema.read(text if text.startswith("{") else plain(text))
        grammar.check(found)  # now, not with the next question
        return found
    if name == "speculate" and not text.isdecimal():
        return text
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise UsageError(f"{name} is a number, not {quoted(text)}")


def _strings(text: str) -> tuple[str, ...]:
    """One string, as it is; or strings in quotes, with escapes as in Python."""
    if text[0] not in "\"'":
        return (text,)
    found: list[str] = []
    at = 0
    try:
        while match := _QUOTED.match(text, at):
            found.append(ast.literal_eval(match[1]))
            at = match.end()
    except (SyntaxError, ValueError):
        at = 0
    if at < len(text):
        raise UsageError(f"stop is one text, or several in quotes, not {quoted(text)}")
    return tuple(found)
