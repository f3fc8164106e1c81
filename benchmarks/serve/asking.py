"""What the measures ask."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.serve.server import Said, Server
from mmchat.bench.pictures import picture_file

ROWS = 8  # that are written at once, as is usual on a CPU


def asked(content: Any = "Hello", tokens: int = 8, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, **more}


def picture(seed: int, side: int = 112) -> str:
    """In base64: 112 pixels are one tile of the built-in model, 224 are four."""
    return base64.b64encode(picture_file(side, side, seed)).decode()


def about(data: str, text: str = "What is in this picture?") -> list[dict[str, Any]]:
    url = {"url": f"data:image/jpeg;base64,{data}"}
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]


def held_to(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def endless(tokens: int, **more: Any) -> dict[str, Any]:
    """An answer of exactly so many tokens, which nothing but its length ends."""
    form = held_to({"type": "string", "minLength": 50_000})
    return asked(tokens=tokens, temperature=100, response_format=form, **more)


def spelled(tokens: int) -> dict[str, Any]:
    """An answer of so many tokens that all show at once, which half a character would not."""
    form = held_to({"type": "string", "pattern": "^[a-z ]{3000}"})
    return asked(tokens=tokens, temperature=100, seed=1, response_format=form)


def long_prompt(salt: int, words: int = 2_000) -> str:
    """About as many tokens, of which none was read before."""
    return f"{salt} " + "word " * words


async def lasting(
    server: Server, count: int, tokens: int, content: Any = "Hello", **more: Any
) -> list[dict[str, Any]]:
    """Questions whose plain answers are so long: seeds of nearly even draws are tried for them."""
    found: list[dict[str, Any]] = []
    seeds = itertools.count()
    while len(found) < count:
        bodies = [asked(content, tokens, temperature=100, seed=next(seeds)) for _ in range(ROWS)]
        for body, said in zip(bodies, await all_of(server, bodies), strict=True):
            if said.body["choices"][0]["finish_reason"] == "length":
                found.append(body | more)
    return found[:count]


async def all_of(server: Server, bodies: Sequence[Any]) -> list[Said]:
    """At once."""
    return await asyncio.gather(*map(server.ask, bodies))
