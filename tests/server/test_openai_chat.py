"""POST /v1/chat/completions, as OpenAI's clients send it and read it."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image
from starlette.testclient import TestClient

from mmchat.server import openai_chat
from mmchat.server.app import make_app
from mmchat.server.ask import opened_of, prompt_of
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service
from tests.server.conftest import ASSETS, about

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
        ({"stop": ["a", "b" * 1025]}, "stop.1"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": ["x"]}, "messages.0"),
        (about("data:image/png;base64,AAAA"), "messages.0.content.1.image_url"),
        (about({"url": "x", "detail": "tiny"}), "messages.0.content.1.image_url.detail"),
    ],
)
def test_what_is_wrong_is_named(client, changed, param):
    response = client.post(CHAT, json={**HELLO, **changed})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert "dictionary" not in error["message"]  # JSON has objects


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (about(5), "messages.0.content.1.image_url: input should be a string or an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "content: input should be a string or a"),
        ({"stop": 5}, "stop: input should be a string or a list"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: field required"),
    ],
)
def test_all_that_a_field_may_be_is_said(client, changed, message):
    assert message in client.post(CHAT, json={**HELLO, **changed}).json()["error"]["message"]


def ask(client, status=200, **changed):
    response = client.post(CHAT, json={**HELLO, **changed})
    assert response.status_code == status, response.text
    return response.json()


def said(answer):
    return answer["choices"][0]["message"]["content"]


def test_what_clients_send_without_need_changes_nothing(client):
    plain = said(ask(client))
    extra = {
        "stream": None, "stop": None, "n": 1, "tools": [], "logit_bias": None, "top_logprobs": None,
        "user": "me", "metadata": {"a": 1}, "store": True, "reasoning_effort": "low",
        "verbosity": "low", "prompt_cache_key": "x", "safety_identifier": "y",
        "service_tier": "auto", "parallel_tool_calls": True, "something_new": [1],
        "response_format": {"type": "text"}, "max_tokens": 8.0, "modalities": ["text"],
        "max_completion_tokens": 4096, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert said(ask(client, **extra)) == plain


def test_messages_may_be_parts_and_of_every_role(client, dog):
    history = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "name": None},
        {"role": "system", "content": "And kind."},
        {"role": "user", "content": [
            {"type": "input_image", "image_url": dog, "detail": "low"},
            {"type": "input_text", "text": "What is in this picture?"}]},
        {"role": "assistant", "content": "A brown dog.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Hello"},
        {"role": "user", "content": "Are you there?"},
    ]  # fmt: skip
    usage = ask(client, messages=history)["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] > 0


@pytest.mark.parametrize("role", ["system", "assistant", "developer"])
def test_a_picture_belongs_to_the_user(client, dog, role):
    part = {"type": "image_url", "image_url": dog}
    messages = [{"role": role, "content": [part]}, *HELLO["messages"]]
    error = ask(client, 400, messages=messages)["error"]
    assert error["param"] == "messages.0.content.0.image_url"
    assert "user message" in error["message"]


def test_a_mark_without_its_picture_is_text(client, dog):
    """CVE-2026-44222: a placeholder in a text must not ask for a picture that is not there."""
    parts = [{"type": "image_url", "image_url": dog}]
    for text, marks in (("<|image|><|image|>What?", 2), ("What?", 0)):
        content = [*parts, {"type": "text", "text": text}]
        answer = ask(client, messages=[{"role": "user", "content": content}])
        assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 260, marks
    assert ask(client, messages=[{"role": "user", "content": "<|image|>What?"}])


def test_marks_are_the_places_of_as_many_pictures(service, dog):
    picture = {"type": "image_url", "image_url": dog}
    text = {"type": "text", "text": "First <|image|> then <|image|>?"}

    def ids(content):
        read = openai_chat.ChatRequest.model_validate({"messages": [
            {"role": "user", "content": content}]})  # fmt: skip
        asked = read.ask()
        call = SimpleNamespace(service=service, model=service.all[0].model, owner="")
        return prompt_of(call, asked, opened_of(call, asked, lambda: True)).token_ids

    def part(text):
        return {"type": "text", "text": text}

    meant = [part("First "), picture, part(" then "), picture, part("?")]
    assert ids([picture, picture, text]) == ids([text, picture, picture]) == ids(meant)


def test_logprobs_have_the_bytes_of_tokens(client, dog):
    request = about(dog, logprobs=True, top_logprobs=3, temperature=2, seed=3)
    answer = client.post(CHAT, json=request).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == said(answer)
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0
        assert entry["token"].encode() == bytes(entry["bytes"])
    chunks = events(client.post(CHAT, json={**request, "stream": True}))
    streamed = [one["choices"][0]["logprobs"] for one in chunks if one["choices"][0]["logprobs"]]
    again = [entry for one in streamed for entry in one["content"]]
    assert [entry["bytes"] for entry in again] == [entry["bytes"] for entry in content]
    probabilities = [entry["logprob"] for entry in content]  # of rows read in other pieces
    assert [entry["logprob"] for entry in again] == pytest.approx(probabilities, abs=1e-4)
    none = client.post(CHAT, json=about(dog, logprobs=True)).json()["choices"][0]["logprobs"]
    assert all(entry["top_logprobs"] == [] for entry in none["content"])


def test_stop_strings_end_an_answer_and_are_not_part_of_it(client, dog):
    for stop in (" dog", [" dog"], ["never", " dog"]):
        answer = client.post(CHAT, json=about(dog, stop=stop)).json()
        assert (said(answer), answer["choices"][0]["finish_reason"]) == ("A brown", "stop")


def test_a_seed_decides_and_penalties_and_lengths_are_used(client):
    hot = {"temperature": 5, "top_p": 1, "max_tokens": 12}
    for seed in (7, 2**63 - 1):
        assert said(ask(client, **hot, seed=seed)) == said(ask(client, **hot, seed=seed))
    assert said(ask(client, **hot, seed=7)) != said(ask(client, **hot, seed=8))
    cold = {"max_tokens": 12, "temperature": 0}
    for name, value in (("repetition_penalty", 50), ("frequency_penalty", 2), ("top_k", 1),
                        ("presence_penalty", -2), ("min_p", 1), ("top_p", 0)):  # fmt: skip
        assert ask(client, **{**cold, name: value})["usage"]["completion_tokens"] <= 12
    assert said(ask(client, **{**hot, "top_p": 0})) == said(ask(client, **cold))
    short = ask(client, max_tokens=5, max_completion_tokens=2, **{"temperature": 0})
    assert short["usage"]["completion_tokens"] <= 2


def test_a_prompt_without_room_is_told_with_its_numbers(client):
    error = ask(client, 400, messages=[{"role": "user", "content": "word " * 3_000}])["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"].replace(",", "")
    assert error["message"].endswith("or raise the server's --max-seq-len")  # no client can


def test_a_second_turn_reads_only_what_is_new(client, dog):
    first = about(dog)
    answer = client.post(CHAT, json=first).json()
    more = [
        {"role": "assistant", "content": said(answer), "refusal": None},
        {"role": "user", "content": "What colour is it?"},
    ]
    second = client.post(CHAT, json={**first, "messages": [*first["messages"], *more]}).json()
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= answer["usage"]["prompt_tokens"] - 1
    assert second["timings"]["cache_n"] == details["cached_tokens"]


def test_the_model_is_named_and_others_are_refused_if_that_is_asked(tiny, client):
    service = Service(ServerOptions(strict_model=True))
    service.use(tiny)
    strict = TestClient(make_app(service), base_url="http://localhost")
    for model in ("tiny", "mllama-tiny", "TINY"):
        assert ask(strict, model=model)["model"] == "tiny"
    other = ask(strict, 404, model="gpt-4o")["error"]
    assert other["code"] == "model_not_found"
    assert other["message"] == "there is no model 'gpt-4o'; this server has tiny and mllama-tiny"
    for missing in ({}, {"model": None}, {"model": ""}):
        refused = ask(strict, 400, **missing)["error"]
        assert refused["message"] == "model is missing; this server has tiny and mllama-tiny"
        assert refused["param"] == "model"
    assert ask(client, 400, model=5)["error"]["param"] == "model"
    service.close()
    listed = client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", "mllama-tiny"]
    assert client.get("/v1/models/mllama-tiny").json()["id"] == "mllama-tiny"
    assert client.get("/v1/models/Mllama-Tiny").status_code == 200
    assert client.get("/v1/models/a/b").status_code == 404


def test_routes_are_there_without_v1_too(client):
    """rtp-llm's own programs leave it out."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    counted = re.compile(r'requests_total\{api="openai",code="200"\} (\d+)')
    before = sum(map(int, counted.findall(client.get("/metrics").text)))
    for begin in ("", "/v1"):
        answer = client.post(f"{begin}/chat/completions", json=body)
        assert answer.json()["object"] == "chat.completion"
        assert client.get(f"{begin}/models").json()["data"][0]["id"] == "tiny"
        assert client.get(f"{begin}/models/a/b").json()["error"]["code"] == "model_not_found"
    assert counted.findall(client.get("/metrics").text) == [str(before + 4)]


def test_drafts_may_be_turned_off(client):
    answer = ask(client, messages=[{"role": "user", "content": "Hello"}], speculate="off")
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == details["rejected_prediction_tokens"] == 0
    for wrong in ("fast", 1.5, -1, True, {}):
        hello = [{"role": "user", "content": "Hello"}]
        error = ask(client, 400, messages=hello, speculate=wrong)["error"]
        assert error["param"] == "speculate"
        assert "speculate: must be auto, off or a number from 0 to 64" in error["message"]


def test_tiles_says_what_becomes_of_a_picture(client, dog):
    [found] = client.post("/page/tiles", json={"image_url": dog}).json()["pictures"]
    assert found["tokens"] > 0
    with Image.open(ASSETS / "dog.jpg") as picture:
        assert found["size"] == [picture.height, picture.width]
    assert found["grid"]
    assert client.post("/page/tiles", json={"image_url": "AAAA"}).status_code == 400


def test_every_key_has_its_own_cache(tiny, dog):
    """CVE-2025-46570: what others have asked is not to be told by the time it takes."""
    keys = {"one": "a-key-of-somebody-1", "two": "a-key-of-another-22"}
    service = Service(ServerOptions(keys=keys, rows=4))
    service.use(tiny)
    client = TestClient(make_app(service), base_url="http://localhost")
    cached = []
    for key in ("one", "one", "two", "two"):
        headers = {"Authorization": f"Bearer {keys[key]}"}
        usage = client.post(CHAT, json=about(dog), headers=headers).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
    assert cached == [False, True, False, True]
    assert (service.all[0].engine.encoded, service.all[0].engine.known) == (2, 2)
    service.close()


def test_a_language_model_alone_says_why_it_takes_no_picture(tiny, dog):
    spec = replace(tiny.spec, text_only=True)
    service = Service(ServerOptions(rows=1))
    service.use(replace(tiny, spec=spec, options=replace(tiny.options, text_only=True)))
    alone = TestClient(make_app(service), base_url="http://localhost")
    answer = alone.post(CHAT, json=about({"url": dog}))
    service.close()
    assert answer.status_code == 400
    assert "holds the language model alone" in answer.json()["error"]["message"]
