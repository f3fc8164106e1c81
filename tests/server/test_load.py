"""Load and faults over real sockets; the crowds are those of `python -m benchmarks.serve`."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import resource
import shlex
import socket
import subprocess
import sys
import time
from itertools import pairwise

import ollama
import openai
import pytest

from benchmarks.serve import crowds
from benchmarks.serve.asking import about, asked, endless
from benchmarks.serve.server import CHAT, Server, serving
from mmchat import limits
from tests.kinds import some
from tests.server.conftest import ASSETS
from tests.server.serving import statuses

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]
DOG = base64.b64encode((ASSETS / "dog.jpg").read_bytes()).decode()
QUESTION, ANSWER = "What is in this picture?", "A brown dog."


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server
        assert server.faults == []


@pytest.mark.parametrize("measure", [crowds.opened, crowds.vanish, crowds.mixed, crowds.killed])
def test_a_crowd_is_answered_and_leaves_nothing(measure):
    """L1, L2, L3 and L11, and L5."""
    figures = asyncio.run(measure(True))
    assert [figure for figure in figures if not figure.is_kept] == []


def test_the_clients_of_others_at_once(server):
    """Two of each, together: nobody gets another's answer."""
    local = ollama.AsyncClient(f"http://127.0.0.1:{server.port}")
    theirs = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused")
    body = json.dumps(asked(about(DOG), stream=False))
    curl = f"curl -sS http://127.0.0.1:{server.port}{CHAT} -d @-"

    async def by_openai() -> str:
        messages = asked(about(DOG))["messages"]
        pieces = await theirs.chat.completions.create(
            model="tiny", messages=messages, temperature=0, stream=True
        )
        return "".join([piece.choices[0].delta.content or "" async for piece in pieces])

    async def by_ollama() -> str:
        message = {"role": "user", "content": QUESTION, "images": [DOG]}
        parts = await local.chat("tiny", [message], options={"temperature": 0}, stream=True)
        return "".join([part.message.content async for part in parts])

    async def by_curl() -> str:
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = await asyncio.create_subprocess_exec(*shlex.split(curl), **piped)
        said, _ = await process.communicate(body.encode())
        return json.loads(said)["choices"][0]["message"]["content"]

    async def everybody() -> list[str]:
        async with theirs:
            return await asyncio.gather(*(ask() for ask in (by_openai, by_ollama, by_curl) * 2))

    assert asyncio.run(everybody()) == [ANSWER] * 6


@pytest.mark.parametrize("count", some([300, 4_000], [300]))
def test_requests_may_be_cut_anywhere_and_follow_another(server, count):
    """L7."""
    data = json.dumps({"messages": []}).encode()
    head = b"Host: localhost\r\n"
    good = b"GET /health HTTP/1.1\r\n" + head + b"\r\n"
    bad = b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (
        CHAT.encode(), head, len(data), data,
    )  # fmt: skip
    chunked = b"POST %s HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" % (
        CHAT.encode(), head,
    )  # fmt: skip
    last = good.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    wanted = {good: 200, bad: 400, chunked: 400}

    async def one(number: int) -> None:
        draw = random.Random(number)
        asks = draw.choices([*wanted], k=draw.randrange(3))
        whole = b"".join(asks) + last
        cuts = sorted({0, len(whole), *draw.choices(range(len(whole)), k=draw.randint(1, 5))})
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for begin, end in pairwise(cuts):
            writer.write(whole[begin:end])
            await asyncio.sleep(draw.choice([0, 0.002]))
        came = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        assert statuses(came) == [wanted[ask] for ask in asks] + [200], (number, came)

    async def run() -> None:
        for begin in range(0, count, 20):
            await asyncio.gather(*map(one, range(begin, begin + 20)))

    asyncio.run(run())


async def deaf(server: Server, body: dict) -> socket.socket:
    """Somebody who asks, and reads nothing of the answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_024)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    await loop.sock_sendall(connection, head.encode() + data)
    return connection


def still_there(server: Server, connections: list[socket.socket]) -> set[int]:
    """The ports of those connections that the server has not closed."""
    ports = {connection.getsockname()[1] for connection in connections}
    held = server.process.net_connections("tcp")
    return ports & {connection.raddr.port for connection in held if connection.raddr}


@pytest.mark.parametrize("count", some([8, 50], [8]))
def test_who_does_not_read_holds_up_nobody_and_is_let_go(server, count):
    """L15: their rows are over when their answers are written; 50 of them wait for their end."""

    async def run() -> None:
        await server.ask(asked(about(DOG), 20))  # what decodes pictures stays from now on
        before = server.held
        body = endless(300, logprobs=True, top_logprobs=20)  # more than buffers take
        silent = [await deaf(server, body) for _ in range(count)]
        while (said := await server.ask(asked(about(DOG), 20))).status == 503:
            await asyncio.sleep(0.1)  # more are there than may wait
        assert said.text == ANSWER
        await server.until(0, 0)
        held = server.held
        assert held["memory"] - before["memory"] < count * 4 * limits.MIB + 64 * limits.MIB
        if count == 8:
            assert len(still_there(server, silent)) == count
        else:
            async with asyncio.timeout(2 * limits.UNREAD_SECONDS):  # each from its last byte on
                while still_there(server, silent):
                    await asyncio.sleep(1)
        for connection in silent:
            connection.close()

    asyncio.run(run())


def test_little_memory_is_shared_in_turns():
    """L10: room for three at once, and no more address space than that."""

    async def run(server: Server) -> None:
        await asyncio.gather(*(server.ask(endless(20)) for _ in range(3)))
        most = server.process.memory_info().vms + 256 * limits.MIB
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (most, most))
        asking = [asyncio.create_task(server.ask(endless(12, seed=i))) for i in range(40)]
        running = []
        while not all(task.done() for task in asking):
            running.append((await server.metrics())["requests_running"])
            await asyncio.sleep(0.01)
        assert {task.result().status for task in asking} == {200}
        assert 1 < max(running) <= 3

    with serving("--kv-memory", "3M") as server:
        asyncio.run(run(server))
        assert server.faults == []


def test_while_the_model_is_loaded_everybody_is_told_to_come_again():
    """L14."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mmchat", "serve", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ) as process:
        curl = ["curl", "-s", "-i", "-d", json.dumps(asked()), f"http://127.0.0.1:{port}{CHAT}"]
        try:
            said = ""
            while not said:
                assert process.poll() is None
                said = subprocess.run(curl, capture_output=True, text=True, check=False).stdout
                time.sleep(0.02)
        finally:
            process.kill()
    assert said.startswith("HTTP/1.1 503 ")
    assert "retry-after: 1" in said.lower()
    assert json.loads(said.rpartition("\n")[2])["error"]["code"] == "loading"
