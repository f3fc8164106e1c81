"""A server in this process: the built-in model behind the application, without a socket."""

from __future__ import annotations

import asyncio
import base64
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from starlette.testclient import TestClient

import mmchat
from mmchat.server.app import make_app
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="session")
def tiny() -> mmchat.Model:
    """The built-in model."""
    return mmchat.load(max_seq_len=2_048, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def service(tiny: mmchat.Model) -> Iterator[Service]:
    """With the usual options."""
    service = Service(ServerOptions(rows=4))
    service.use(tiny)
    yield service
    service.close()


@pytest.fixture(scope="session")
def client(service: Service) -> TestClient:
    return TestClient(make_app(service), base_url="http://localhost")


@pytest.fixture(scope="session")
def dog() -> str:
    """A picture as a data: URL."""
    return "data:image/jpeg;base64," + base64.b64encode((ASSETS / "dog.jpg").read_bytes()).decode()


@pytest.fixture
def theirs(client, monkeypatch):
    monkeypatch.setattr(platform, "platform", lambda: "Linux")  # which asks a process
    return openai.OpenAI(
        base_url="http://localhost/v1", api_key="unused", http_client=client, max_retries=0
    )


@pytest.fixture
def their(service):
    """Runs what is done with a client of Ollama."""

    def do(work):
        async def within():
            transport = httpx.ASGITransport(make_app(service))
            async with ollama.AsyncClient("http://localhost", transport=transport) as client:
                return await work(client)

        return asyncio.run(within())

    return do


def about(url: Any, text: str = "What is in this picture?", **more: Any) -> dict[str, Any]:
    """A question about a picture, in OpenAI's form."""
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, **more}
