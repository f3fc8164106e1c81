"""Facts about pictures, answers and settings, as short lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from mmchat.errors import quoted
from mmchat.images.pages import HOW as PAGES
from mmchat.repl.paths import short_name
from mmchat.words import cut, pixels

if TYPE_CHECKING:
    from mmchat.catalog.spec import ModelSpec
    from mmchat.conversation import Image, Message, Turn
    from mmchat.engine.events import Finished
    from mmchat.engine.sampling import SamplingParams


def picture_facts(image: Image, spec: ModelSpec) -> list[str]:
    """Size, what was done to it, grid and cost."""
    facts = spec.facts(image)
    parts = [pixels(facts.size), *image.notices, facts.cut, f"{facts.tokens:,} vision tokens"]
    return [part for part in parts if part]


def picture_line(image: Image, spec: ModelSpec) -> str:
    """Its name and its facts."""
    return f"{short_name(image.source)}: {', '.join(picture_facts(image, spec))}"


OUT_OF_SIGHT = "earlier pictures are out of sight now; to compare, attach pictures together"


def ending(finished: Finished, sampling: SamplingParams, positions: int, *, kept: bool) -> str:
    """What the reader should know about how an answer ended; empty if it just did.

    positions: of the context. kept: whether an interrupted answer became part of the conversation.
    """
    if finished.reason == "interrupted":
        if not kept:
            return "interrupted before there was an answer; the conversation is as it was"
        return "interrupted; the answer so far is kept, \\retry answers again"
    longer, roomier = "\\set max_new_tokens N", "\\forget drops the oldest turn"
    return cut(finished, sampling.max_new_tokens, positions, longer, roomier)


def same_again(sampling: SamplingParams) -> str:
    """Why asking again is no use, and what is."""
    if sampling.is_greedy:
        return "at temperature 0 the answer is the same; try \\retry temperature 0.8"
    return f"with seed {sampling.seed} the answer is the same; try \\retry seed none"


def taken_back(question: Message) -> str:
    """`took back 'What is it?' with its picture dog.png`."""
    return f"took back {quoted(question.text, 60)}{_with_pictures(question.images, 'its')}"


def with_pictures(turns: Sequence[Turn]) -> str:
    """` with the pictures dog.png, cat.png`, or nothing."""
    return _with_pictures([image for turn in turns for image in turn.question.images], "the")


def _with_pictures(images: Sequence[Image], whose: str) -> str:
    names = ", ".join(short_name(image.source) for image in images)
    return f" with {whose} picture{'s' * (len(images) > 1)} {names}" if names else ""


def question_line(question: Message) -> str:
    """`[dog.png] What is it?`, as it is shown again later."""
    names = "".join(f"[{short_name(image.source)}] " for image in question.images)
    return names + question.text


def setting_names(sampling: SamplingParams) -> list[str]:
    """What `\\set` sets."""
    return [field.name for field in fields(sampling) if field.name != "logprobs"]


def settings(sampling: SamplingParams) -> list[tuple[str, str]]:
    """(name, value) of each."""
    return [(name, shown(getattr(sampling, name))) for name in setting_names(sampling)]


def shown(value: object) -> str:
    """A setting as `\\set` takes it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"  # a schema


def some(names: Sequence[str]) -> str:
    """The first names of many, quoted."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(quoted, names[:3])) + more


def no_such(names: Sequence[str]) -> str:
    """That there are no such pictures, and how pages are written where some seem to be meant."""
    has_pages = any("#" in name for name in names)
    return f"no such picture: {some(names)}" + (f"; {PAGES}" if has_pages else "")
