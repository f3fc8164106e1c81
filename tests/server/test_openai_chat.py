"""POST /v1/chat/completions, as OpenAI's clients send it and read it."""

import json

import pytest

from tests.server.conftest import about

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_picture_is_seen_and_the_answer_has_openais_form(client, dog):
    response = client.post(CHAT, json=about({"url": dog}, model="llama3.2"))
    assert response.status_code == 200
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "A brown dog."
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("stop", 0, None)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] > 0


def test_a_stream_says_the_same_in_chunks(client, dog):
    request = about(dog, stream=True, stream_options={"include_usage": True})
    response = client.post(CHAT, json=request)
    assert response.headers["content-type"] == "text/event-stream"
    first, *middle, last, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "A brown dog."
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    common = {(chunk["id"], chunk["created"], chunk["model"]) for chunk in (first, *middle, last)}
    assert len(common) == 1


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"temperature": True}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"stream": 0}, "stream"),
        ({"n": 2}, "n"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        (about("data:image/png;base64,AAAA"), "messages.0.content.1.image_url"),
        (about({"url": "x", "detail": "tiny"}), "messages.0.content.1.image_url.detail"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_wrong_is_named(client, changed, param):
    response = client.post(CHAT, json={**HELLO, **changed})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
