"""From the queue to the end: who waits, who goes, and how a server ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import pytest

from mmchat import limits
from mmchat.engine.room import DEVICE_ROWS, Room, device_rows
from mmchat.server import ask, pictures
from mmchat.server.app import ROUTES, make_app
from mmchat.server.options import ServerOptions
from mmchat.server.service import Service
from tests.server.asgi import ask as ask_now
from tests.server.asgi import call, scope
from tests.server.conftest import about

CHAT = "/v1/chat/completions"
KEYS = {"one": "a-key-of-somebody-1", "two": "a-key-of-another-22"}


class Endless:
    """The processor of a model whose answers end at max_tokens alone."""

    stop_ids = frozenset()

    def __init__(self, processor):
        self._processor = processor

    def __getattr__(self, name):
        return getattr(self._processor, name)


@pytest.fixture
def serve(tiny):
    """A function that makes a service of such a model."""
    made = []

    def make(**options) -> Service:
        service = Service(ServerOptions(**{"rows": 1, **options}))
        service.use(replace(tiny, processor=Endless(tiny.processor)))
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


def body(count: int = 30, **more) -> list[bytes]:
    """A question with an answer of so many tokens."""
    asked = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **more}
    return [json.dumps({**asked, "max_tokens": count}).encode()]


def question(key: str = "") -> dict:
    return scope("POST", CHAT, [("x-api-key", KEYS[key])] if key else ())


async def until(condition: Callable[[], bool]) -> None:
    """Until another thread has done something."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def begin(app, count: int, *, key: str = "", gone=None, **more) -> asyncio.Task:
    return asyncio.ensure_future(call(app, question(key), body(count, **more), gone))


# ---- the client goes


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(serve, stream):
    service = serve()

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        first = begin(app, 2_000, gone=gone, stream=stream)
        await until(lambda: service.all[0].engine.running == 1)
        waiting_gone = asyncio.Event()
        waiting = begin(app, 5, gone=waiting_gone, stream=stream)
        third = begin(app, 5)
        await until(lambda: service.all[0].engine.waiting == 2)
        waiting_gone.set()  # ik_llama#1929: this must not stop the one that runs
        await waiting
        await until(lambda: service.all[0].engine.waiting == 1)
        assert service.all[0].engine.running == 1
        gone.set()
        await first
        assert (await third).json()["usage"]["completion_tokens"] == 5
        await until(lambda: not service.all[0].engine.has_work)
        assert not service.is_busy
        assert service.held_bytes == 0

    asyncio.run(run())
    assert service.metrics.counts["requests_cancelled_total"] == 2


def test_a_client_that_goes_in_its_upload_or_before_its_prompt_is_forgotten(serve, monkeypatch):
    service = serve()

    async def run() -> None:
        app = make_app(service)

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError("nobody is there")

        await app(question(), receive, send)
        gone = asyncio.Event()
        gone.set()
        await begin(app, 5, gone=gone)
        assert not service.is_busy

    asyncio.run(run())


# ---- the queue


def test_a_full_queue_says_when_to_come_back_and_only_to_its_owner(serve):
    service = serve(keys=KEYS, queue=1)

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        running = begin(app, 2_000, key="one", gone=gone)
        waiting = begin(app, 5, key="one")
        await until(lambda: service.all[0].engine.running + service.all[0].engine.waiting == 2)
        refused = await begin(app, 5, key="one")
        assert refused.status == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        other = begin(app, 5, key="two")
        await until(lambda: service.all[0].engine.waiting == 2)
        gone.set()
        await running
        assert ((await waiting).status, (await other).status) == (200, 200)

    asyncio.run(run())


def test_who_waits_too_long_is_told(serve, monkeypatch):
    service = serve()

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        running = begin(app, 2_000, gone=gone)
        await until(lambda: service.all[0].engine.running == 1)
        monkeypatch.setattr(ask, "QUEUE_SECONDS", 0.05)
        refused = await begin(app, 5, stream=True)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"]
        gone.set()
        await running

    asyncio.run(run())


def test_bodies_that_wait_are_bounded_together(serve, monkeypatch):
    monkeypatch.setattr(limits, "QUEUED_BYTES", 3 * len(body(2_000)[0]))
    service = serve()

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        running = begin(app, 2_000, gone=gone)
        await until(lambda: service.all[0].engine.running == 1)
        waiting = [begin(app, 2_000, gone=gone) for _ in range(3)]
        await until(lambda: service.all[0].engine.waiting == 3)
        refused = await begin(app, 2_000)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        gone.set()
        await asyncio.gather(running, *waiting)
        assert service.held_bytes == 0

    asyncio.run(run())


def test_memory_for_three_writes_three_at_once(serve):
    positions = 256  # of one such request, rounded up
    one = serve().all[0].model.position_bytes * positions
    service = serve(rows=8, kv_memory=3 * one)
    most = 0

    async def run() -> None:
        nonlocal most
        app = make_app(service)
        tasks = [begin(app, 20, seed=i) for i in range(10)]
        while not all(task.done() for task in tasks):
            most = max(most, service.all[0].engine.running)
            await asyncio.sleep(0.002)
        assert [task.result().status for task in tasks] == [200] * 10
        refused = await begin(app, 1_500)
        assert (refused.status, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "ask for a shorter answer (max_tokens), " in refused.json()["error"]["message"]
        for path, asked, field in (
            ("/v1/responses", {"input": "x", "max_output_tokens": 1_500}, "max_output_tokens"),
            ("/api/generate", {"prompt": "x", "options": {"num_predict": 1_500}}, "num_predict"),
        ):
            sent = json.dumps({"model": "tiny", **asked}).encode()
            told = (await call(app, scope("POST", path), [sent])).body.decode()
            assert f"ask for a shorter answer ({field}), " in told

    asyncio.run(run())
    assert 1 < most <= 3


# ---- the end


def test_a_drain_lets_answers_end_and_begins_none(serve):
    service = serve()

    async def run() -> None:
        app = make_app(service)
        running = begin(app, 60, stream=True)
        await until(lambda: service.all[0].engine.running == 1)
        waiting = begin(app, 5, stream=True)
        await until(lambda: service.all[0].engine.waiting == 1)
        service.drain()
        for refused in (await waiting, await begin(app, 5)):
            assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"]
            assert refused.headers["x-should-retry"] == "false"
        assert (await call(app, scope("GET", "/health"))).json() == {"status": "draining"}
        answer = await running
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert answer.body.count(b'"finish_reason":"length"') == 1

    asyncio.run(run())


def test_who_is_still_prepared_when_a_drain_begins_is_not_begun(serve, monkeypatch):
    service = serve()
    prompt = ask.prompt_of

    def drains(*given):
        service.is_draining = True
        return prompt(*given)

    monkeypatch.setattr(ask, "prompt_of", drains)
    refused = asyncio.run(call(make_app(service), question(), body()))
    assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
    assert not service.is_busy


def test_what_is_not_ready_after_a_drain_ends_as_far_as_it_is(serve):
    service = serve()

    async def run() -> None:
        app = make_app(service)
        running = begin(app, 2_000, stream=True)
        await until(lambda: service.all[0].engine.running == 1)
        whole = begin(app, 2_000)
        await until(lambda: service.all[0].engine.waiting == 1)
        service.drain()
        service.interrupt()
        answer = await running
        assert answer.body.count(b'"finish_reason":"length"') == 1
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert (await whole).status == 503

    asyncio.run(run())


def test_while_the_model_is_loaded_it_says_so():
    """CVE-2026-114051: a server that cannot answer must not look healthy."""
    app = make_app(Service(ServerOptions()))
    assert ask_now(app, "GET", "/health").status == 503
    assert ask_now(app, "GET", "/health").json() == {"status": "loading"}
    beside = {"/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}
    for method, path, _ in ROUTES:
        if path == "/api/version":
            continue
        body = {
            "messages": [],
            "image_url": "x",
            "model": "x",
            **beside.get(f"/v1{path.removeprefix('/v1')}", {}),
        }
        refused = ask_now(app, method, path, body=body)
        assert refused.status == 503, path
        assert refused.headers["retry-after"]


def test_the_end_of_the_engine_is_seen_by_all(serve, monkeypatch):
    service = serve()

    async def run() -> None:
        app = make_app(service)
        running = begin(app, 2_000, stream=True)
        await until(lambda: service.all[0].engine.running == 1)

        def fails() -> bool:
            raise RuntimeError("0x7ffdeadbeef /home/somebody")

        monkeypatch.setattr(service.all[0].engine, "step", fails)
        answer = await running
        event = answer.body.decode().strip().rpartition("data: ")[2]
        assert json.loads(event)["error"]["code"] == "server_error"
        assert "0x7f" not in answer.body.decode()
        assert service.failure is not None
        health = await call(app, scope("GET", "/health"))
        assert (health.status, health.json()) == (503, {"status": "dead"})
        assert (await begin(app, 5)).status == 500

    asyncio.run(run())


def test_a_step_that_hangs_while_others_wait_is_no_health(serve, monkeypatch):
    service = serve()
    assert service.status == "ok"
    monkeypatch.setattr(service.all[0].engine, "is_stalled", lambda seconds: seconds <= 300)
    assert service.status == "stalled"


def test_a_body_is_counted_while_it_comes(serve, monkeypatch):
    monkeypatch.setattr(limits, "QUEUED_BYTES", 2_500)
    service = serve()

    async def run() -> None:
        app, more = make_app(service), asyncio.Event()

        async def slowly():
            await more.wait()
            return {"type": "http.disconnect"}

        async def uploads() -> None:
            parts = iter([b" " * 1_000] * 2)

            async def receive():
                for part in parts:
                    return {"type": "http.request", "body": part, "more_body": True}
                return await slowly()

            async def send(message):
                raise AssertionError("nobody is there")

            await app(question(), receive, send)

        first = asyncio.ensure_future(uploads())
        await until(lambda: service.held_bytes == 2_000)
        refused = await call(app, question(), [b" " * 400, b" " * 400])
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert service.held_bytes == 2_000
        more.set()
        await first
        assert service.held_bytes == 0

    asyncio.run(run())


def test_the_tiles_of_the_page_are_requests_like_others(serve, dog):
    service = serve(queue=0)
    asked = scope("POST", "/page/tiles"), [json.dumps({"image_url": dog}).encode()]

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        running = begin(app, 2_000, gone=gone)
        await until(lambda: service.all[0].engine.running == 1)
        assert (await call(app, *asked)).status == 429
        gone.set()
        await running
        assert (await call(app, *asked)).status == 200
        service.drain()
        refused = await call(app, *asked)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
        assert not service.is_busy

    asyncio.run(run())


def test_the_tiles_of_the_page_have_a_deadline(serve, slow, dog, monkeypatch):
    service = serve()
    monkeypatch.setattr(ask, "QUEUE_SECONDS", 0.05)
    asked = scope("POST", "/page/tiles"), [json.dumps({"image_url": dog}).encode()]
    refused = asyncio.run(call(make_app(service), *asked))
    slow.go.set()
    assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
    assert not service.is_busy


def test_ollama_says_503_where_too_many_wait(serve):
    service = serve(queue=0)
    asked = json.dumps({"model": "tiny", "prompt": "Hello"}).encode()

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        running = begin(app, 2_000, gone=gone)
        await until(lambda: service.all[0].engine.running == 1)
        refused = await call(app, scope("POST", "/api/generate"), [asked])
        assert (refused.status, refused.json()) == (
            503,
            {"error": "too many requests wait already"},
        )
        assert "retry-after" in refused.headers
        gone.set()
        await running

    asyncio.run(run())


def test_only_clients_that_go_are_counted_as_gone_and_once(serve, monkeypatch):
    service = serve(rows=2)
    prompts = json.dumps({"prompt": ["a", "b"], "max_tokens": 1_500}).encode()

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        both = call(app, scope("POST", "/v1/completions"), [prompts], gone)
        running = asyncio.ensure_future(both)
        await until(lambda: service.all[0].engine.running == 2)
        monkeypatch.setattr(ask, "QUEUE_SECONDS", 0.05)
        assert (await begin(app, 5)).status == 503  # it waited too long
        monkeypatch.setattr(ask, "QUEUE_SECONDS", 60)
        waiting = begin(app, 5)
        await until(lambda: service.all[0].engine.waiting == 1)
        service.drain()
        assert (await waiting).status == 503
        gone.set()
        await running

    asyncio.run(run())
    assert service.metrics.counts["requests_cancelled_total"] == 1


@pytest.fixture
def slow(monkeypatch):
    """Pictures are read when it is set; read: how many were."""
    slow = SimpleNamespace(go=Event(), read=0)
    read = pictures._read

    def reads(*given):
        slow.read += 1
        assert slow.go.wait(20)
        return read(*given)

    monkeypatch.setattr(pictures, "_read", reads)
    yield slow
    slow.go.set()


def test_who_sends_no_picture_waits_for_none(serve, slow, dog):
    service = serve(rows=4)

    async def run() -> None:
        app = make_app(service)
        shown = [begin(app, 1, **about(dog)) for _ in range(3)]
        await until(lambda: slow.read > 0)
        assert (await asyncio.wait_for(begin(app, 1), 10)).status == 200
        slow.go.set()
        assert {(await one).status for one in shown} == {200}

    asyncio.run(run())


def test_pictures_have_the_deadline_of_their_request(serve, slow, dog, monkeypatch):
    service = serve()

    async def run() -> None:
        app, gone = make_app(service), asyncio.Event()
        twice = about(dog)
        twice["messages"] *= 2
        first = begin(app, 1, gone=gone, **twice)
        await until(lambda: slow.read == 1)
        gone.set()
        await first
        monkeypatch.setattr(ask, "QUEUE_SECONDS", 0.1)
        refused = await begin(app, 1, **twice)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"]
        slow.go.set()
        monkeypatch.setattr(ask, "QUEUE_SECONDS", 60)
        assert (await begin(app, 1, **about(dog))).status == 200  # behind the others
        assert slow.read == 3  # no second one of those that nobody waits for

    asyncio.run(run())


def test_a_first_step_on_a_device_may_compile(serve, monkeypatch):
    service = serve()
    placement = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    [served] = service.all
    service.all = (replace(served, model=replace(served.model, placement=placement)),)
    monkeypatch.setattr(service.all[0].engine, "is_stalled", lambda seconds: seconds <= 30)
    assert service.status == "ok"
    service.metrics.counts["generation_tokens_total"] += 1  # an answer is there
    assert service.status == "stalled"


@pytest.mark.parametrize("gigabytes", [0.1, 1, 15, 100])
def test_a_device_has_rows_for_the_longest_request(tiny, gigabytes):
    """All its rows grow together: 64 of them left too little for one of the whole context."""
    memory = int(gigabytes * 2**30)
    model = replace(tiny, max_seq_len=131_072)
    rows = device_rows(model, memory)
    picture = model.media_bytes(model.spec.family.sizes(model.spec.config).largest_picture)

    def need(rows: int) -> int:
        cache, prefixes = SimpleNamespace(fixed=True), SimpleNamespace(slots=[None] * rows)
        room = Room(cache, prefixes, model, memory)
        need = replace(room._need(longest), together=picture)
        return room._bytes([need], {"a": picture})

    sampling = SimpleNamespace(max_new_tokens=model.max_seq_len - 10)
    prompt = SimpleNamespace(token_ids=range(10), media=())
    longest = SimpleNamespace(prompt=prompt, sampling=sampling)
    assert 1 <= rows <= DEVICE_ROWS
    assert rows == 1 or need(rows) <= memory
    assert rows == DEVICE_ROWS or need(rows + 1) > memory
    assert device_rows(model, None) == DEVICE_ROWS
