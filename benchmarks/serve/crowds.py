"""Measures of many clients: those who wait, those who go, and all kinds of requests for long."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import linear_regression, quantiles

import psutil

from benchmarks.serve.asking import (
    ROWS,
    about,
    asked,
    endless,
    held_to,
    long_prompt,
    picture,
)
from benchmarks.serve.figure import Figure
from benchmarks.serve.server import CHAT, Server, serving

LITTLE = ("--kv-memory", "64M")  # of rows and pictures, so that it is full before anything counts
DOG = (Path(__file__).parents[2] / "assets" / "dog.jpg").read_bytes()


async def opened(short: bool) -> list[Figure]:
    """Streams that are open at once: what each costs while it waits, and that each is answered."""
    count = 40 if short else 500
    with serving("--queue", str(count)) as server:
        first = [await server.send(endless(6_000)) for _ in range(ROWS)]
        await server.until(0, ROWS)
        await asyncio.sleep(2)  # until their memory grows slowly
        before = server.held["memory"]
        waiting = [await server.send(asked()) for _ in range(count - ROWS)]
        await server.until(count - ROWS)
        each = (server.held["memory"] - before) / len(waiting) / 1024
        for connection in first:
            connection.go(reset=True)
        said = await asyncio.gather(*(connection.said() for connection in waiting))
    answered = sum(one.status == 200 and one.text == said[0].text != "" for one in said)
    return [
        Figure(f"of {count} open streams answered", answered + ROWS, "", count, at_least=True),
        Figure("memory of each that waits", each, "KiB", None if short else 64),
    ]  # fmt: skip


STAGES = ("in its upload", "in the queue", "in a picture", "in its prompt", "in its answer")


async def vanish(short: bool) -> list[Figure]:
    """Clients that go, by RST and FIN, at every stage, beside one that stays."""
    count, wave = (50, 25) if short else (1_000, 50)
    draw = random.Random(1)  # noqa: S311
    stays = asked(tokens=60, response_format=endless(1)["response_format"])

    async def leave(at: int) -> None:
        stage = STAGES[at % len(STAGES)]
        content = {"in a picture": about(picture(at, 224)), "in its prompt": long_prompt(at)}
        body = endless(500, messages=asked(content.get(stage, "Hello"))["messages"])
        connection = await server.send(body, share=0.5 if stage == "in its upload" else 1.0)
        if stage == "in its answer":
            await connection.status()
            await anext(connection.objects(), None)
        elif stage != "in the queue":
            await asyncio.sleep(draw.random() / 3)
        connection.go(reset=at % 2 == 0)

    with serving("--queue", str(wave), *LITTLE) as server:
        whole = (await server.ask(stays)).text
        for _ in range(4):  # what is made once is there before anything is counted
            await asyncio.gather(*map(leave, range(wave)))
            await server.until(0, 0)
        before = await server.held_idle()
        cancelled = (await server.metrics())["requests_cancelled_total"]
        texts, slowest = [], 0.0
        for start in range(wave, count + wave, wave):
            stayer = asyncio.create_task(server.ask(stays))
            await asyncio.gather(*map(leave, range(start, start + wave)))
            texts.append((await stayer).text)
            slowest = max(slowest, await server.until(0, 0))
        found = await server.metrics()
        uploads = sum(STAGES[at % len(STAGES)] == STAGES[0] for at in range(wave, count + wave))
        counted = found["requests_cancelled_total"] - cancelled + uploads
        after = await server.held_idle()
        grown = (after["memory"] - before["memory"]) / 2**20
        return [
            Figure(f"until {count:,} clients that vanished have left nothing", slowest, "s", 1),
            Figure("of them not counted", count - counted, "", 0),
            Figure("answers beside them not as alone", sum(t != whole for t in texts), "", 0),
            Figure("memory more than before", grown, "MiB", 48),
            Figure("files more than before", after["files"] - before["files"], "", 1),
            Figure("threads more than before", after["threads"] - before["threads"], "", 0),
            Figure("faults in the log", len(server.faults), "", 0),
        ]  # fmt: skip


BAD = (
    b"{",
    b"[1]",
    {"messages": 5},
    asked(n=2),
    asked(stop=[""]),
    asked(about("bm8=")),
    asked(long_prompt(0, 9_000)),
    asked(response_format=held_to({"pattern": "(?=a)"})),
)
ANIMAL = held_to({"enum": ["a cat", "a dog"]})
OTHERS = (
    ("/v1/completions", {"prompt": "A red", "max_tokens": 8}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 8}),
    ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}),
    ("/api/generate", {"model": "tiny", "prompt": "Hello"}),
)


class Crowd:
    """Mixed requests, each of a kind that its number decides: 40 % pictures from a pool of 50, 10 %
    bad, 10 % that go, 10 % JSON, the rest text of all APIs; and a known question now and then.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.pool = [picture(seed, 112 if seed % 2 else 224) for seed in range(50)]
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []  # what was not answered as it must be
        self.firsts: list[float] = []  # seconds to the first token
        self.held: list[tuple[int, dict[str, int]]] = []  # by how many were answered

    async def run(self, numbers: Iterator[int], each: int, workers: int = 12) -> None:
        """each: so many requests between two looks at what the server holds, then for nobody."""

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                with suppress(ConnectionResetError):
                    await self.one(number)

        while some := list(itertools.islice(numbers, each)):
            left = iter(some)
            await asyncio.gather(*(work(left) for _ in range(workers)))
            await self.server.until(0, 0)
            self.held.append((some[-1], self.server.held))

    async def one(self, number: int) -> None:
        draw = random.Random(number)  # noqa: S311
        kind = draw.random()
        wanted, path, check = (200,), CHAT, lambda said: bool(said.body)
        if number % 50 == 0:
            body = asked(about(base64.b64encode(DOG).decode()))
            check = lambda said: said.text == "A brown dog."  # noqa: E731
        elif kind < 0.4:
            body = asked(about(draw.choice(self.pool)), stream=draw.random() < 0.5)
        elif kind < 0.5:
            body, wanted = draw.choice(BAD), (400,)
        elif kind < 0.6:
            connection = await self.server.send(endless(300))
            await asyncio.sleep(draw.random() / 10)
            connection.go(reset=draw.random() < 0.5)
            return
        elif kind < 0.7:
            body = asked(response_format=ANIMAL, temperature=1)
            check = lambda said: json.loads(said.text) in ("a cat", "a dog")  # noqa: E731
        elif kind < 0.85:
            body = asked(tokens=draw.randrange(1, 40), temperature=100, seed=number)
        else:
            path, body = draw.choice(OTHERS)
        said = await self.server.ask(body, path)
        self.statuses[said.status] += 1
        if said.status not in (*wanted, 429, 503) or (said.status == 200 and not check(said)):
            self.wrong.append(f"{said.status} {said.text or said.body} for {body}"[:300])
        if said.status == 200 and said.tokens:
            self.firsts.append(said.first)


async def killed(short: bool) -> list[Figure]:
    """`kill -9` in the middle of answers and uploads, again and again."""
    count = 2 if short else 50
    answered = files = processes = 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            with serving(TMPDIR=folder) as server:  # which ends so
                body = asked(about(base64.b64encode(DOG).decode()))
                answered += (await server.ask(body)).text == "A brown dog."
                left = [await server.send(endless(2_000)), await server.send(body, share=0.5)]
                await server.until(0, 1)
                children = server.process.children(recursive=True)
            processes += len(psutil.wait_procs(children, 10)[1])
            files += len(list(Path(folder).iterdir()))
            for connection in left:
                connection.go(reset=True)
    return [
        Figure(
            f"of {count} servers, of which each is killed, answering", answered, "", count, True
        ),
        Figure("files that are left", files, "", 0),
        Figure("processes that are left", processes, "", 0),
    ]


async def mixed(short: bool) -> list[Figure]:
    """Ten thousand requests of all kinds."""
    count = 200 if short else 10_000
    return await _crowded(f"{count:,} mixed requests", iter(range(count)), count)


async def soak(short: bool) -> list[Figure]:
    """The same for half an hour."""
    end = time.monotonic() + (5 if short else 1_800)
    numbers = itertools.takewhile(lambda n: n < 60 or time.monotonic() < end, itertools.count())
    return await _crowded("requests of 30 minutes", numbers, 20_000)


async def _crowded(what: str, numbers: Iterator[int], count: int) -> list[Figure]:
    with serving(*LITTLE) as server:
        crowd = Crowd(server)
        for _ in range(2):  # what is made once is there before anything is counted
            await crowd.run(iter(range(60)), 1_000)
            crowd.held, crowd.firsts, crowd.statuses = [], [], Counter()
        before = server.held
        await crowd.run(numbers, max(1, count // 40))
        after, found, faults = server.held, await server.metrics(), server.faults
    print(*crowd.wrong[:9], *faults[:9], sep="\n", file=sys.stderr)
    served = sum(crowd.statuses.values())
    late = [(at / 1_000, held["memory"] / 1024) for at, held in crowd.held if at >= count // 10]
    slope = linear_regression(*zip(*late, strict=True)).slope if len(late) > 2 else 0.0
    third = len(crowd.firsts) // 3
    early, last = (
        quantiles(part, n=100)[98] for part in (crowd.firsts[:third], crowd.firsts[-third:])
    )
    hits = found["image_cache_hits_total"] / found["images_total"]
    return [
        Figure(f"{what}: answered", served),
        Figure("wrongly", len(crowd.wrong), "", 0),
        Figure("with 429 or 503", crowd.statuses[429] + crowd.statuses[503]),
        Figure("memory grows in 1,000 requests by", slope, "KiB", 50 if count >= 10_000 else None),
        Figure("threads more than before", after["threads"] - before["threads"], "", 0),
        Figure("files more than before", after["files"] - before["files"], "", 1),
        Figure("faults in the log", len(faults), "", 0),
        Figure("pictures found encoded", 100 * hits, "%"),
        Figure("memory of rows and pictures, of what they may take",
               100 * found["kv_bytes_used"] / found["kv_bytes_budget"], "%", 100),
        Figure("first token of the slowest hundredth, last third against first", last / early, "×"),
    ]  # fmt: skip
