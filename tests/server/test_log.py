"""What a server says about itself: no word of a request, whatever fails, and wherever."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading

import pytest

from mmchat.server import log


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
