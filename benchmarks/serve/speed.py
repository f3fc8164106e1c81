"""Measures of speed and fairness: worth something on a machine without other work alone."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import tempfile
import time
from dataclasses import replace
from statistics import median

from benchmarks.serve.asking import (
    ROWS,
    about,
    all_of,
    asked,
    lasting,
    long_prompt,
    picture,
    spelled,
)  # fmt: skip
from benchmarks.serve.figure import Figure
from benchmarks.serve.server import Said, serving
from mmchat.engine.reading import PIECE
from mmchat.server.ask import JOIN_SECONDS


async def streams(short: bool) -> list[Figure]:
    """Tokens per second of eight streams beside one: text, and a known picture each."""
    rounds, tokens = (1, 20) if short else (7, 200)
    figures = []
    with serving() as server:
        for what, content, bound in (
            ("text", "Hello", 2.5),
            ("a known picture each", about(picture(1)), 2.2),
        ):
            bodies = await lasting(server, ROWS, tokens, content)
            ratios = []
            for at in range(rounds):
                seconds = []
                for those in ([bodies[at % ROWS]], bodies):
                    begin = time.perf_counter()
                    await all_of(server, those)
                    seconds.append(time.perf_counter() - begin)
                ratios.append(ROWS * seconds[0] / seconds[1])
            title = f"tokens per second of 8 streams, against one: {what}"
            figures.append(Figure(title, median(ratios), "×", bound, at_least=True))
    return figures


async def alone(short: bool) -> list[Figure]:
    """Processor time of one answer in `mmchat generate`, beside all of the server's for it."""
    import torch

    import mmchat

    pairs, tokens = (2, 20) if short else (15, 200)
    torch.set_num_threads(1)
    model = mmchat.load("tiny")
    ratios = []
    with serving() as server:
        for body in await lasting(server, pairs, tokens):
            given = {"temperature": 100, "seed": body["seed"], "max_new_tokens": tokens}
            sampling = replace(model.sampling_defaults, **given)
            begin = time.process_time()
            *_, end = model.chat().send("Hello", sampling=sampling)
            ours = time.process_time() - begin
            before = server.cpu_seconds
            said = await server.ask(body)
            ratios.append(ours / (server.cpu_seconds - before))
            if said.text != (text := getattr(end, "text", "")):
                raise SystemExit(f"the server says {said.text!r}, generate {text!r}")
    return [
        Figure(f"one user's speed against `generate`, median of {pairs} pairs", median(ratios), "×",
               0.95, at_least=True)
    ]  # fmt: skip


async def gaps(short: bool) -> list[Figure]:
    """The longest gap between the tokens of a stream while a prompt or a picture of others is read.

    A slice is an eighth of the prompt's time alone, and for a picture the time of one layer.
    """
    rounds, words = (1, 600) if short else (9, 2_000)
    figures = []
    with serving() as server:
        body = spelled(100 if short else 400)
        step = _timing(await server.ask(body | {"stream": False}), "predicted_ms") / (
            body["max_tokens"] - 1
        )
        layers = 40 if short else _vision_slices()
        salts = itertools.count(random.randrange(10**6))  # noqa: S311
        for what, make, name, slices in (
            ("2,000-token prompt", lambda: long_prompt(next(salts), words), "prompt_ms",
             math.ceil((words + 12) / PIECE)),
            ("new 4-tile picture", lambda: about(picture(next(salts), 224)), "vision_ms", layers),
        ):  # fmt: skip
            found, slice_ms, shares = [], [], []
            for _ in range(rounds):
                whole = await server.ask(asked(make(), 1, stream=False))
                slice_ms.append(_timing(whole, name) / slices)
                stream = asyncio.create_task(server.ask(body))
                await asyncio.sleep(0.1)
                begin = time.perf_counter()
                other = asyncio.create_task(server.ask(asked(make(), 1)))
                await asyncio.sleep(0.02)
                short_one = await server.ask(asked(tokens=1)) if name == "prompt_ms" else None
                await other
                found.append(1000 * (await stream).longest_gap(begin, time.perf_counter()))
                if short_one:
                    shares.append(100_000 * short_one.first / _timing(whole, name))
            most = 1000 * JOIN_SECONDS + 3 * step + median(slice_ms)
            title = f"longest gap between tokens, while another's {what} is read"
            figures.append(Figure(title, median(found), "ms", round(most, 1)))
            if shares:
                title = "first token of a short question behind it, of the time of that prompt"
                figures.append(Figure(title, median(shares), "%"))
    return figures


def _timing(said: Said, name: str) -> float:
    return said.body["timings"][name]


def _vision_slices() -> int:
    import mmchat

    vision = mmchat.load("tiny").spec.config.vision_config  # type: ignore[attr-defined]
    return vision.num_hidden_layers + vision.num_global_layers


async def fair(short: bool) -> list[Figure]:
    """Eight equal users for ten seconds; and one request behind 32 of another key."""
    seconds, tokens = (1.0, 40) if short else (10.0, 200)
    with serving() as server:
        bodies = await lasting(server, ROWS, tokens, logprobs=True)
        end = time.perf_counter() + seconds

        async def user(at: int) -> int:
            count = 0
            while time.perf_counter() < end:
                said = await server.ask(bodies[at % ROWS])
                at, count = at + 1, count + sum(came <= end for came in said.tokens)
            return count

        counts = await asyncio.gather(*map(user, range(ROWS)))
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write("A: the-first-key-1234\nB: the-second-key-123\n")
        keys.flush()
        with serving("--api-key-file", keys.name) as server:
            first, second = "the-first-key-1234", "the-second-key-123"
            await server.ask(asked(), key=second)
            before = (await server.ask(asked(), key=second)).first
            crowd = [
                asyncio.create_task(
                    server.ask(asked(tokens=200, temperature=100, seed=i), key=first)
                )
                for i in range(32)
            ]
            await asyncio.sleep(0.5)
            behind = (await server.ask(asked(), key=second)).first
            refused = sum(said.status != 200 for said in await asyncio.gather(*crowd))
    evenly = min(counts) / max(counts)
    return [
        Figure("fewest tokens of 8 equal users against the most", evenly, "×", 0.9, at_least=True),
        Figure("first token of a key behind 32 requests of another", behind / before, "×"),
        Figure("of those 32 refused", refused, "", 0),
    ]
