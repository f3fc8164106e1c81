"""The page: its static files, and what it asks about a picture before it is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse, Response

from mmchat.server import heat as heats
from mmchat.server.ask import Ask, begin, in_time
from mmchat.server.call import Call
from mmchat.server.errors import invalid
from mmchat.server.fields import read
from mmchat.server.openai_chat import Messages
from mmchat.server.pictures import Picture, open_pictures
from mmchat.server.stream import Json
from mmchat.tokenizers.base import clean_text

FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}  # fmt: skip
# Nothing but its own files; no string becomes markup or code.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=()",
    "cache-control": "no-cache",
}


@cache
def files() -> Mapping[str, tuple[bytes, str]]:
    """Path of each file of the page -> (content, type). What is no file of it has no path."""
    found = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file() and path.suffix in _TYPES:
            name = path.relative_to(FOLDER).as_posix()
            found["/" + name.removesuffix("index.html")] = path.read_bytes(), _TYPES[path.suffix]
    return found


async def root(call: Call) -> Response:
    """The page for browsers; programs of Ollama ask here whether it runs."""
    wants_page = "text/html" in call.request.headers.get("accept", "")
    if wants_page and call.service.options.page and "/" in files():
        return await static(call)
    return PlainTextResponse("Ollama is running")


async def static(call: Call) -> Response:
    data, kind = files()[call.path]
    return Response(data, headers=HEADERS, media_type=kind)


async def tiles(call: Call) -> Response:
    """`{"image_url": …}` -> what the model makes of it: a picture, or each page of a document."""
    source = call.body.get("image_url")
    if not isinstance(source, str):
        raise invalid("image_url", "image_url: input should be a valid string")
    _ = call.service.thread  # a server that ends, or has no model yet, begins nothing
    call.serve()
    processor, options = call.model.processor, call.service.options
    picture = Picture(source, "image_url")

    def facts(is_wanted: Callable[[], bool]) -> list[dict[str, Any]]:
        [images] = open_pictures([picture], options, processor.alpha, call.owner, is_wanted)
        return [
            {**asdict(processor.facts(image)), "notices": list(image.notices)} for image in images
        ]

    apart = partial(call.service.apart, pictures=True)
    found = await in_time(call, lambda is_wanted: apart(partial(facts, is_wanted)))
    return Json({"pictures": found})


class Answered(Messages):
    """The messages of a chat, and the answer to them."""

    answer: str


async def heat(call: Call) -> Response:
    """`{"messages": …, "answer": …}` -> where the answer looked. It is one more request."""
    heats.check_heat(call)
    asked = await call.digest(read, Answered, call.body)
    answer = await call.digest(clean_text, asked.answer)  # whose words are found by their place
    looking = await begin(call, Ask(await call.digest(asked.asked), look=answer))
    asked.messages.clear()
    return Json({"heat": await heats.told(looking, answer)})
