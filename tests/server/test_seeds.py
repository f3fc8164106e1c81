"""The requests of the programs that mmchat follows, to the letter."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import platform
import shlex
import subprocess
from dataclasses import replace

import httpx2
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

import mmchat.images.web
from mmchat.server.app import make_app
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service
from tests.server.conftest import ASSETS
from tests.server.serving import serving

platform.processor()  # here, since openai's client asks a process for it, once
MOUNTAIN = "https://www.nhmagazine.com/content/uploads/2019/05/mountain.jpg"
DOG = (ASSETS / "dog.jpg").read_bytes()


def png() -> str:
    """A small PNG, in base64."""
    buffer = io.BytesIO()
    Image.open(ASSETS / "dog.jpg").resize((280, 280)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def torchchat(stream: object = None) -> dict:
    """docs/multimodal.md: a picture as a plain string, and a PNG that is said to be a JPEG."""
    body = {
        "model": "llama3.2",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What's in this image?"},
                    {"type": "image_url", "image_url": f"data:image/jpeg;base64,{png()}"},
                ],
            }
        ],
        "max_tokens": 300,
    }
    return body if stream is None else {**body, "stream": stream}


def test_torchchats_request(client):
    answer = client.post("/v1/chat/completions", json=torchchat()).json()
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    for stream in (True, "true"):
        text = client.post("/v1/chat/completions", json=torchchat(stream)).text
        assert text.endswith("data: [DONE]\n\n")
    assert client.post("/v1/chat/completions", json=torchchat("false")).json()["choices"]
    assert client.post("/v1/chat/completions", json=torchchat("yes")).status_code == 400


@pytest.mark.process
@pytest.mark.timeout(120)
def test_torchchats_curl(tmp_path):
    file = tmp_path / "body.json"
    file.write_text(json.dumps(torchchat()))
    with serving() as served:
        curl = f"""curl {served.url}/v1/chat/completions -s -H "Content-Type: application/json" """
        done = subprocess.run(
            [*shlex.split(curl), "-d", f"@{file}"], capture_output=True, check=True
        )
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] in ("stop", "length")


def mistral_rs(url: str) -> dict:
    """docs/VLLAMA.md: the mark in front of the question is the picture's place."""
    return {
        "model": "default",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {
                        "type": "text",
                        "text": "<|image|>What is shown in this image? Write a detailed response"
                        " analyzing the scene.",
                    },
                ],
            },
        ],
        "max_tokens": 256,
        "frequency_penalty": 1.0,
        "top_p": 0.1,
        "temperature": 0,
    }


@pytest.fixture(scope="module")
def open_handed(service):
    """A server that fetches pictures, and reads them from one folder."""
    options = ServerOptions(remote_images=frozenset(), media_dir=ASSETS)
    other = Service(options)
    other.use(service.all[0].model)
    yield make_app(other)
    other.close()


async def with_openai(app, **request):
    transport = httpx2.ASGITransport(app)
    async with openai.AsyncOpenAI(
        api_key="foobar",
        base_url="http://localhost:1234/v1/",
        http_client=httpx2.AsyncClient(transport=transport),
        max_retries=0,
    ) as client:
        return await client.chat.completions.create(**request)


@pytest.mark.parametrize(
    "url",
    [
        MOUNTAIN,
        "dog.jpg",
        str(ASSETS / "dog.jpg"),
        f"file://{ASSETS / 'dog.jpg'}",
        base64.b64encode(DOG).decode(),
        f"data:image/png;base64,{base64.b64encode(DOG).decode()}",
    ],
    ids=["address", "name", "path", "file", "base64", "data"],
)
def test_mistral_rs_request_by_openais_client(open_handed, monkeypatch, url):
    monkeypatch.setattr(mmchat.images.web, "fetch", lambda url, **given: DOG)
    completion = asyncio.run(with_openai(open_handed, **mistral_rs(url)))
    assert completion.choices[0].message.content
    assert completion.usage.prompt_tokens_details.image_tokens > 0


def test_the_mark_of_mistral_rs_is_the_place_of_the_picture(client, dog):
    with_mark = mistral_rs(dog)
    without = mistral_rs(dog)
    text = without["messages"][0]["content"][1]
    text["text"] = text["text"].removeprefix("<|image|>")
    first, second = (
        client.post("/v1/chat/completions", json=one).json() for one in (with_mark, without)
    )
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_rtp_llms_request(tiny):
    """A part whose type comes last, a name that is null, no model at all; and a path."""
    part = {"image_url": {"url": "dog.jpg"}, "type": "image_url"}
    chat_messages = [
        {
            "role": "user",
            "content": [part, {"text": "What is in this picture?", "type": "text"}],
            "name": None,
        }
    ]
    request = {"temperature": 0.0, "top_p": 0.1, "messages": chat_messages}
    service = Service(replace(ServerOptions(), media_dir=ASSETS))
    service.use(tiny)
    client = TestClient(make_app(service), base_url="http://localhost")
    answer = client.post("/v1/chat/completions", json=request).json()
    assert answer["choices"][0]["message"]["content"] == "A brown dog."
    service.close()
