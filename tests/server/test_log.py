"""What a server says about itself: no word of a request, whatever fails, and wherever."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import re
import sys
import threading
import time

import pytest

from mmchat.cli import console
from mmchat.server import log
from mmchat.server.app import make_app
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service
from tests.server.asgi import ask


@pytest.fixture
def lines(monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(log.logger, "handlers", [handler])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    return said


def fails():
    raise RuntimeError("canary")


def test_failures_that_nobody_waits_for_are_told_by_their_place(lines, capfd):
    async def run() -> None:
        log.take_failures(asyncio.get_running_loop())

        async def work() -> None:
            fails()

        task = asyncio.ensure_future(work())
        await asyncio.wait([task])
        del task
        gc.collect()
        asyncio.get_running_loop().call_soon(fails)
        await asyncio.sleep(0)

    asyncio.run(run())
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    assert [line.partition(":")[0] for line in lines] == ["RuntimeError in fails"] * 3
    assert "canary" not in "".join(lines) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("method", "path", "line"),
    [
        ("GET", "/health", "GET /health 503"),
        ("GET", "/secret", "GET (unknown) 404"),
        ("HEAD", "/api/chat", "HEAD /api/chat 405"),
        ("PUT", "/secret", "- (refused) 405"),
        ("DELETE", "/api/delete", "DELETE (refused) 501"),
        ("POST", "/api/blobs/secret", "POST (refused) 501"),
    ],
)
def test_a_line_has_the_method_and_a_route_as_declared(lines, monkeypatch, method, path, line):
    monkeypatch.setattr(log.logger, "level", log.logger.level)  # as it is again behind this
    log.logger.setLevel(logging.INFO)
    ask(make_app(Service(ServerOptions())), method, path)
    assert [one.partition(" 0 tokens")[0] for one in lines] == [f"- {line}"]


def test_a_line_while_the_model_loads_stands_alone(monkeypatch):
    """What a spinner draws on a terminal is not behind it, nor before it."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    monkeypatch.setattr(log.logger, "level", 0)
    log.to_stderr(quiet=False)
    with console.Stages() as stages:
        stages.show("loading tiny")
        while "loading tiny" not in screen.getvalue():
            time.sleep(0.01)
        log.request("", "GET /health", 503, 0, 0.0)
    log.request("", "GET /health", 200, 0, 0.0)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", screen.getvalue()).split("\n")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    kept = [line for line in shown if "GET /health" in line]
    assert [line[8:] for line in kept] == [
        " - GET /health 503 0 tokens 0 ms", " - GET /health 200 0 tokens 0 ms",
    ]  # fmt: skip
