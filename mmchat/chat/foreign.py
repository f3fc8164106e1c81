"""Questions in the form that OpenAI's chat takes, as messages and sampling of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from mmchat.conversation import IMAGE_MARK, Message, arranged
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import UsageError, check_type, quoted

_SAMPLING = {  # their name -> ours
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop",
       "frequency_penalty", "presence_penalty", "repetition_penalty")},
}  # fmt: skip
_WITHOUT_MEANING = {"model", "stream", "stream_options", "user", "metadata", "n"}


def as_request(
    given: Mapping[str, Any], defaults: SamplingParams
) -> tuple[list[Any], SamplingParams]:
    """(messages, sampling) of a whole request; `model` is the one that is asked.

    Raises UsageError for a key that would change the answer and is not known here.
    """
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SAMPLING and value is not None:
            changed[_SAMPLING[name]] = value
        elif name == "response_format" and value is not None:
            changed["schema"] = _schema(value)
        elif name not in ("messages", "response_format", *_SAMPLING, *_WITHOUT_MEANING):
            raise UsageError(f"{quoted(name)} of a request is not known; leave it out")
    if given.get("n") not in (None, 1):
        raise UsageError(f"n must be 1, not {quoted(given['n'])}")
    if "stop" in changed:
        stop = changed["stop"]
        check_type("stop", stop, (str, list, tuple), "a text or a list of texts")
        changed["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    messages = given.get("messages")
    check_type("messages", messages, list, "a list of {'role': …, 'content': …}")
    return messages or [], replace(defaults, **changed)


def _schema(form: Any) -> Any:
    """The schema of a response_format; None for plain text."""
    check_type("response_format", form, dict, "{'type': …}")
    match form:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return schema
    raise UsageError(
        f"response_format of type {quoted(form.get('type'))} is not known, or has no schema; there"
        " are text, json_object, and json_schema with json_schema.schema"
    )


def as_messages(given: list[Any], alpha: Literal["white", "drop"], tag: str = "") -> list[Message]:
    """Messages of `{"role", "content"}`; their pictures are opened, all of them or none.

    They stand where they are, or at marks, `<|image|>` or `tag`, if there are as many of these.
    Raises UsageError for another form, and what opening pictures raises.
    """
    from mmchat.images import load_each

    if not given:
        raise UsageError("messages is empty; give at least one of the role user")
    read = [one if isinstance(one, Message) else _parts(one, i) for i, one in enumerate(given)]
    sources = [part for one in read if isinstance(one, tuple) for part in one[1] if part[0]]
    images = iter(load_each([source for source, _ in sources], alpha=alpha))
    messages = []
    for one in read:
        if isinstance(one, tuple):
            role, parts = one
            content = [next(images) if url else text for url, text in parts]
            one = Message(role, arranged(content, (IMAGE_MARK, tag)))
        messages.append(one)
    return messages


def sources_of(given: Any) -> Iterator[str]:
    """The addresses and paths of pictures in messages, as far as these have the form."""
    for index, message in enumerate(given if isinstance(given, list) else ()):
        with suppress(UsageError):
            yield from [place for place, _ in _parts(message, index)[1] if place]


def _parts(message: Any, index: int) -> tuple[Any, list[tuple[str, str]]]:
    """The role, and (address of a picture or "", text) of each part."""
    where = f"messages[{index}]"
    check_type(where, message, dict, "{'role': …, 'content': …}")
    role = message.get("role")
    role = "system" if role == "developer" else role
    content = message.get("content")
    if isinstance(content, str):
        return role, [("", content)]
    check_type(f"{where}['content']", content, list, "a text or a list of parts")
    return role, [_part(part, f"{where}['content'][{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> tuple[str, str]:
    check_type(where, part, dict, "a part such as {'type': 'text', 'text': …}")
    kind = part.get("type")
    if kind in ("text", "input_text"):
        check_type(f"{where}['text']", part.get("text"), str, "a string")
        return "", part["text"]
    if kind in ("image_url", "input_image"):
        place = part.get("image_url")
        url = place.get("url") if isinstance(place, dict) else place
        check_type(f"{where}['image_url']['url']", url, str, "an address, a path or a data: URL")
        if url:
            return url, ""
    raise UsageError(f"{where} is of type {quoted(kind)}; parts are text and image_url with a url")
