"""Whatever a body says, it is answered, or refused in the form of its API; no route breaks."""

from __future__ import annotations

import base64
import itertools
import json
import time
from threading import current_thread

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mmchat.server import held, ollama, openai_forms
from mmchat.server.app import OPEN_ROUTES, ROUTES
from tests.kinds import some
from tests.server.conftest import ASSETS
from tests.server.leaks import LEAKS
from tests.server.serving import serving

CHAT = "/v1/chat/completions"
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 5.0, 2**53, -1e9]),
    st.sampled_from(["", "a", "user", "tiny", "json", "text", "5m", "data:,", "\ud800"]),
    st.just("<|image|>"),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "text", "role", "content"]), inner, max_size=3),
    ),
    max_leaves=6,
)
SAMPLED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "frequency_penalty", "stream",
    "logprobs", "top_logprobs", "model",
)  # fmt: skip
OLLAMA = ("model", "stream", "format", "options", "keep_alive", "think", "logprobs", "images")
TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
FIELDS = {
    "/v1/chat/completions": (
        *SAMPLED,
        *TOOLS,
        "messages",
        "max_tokens",
        "response_format",
        "heat",
    ),
    "/v1/completions": (*SAMPLED, "prompt", "max_tokens", "echo", "n", "stream_options"),
    "/v1/responses": (*SAMPLED, "input", "instructions", "text", *TOOLS, "include", "store"),
    "/api/chat": (*OLLAMA, "messages", "tools"),
    "/api/generate": (*OLLAMA, "prompt", "system", "raw", "context", "suffix"),
    "/api/show": ("model", "name"),
    "/api/pull": ("model", "name", "stream"),
    "/page/tiles": ("image_url", "model"),
    "/page/heat": ("messages", "answer"),
}
DOG = "data:;base64," + base64.b64encode((ASSETS / "dog.jpg").read_bytes()).decode()
GOOD = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/api/chat": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "options": {"num_predict": 1},
    },
    "/api/generate": {"model": "tiny", "prompt": "a", "options": {"num_predict": 1}},
    "/api/show": {"model": "tiny"},
    "/api/pull": {"model": "tiny"},
    "/page/tiles": {"image_url": DOG},
    "/page/heat": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": DOG}]}],
        "answer": "A dog.",
    },
}
OPTIONS = ("temperature", "top_k", "top_p", "seed", "stop", "num_predict", "num_ctx", "num_gpu")


def bodies(path):
    """A good body, some fields of which say something else."""
    changes = st.dictionaries(st.sampled_from(FIELDS[path]), VALUES, min_size=1, max_size=2)
    return changes.map(lambda changed: GOOD[path] | changed)


def check(client, path, body):
    response = client.post(path, content=json.dumps(body))  # half of a surrogate pair, too
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404), response.text
    check_error(response, path)


def check_error(response, path):
    """In the form of its API, and without a word of what an exception said."""
    error = response.json()["error"]
    text = error if path.startswith("/api/") else error["message"]
    assert isinstance(text, str)
    assert text
    assert not LEAKS.search(text), text


def attack(client, path, count):
    """So many bodies, and a good one behind every hundred."""
    sent = itertools.count(1)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(path))
    def one(body):
        check(client, path, body)
        if next(sent) % 100 == 0:
            assert client.post(path, json=GOOD[path]).status_code == 200

    one()
    assert client.post(path, json=GOOD[path]).status_code == 200


@pytest.mark.parametrize("count", some([25, 400], [25]))
@pytest.mark.parametrize("path", FIELDS)
def test_every_body_is_answered_or_refused(client, path, count):
    attack(client, path, count)


@pytest.mark.process
@pytest.mark.parametrize("count", some([15, 200], [15]))
def test_every_body_is_answered_or_refused_over_a_socket(count):
    with serving() as served, httpx.Client(base_url=served.url, timeout=60) as client:
        for path in FIELDS:
            attack(client, path, count)
        assert served.end() == 0
    assert "Traceback" not in "".join(served.lines)


# A body as text that lost something, got something, or is none
BROKEN = st.one_of(
    st.binary(max_size=40),
    st.tuples(st.integers(0, 80), st.binary(max_size=3), st.integers(0, 9)),
)


def broken(path, change):
    if isinstance(change, bytes):
        return change
    at, new, lost = change
    data = json.dumps(GOOD.get(path) or GOOD.get(f"/v1{path}", GOOD[CHAT])).encode()
    return data[:at] + new + data[at + lost :]


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in (*OPEN_ROUTES, *ROUTES)])
def test_no_route_breaks_at_what_is_no_request(client, method, path):
    """By any method and any bytes, whatever they say they are."""
    path = path.replace("{id:path}", "tiny")
    kinds = st.sampled_from(["", "application/json", "text/plain; charset=utf-16", "a/b; \xff"])

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([method, "GET", "POST", "HEAD", "PUT", "DELETE"]), BROKEN, kinds)
    def one(other, change, kind):
        data = broken(path, change)
        headers = {"content-type": kind.encode("latin-1")}
        response = client.request(other, path, content=data, headers=headers)
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and other != "HEAD":
            check_error(response, path)

    one()
    body = None if method == "GET" else GOOD.get(path) or GOOD.get(f"/v1{path}", {})
    assert client.request(method, path, json=body).status_code == 200


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(OPTIONS), SCALARS, max_size=3))
def test_every_option_of_ollama_is_taken_or_refused(client, options):
    check(client, "/api/chat", GOOD["/api/chat"] | {"options": {"num_predict": 1} | options})


MANY = 50_000
MASSES = {
    "messages": (CHAT, {"messages": [0] * MANY}, "messages"),
    "good messages": (CHAT, {"messages": [{"role": "user"}] * MANY}, "messages"),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [0] * MANY}]}, "messages.0.content"),
    "stop": (CHAT, GOOD[CHAT] | {"stop": [0] * MANY}, "stop"),
    "tools": (CHAT, GOOD[CHAT] | {"tools": [0] * MANY}, "tools"),
    "good tools": (CHAT, GOOD[CHAT] | {"tools": [{}] * MANY}, "tools"),
    "input": ("/v1/responses", {"input": [0] * MANY}, "input"),
    "include": ("/v1/responses", GOOD["/v1/responses"] | {"include": [0] * MANY}, "include"),
    "Ollama's messages": ("/api/chat", GOOD["/api/chat"] | {"messages": [0] * MANY}, "messages"),
    "images": ("/api/generate", GOOD["/api/generate"] | {"images": [0] * MANY}, "images"),
    "context": ("/api/generate", GOOD["/api/generate"] | {"context": [[]] * MANY}, "context"),
}


@pytest.mark.parametrize("name", MASSES)
def test_a_list_of_many_faults_is_refused_by_the_first(client, monkeypatch, name):
    """All others wait while it is looked at."""
    path, body, param = MASSES[name]
    seconds = []
    check = BaseModel.model_validate.__func__

    def timed(cls, value):
        begin = time.thread_time()
        try:
            return check(cls, value)
        finally:
            seconds.append(time.thread_time() - begin)

    monkeypatch.setattr(BaseModel, "model_validate", classmethod(timed))
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert param in response.text
    assert sum(seconds) < 0.02


def test_a_large_body_is_checked_in_a_thread(client, monkeypatch):
    threads = []
    check, plan_of = BaseModel.model_validate.__func__, held.plan_of

    def checks(cls, value):
        threads.append(current_thread())
        return check(cls, value)

    def plans(*given):
        threads.append(current_thread())
        return plan_of(*given)

    monkeypatch.setattr(BaseModel, "model_validate", classmethod(checks))
    for module in (openai_forms, ollama):
        monkeypatch.setattr(module, "plan_of", plans)
    tools = [{"type": "function", "function": {"name": "a", "description": "a" * 70_000}}]
    for path in ("/v1/chat/completions", "/v1/responses", "/api/chat"):
        client.post(path, json=GOOD[path] | {"tools": tools})
    assert len(threads) == 9  # of each the body, its tool, and the plan
    assert {thread.name.rpartition("_")[0] for thread in threads} == {"mmchat request"}


def test_a_schema_is_measured_before_it_is_walked(client, monkeypatch):
    moved = held.moved
    large = {"enum": ["x" * 70_000]}

    def walks(schema, path):
        assert schema != large
        return moved(schema, path)

    monkeypatch.setattr(held, "moved", walks)
    one = {"type": "function", "function": {"name": "a", "parameters": large}}
    form = {"type": "json_schema", "json_schema": {"schema": large}}
    small = {"type": "function", "function": {"name": "a"}}
    for body in (
        {"tools": [one], "tool_choice": "required"},
        {"tools": [small], "response_format": form},
    ):
        response = client.post(CHAT, json=GOOD[CHAT] | body)
        assert response.json()["error"]["code"] == "invalid_schema"
