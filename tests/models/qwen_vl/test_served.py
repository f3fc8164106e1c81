"""A Qwen-VL behind the server's routes: no request opens what a text names."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest

import mmchat
from tests.models.asking import served
from tests.models.qwen_vl.folders import write_folder
from tests.models.qwen_vl.oracle import SEQ_LENGTH, SPAN, image

pytest.importorskip("starlette")
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> mmchat.Model:
    folder = tmp_path_factory.mktemp("served") / "tiny-qwen"
    return mmchat.load(write_folder(folder), device="cpu")


@pytest.fixture(scope="module")
def client(model) -> Iterator[TestClient]:
    with served(model) as client:
        yield client


@pytest.fixture(scope="module")
def shown() -> dict:
    file = io.BytesIO()
    image(0).pixels.save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def asked(client: TestClient, *parts: dict) -> dict:
    body = {"messages": [{"role": "user", "content": [*parts]}], "temperature": 0, "max_tokens": 8}
    response = client.post("/v1/chat/completions", json={"model": "tiny-qwen", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_openai_answers_about_a_picture_as_python_does(client, model, shown):
    answer = asked(client, shown, said("dog"))
    greedy = mmchat.SamplingParams(temperature=0.0, max_new_tokens=8)
    expected = model.ask("dog", image(0), sampling=greedy)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] > SPAN


def test_the_request_of_rtp_llm(model, tmp_path):
    """It names no model, and its parts say last what they are; the path needs --media-dir."""
    image(0).pixels.save(tmp_path / "dog.png")
    picture = {"image_url": {"url": "dog.png"}, "type": "image_url"}
    text = {"text": "Describe this image", "type": "text"}
    message = {"role": "user", "content": [picture, text], "name": None}
    request = {"temperature": 0.0, "top_p": 0.1, "messages": [message], "max_tokens": 8}
    with served(model, media_dir=tmp_path) as client:
        answer = client.post("/v1/chat/completions", json=request).json()
    greedy = mmchat.SamplingParams(temperature=0.0, max_new_tokens=8)
    expected = model.ask(text["text"], image(0), sampling=greedy)
    assert answer["choices"][0]["message"]["content"] == expected


def test_tags_are_places_of_as_many_pictures_and_else_text(client, shown):
    placed = asked(client, shown, said("a <img/> b"))["usage"]["prompt_tokens"]
    assert placed > SPAN
    plain = asked(client, said("a <img/> b"))["usage"]["prompt_tokens"]
    assert plain < SPAN


def test_token_ids_beyond_the_limit_of_rotation_are_read_anew(client):
    """They begin as a shorter prompt does whose keys are rotated otherwise."""

    def logprobs(ids: list[int]) -> list[float]:
        body = {"prompt": ids, "max_tokens": 2, "temperature": 0, "logprobs": 1}
        found = client.post("/v1/completions", json={"model": "tiny-qwen", **body})
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["logprobs"]["token_logprobs"]

    ids = [at * 37 % 250 for at in range(SEQ_LENGTH + 30)]
    longer = logprobs(ids)
    logprobs(ids[: SEQ_LENGTH - 5])
    assert logprobs(ids) == pytest.approx(longer, abs=1e-5)


def test_no_path_or_address_of_a_text_is_opened(client, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr("mmchat.images.load_each", refuse)
    image(0).pixels.save(tmp_path / "dog.png")
    for name in (tmp_path / "dog.png", "https://example.com/dog.png", "/etc/passwd", "1"):
        found = asked(client, said(f"<img>{name}</img> What is this?"))
        assert found["usage"]["prompt_tokens"] < SPAN
