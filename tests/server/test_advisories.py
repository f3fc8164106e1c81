"""The advisories of other servers of models in 2025 and 2026, each as what holds here.

Those about keys, Host, Origin and bodies are in test_checks, those about pictures in test_pictures,
about health and the queue in test_life, about caches and marks in test_openai_chat.
"""

from __future__ import annotations

import re
import threading

import pytest

from mmchat.server.app import OPEN_ROUTES, ROUTES
from tests.server.leaks import LEAKS
from tests.server.test_openai_chat import CHAT, HELLO

PATHS = {path for _, path, _ in (*OPEN_ROUTES, *ROUTES)}


def test_ollama_cve_2026_7482_no_model_comes_over_the_network():
    """A heap leaked by create and push; CVE-2025-51471 sent a token to any realm."""
    words = re.compile(r"/v1/.*\b(create|push|copy|delete|blobs|upload|lora|load)\b")
    assert not list(filter(words.search, PATHS))


def test_ollama_cve_2026_42248_nothing_updates_itself():
    assert not [path for path in PATHS if "update" in path]


def test_llama_server_cve_2026_21869_no_count_is_negative(client):
    """A negative n_discard wrote out of bounds."""
    for name in ("max_tokens", "max_completion_tokens", "top_k", "seed", "top_logprobs"):
        answer = client.post(CHAT, json={**HELLO, "logprobs": True, name: -1})
        assert answer.json()["error"]["param"] == name
    assert client.post(CHAT, json={**HELLO, "n_discard": -1, "n_keep": -9}).status_code == 200


@pytest.mark.parametrize("value", [2, 10**9, -1, "1", True, 1.5, [1], {}])
def test_vllm_cve_2026_34756_n_cannot_multiply_the_work(client, value):
    assert client.post(CHAT, json={**HELLO, "n": value}).status_code == 400


@pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_vllm_cve_2026_44223_penalties_beyond_their_range(client, name):
    for value in (1e30, -1e30, True, "1", [1], {}):
        assert client.post(CHAT, json={**HELLO, name: value}).json()["error"]["param"] == name


def test_vllm_cve_2026_55574_no_pattern_of_a_client_is_run(client):
    """Regular expressions come by schemas alone, where they are refused or bounded by a grammar."""
    for name in ("guided_regex", "regex", "grammar", "structured_outputs"):
        assert client.post(CHAT, json={**HELLO, name: "(a+)+$"}).status_code == 200  # not known


def test_vllm_cve_2026_22778_and_54236_no_error_says_what_an_exception_did(client, monkeypatch):
    wrong = [{"messages": value} for value in (None, 5, "x", [5], [{}], [{"role": "user"}], [[]])]
    for name in ("model", "stop", "stream", "tools", "seed", "top_p"):
        wrong.append({**HELLO, name: {"a": [1]}})
    for body in wrong:
        answer = client.post(CHAT, json=body)
        assert answer.status_code == 400, body
        assert not LEAKS.search(answer.text)
    for data in (b"\x80", b"{]", b'{"messages": [' + b"[" * 100_000, b'"x"', b"null", b"1" * 5_000):
        answer = client.post(CHAT, content=data)
        assert answer.status_code == 400
        assert not LEAKS.search(answer.text)

    def fails(*_):
        raise RuntimeError(
            f"<_io.BytesIO object at 0x7f1234567890> in /home/x/{threading.__file__}"
        )

    monkeypatch.setattr("mmchat.server.ask.prompt_of", fails)
    for stream in (False, True):
        answer = client.post(CHAT, json={**HELLO, "stream": stream})
        assert answer.status_code == 500
        assert not LEAKS.search(answer.text)


def test_starlette_cve_2025_62727_ranges_are_not_read(client):
    """A Range header of many parts took quadratic time; and CVE-2026-48710: Host made the path."""
    ranges = {"Range": "bytes=" + ",".join(f"{i}-" for i in range(2_000))}
    assert client.get("/", headers=ranges).status_code == 200
    assert client.get("/health", headers={"Host": "localhost/v1/models"}).status_code == 403


def test_open_webui_cve_2026_44568_answers_are_data(client):
    """What is shown is not made markup here: JSON, and the page's policy (test_checks)."""
    answer = client.post(
        CHAT, json={**HELLO, "messages": [{"role": "user", "content": "<script>"}]}
    )
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_vllm_cve_2026_115911_a_thread_that_hangs_holds_up_no_health(service, client):
    free = threading.Event()
    held = [service._workers.submit(free.wait, 20) for _ in range(2)]
    try:
        assert client.get("/health").json() == {"status": "ok"}
    finally:
        free.set()
        for one in held:
            one.result()


def test_unknown_paths_of_other_servers_are_not_found(client):
    for path in (
        "/v1/embeddings", "/v1/messages", "/v1/audio/speech", "/docs", "/openapi.json", "/slots",
        "/props", "/debug", "/server_info", "/.git/config", "/..%2f", "/%00",
    ):  # fmt: skip
        assert client.get(path).status_code == 404
