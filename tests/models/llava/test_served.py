"""A LLaVA behind the server's routes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator

import pytest

import mmchat
from tests.models.asking import served
from tests.models.llava.folders import write_hub_folder
from tests.models.llava.test_image_processor import picture

pytest.importorskip("starlette")
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> mmchat.Model:
    folder = tmp_path_factory.mktemp("served") / "tiny-llava"
    return mmchat.load(write_hub_folder(folder), device="cpu")


@pytest.fixture(scope="module")
def client(model) -> Iterator[TestClient]:
    with served(model) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> str:
    """PNG as base64."""
    file = io.BytesIO()
    picture(30, 40).pixels.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def asked(client: TestClient, path: str, **body) -> dict:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_openai_answers_about_a_picture_as_python_does(client, model, image):
    url = {"url": f"data:image/png;base64,{image}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "dog"}]
    messages = [{"role": "user", "content": parts}]
    sampling = {"temperature": 0, "max_tokens": 8}
    answer = asked(
        client, "/v1/chat/completions", model="tiny-llava", messages=messages, **sampling
    )
    greedy = mmchat.SamplingParams(temperature=0.0, max_new_tokens=8)
    expected = model.ask("dog", picture(30, 40), sampling=greedy)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] > 25


def test_texts_are_continued_and_scored(client, model):
    body = {"model": "tiny-llava", "prompt": "the dog", "max_tokens": 0, "echo": True}
    [choice] = asked(client, "/v1/completions", logprobs=1, **body)["choices"]
    first, *scored = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert len(scored) == len(model.tokenizer.encode("the dog"))
    assert all(math.isfinite(one) and one < 0 for one in scored)


def test_ollama_sees_a_llava_without_tools(client, image):
    shown = asked(client, "/api/show", model="llava:7b")
    assert shown["details"]["family"] == "llava"
    assert shown["capabilities"] == ["completion", "vision"]
    listed = [one["name"] for one in client.get("/api/tags").json()["models"]]
    assert "llava:latest" in listed
    assert "llama3.2-vision:latest" not in listed
    message = {"role": "user", "content": "dog", "images": [image]}
    options = {"temperature": 0, "num_predict": 4}
    body = {"model": "llava", "messages": [message], "options": options, "stream": False}
    assert asked(client, "/api/chat", **body)["prompt_eval_count"] > 25
    other = client.post("/api/chat", json={**body, "model": "llama3.2-vision"})
    assert other.status_code == 404


def test_parts_keep_their_order_and_tags_are_places_of_as_many_pictures(client, model, image):
    """From a client as from Python; any other number of tags is text, and refused by nobody."""
    shown = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{image}"},
    }

    def said(text):
        return {"type": "text", "text": text}

    def answers(*parts):
        """The length of the prompt and how likely the tokens of its answer were."""
        messages = [{"role": "user", "content": [*parts]}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 8, "logprobs": True}
        found = asked(client, "/v1/chat/completions", model="tiny-llava", **body)
        greedy = mmchat.SamplingParams(temperature=0.0, max_new_tokens=8)
        [choice] = found["choices"]
        assert model.ask(messages, sampling=greedy) == choice["message"]["content"]
        scores = [token["logprob"] for token in choice["logprobs"]["content"]]
        return found["usage"]["prompt_tokens"], scores

    length, scores = answers(said("the "), shown, said(" dog "), shown, said(" in"))
    same = (length, pytest.approx(scores, abs=1e-4))
    assert answers(shown, shown, said("the <image> dog <image> in")) == same
    assert answers(shown, said("the <image> dog "), shown, said("<image> in")) == same
    assert answers(shown, shown, said("the  dog  in")) != same
    said_alone, tagged = answers(said("What is it?"))[0], answers(said("What is <image>?"))[0]
    assert abs(tagged - said_alone) < 25  # text, and not a picture's positions
    one, more = (answers(shown, said(text))[0] for text in ("it", "<image> it <image>"))
    assert one < more < one + 25


def test_tools_are_refused_unless_they_are_not_to_be_called(client):
    body = {
        "model": "tiny-llava",
        "messages": [{"role": "user", "content": "dog"}],
        "max_tokens": 2,
        "tools": [{"type": "function", "function": {"name": "look"}}],
    }
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "was not taught to call tools" in refused.json()["error"]["message"]
    asked(client, "/v1/chat/completions", **body, tool_choice="none")
