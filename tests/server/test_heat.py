"""Where an answer looked, over HTTP: beside an answer, and of one that was given before."""

import asyncio
import json
from dataclasses import replace

import pytest

from mmchat.catalog.find import find_model
from mmchat.explain.show import look_record
from mmchat.server import ask
from mmchat.server.app import make_app
from tests.server.asgi import call, scope
from tests.server.conftest import ASSETS, about
from tests.server.test_openai_chat import CHAT, events

ANSWER = "A brown dog."


@pytest.fixture
def earlier(dog):
    return {"messages": about(dog)["messages"], "answer": ANSWER}


def test_it_stands_beside_the_usage_if_asked_for(client, tiny, dog):
    assert "heat" not in client.post(CHAT, json=about(dog)).json()
    heat = client.post(CHAT, json=about(dog, heat=True)).json()["heat"]
    session = tiny.chat()
    list(session.send("What is in this picture?", ASSETS / "dog.jpg"))
    expected = look_record(session.look())
    assert heat["pictures"] == [{k: expected["pictures"][0][k] for k in ("grid", "cell")}]
    assert [word["text"] for word in heat["words"]] == ANSWER.split()
    [brown] = heat["words"][1]["pictures"]
    rows, columns = heat["pictures"][0]["grid"]
    assert (len(brown["heat"]), len(brown["heat"][0])) == (rows, columns)
    assert max(map(max, brown["heat"])) == 1
    assert 0.5 < brown["share"] <= 1


@pytest.mark.parametrize("counts", [False, True])
def test_a_stream_says_it_in_its_last_chunk(client, dog, counts):
    whole = client.post(CHAT, json=about(dog, heat=True)).json()["heat"]
    asked = about(dog, heat=True, stream=True, stream_options={"include_usage": counts})
    *others, last = events(client.post(CHAT, json=asked))
    assert not any("heat" in chunk for chunk in others)
    assert [word["text"] for word in last["heat"]["words"]] == [w["text"] for w in whole["words"]]
    assert bool(last["choices"]) != counts
    assert bool(last.get("usage")) == counts


def test_it_is_no_answer_and_changes_none(client, service, dog):
    plain = client.post(CHAT, json=about(dog)).json()
    before = dict(service.metrics.counts)
    looked = client.post(CHAT, json=about(dog, heat=True)).json()
    assert looked["choices"] == plain["choices"]
    assert looked["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    written = service.metrics.counts["generation_tokens_total"] - before["generation_tokens_total"]
    assert written == looked["usage"]["completion_tokens"]
    assert not service.answers
    assert not service.is_busy


@pytest.mark.parametrize(
    "changed", [{"messages": [{"role": "user", "content": "Hello"}]}, {"stop": ["A"]}]
)
def test_without_pictures_or_words_the_answer_stands(client, dog, changed):
    answer = client.post(CHAT, json=about(dog, heat=True, max_tokens=4) | changed)
    assert answer.status_code == 200
    assert answer.json()["heat"] is None


def test_without_room_for_it_the_answer_stands(client, dog, monkeypatch):
    def full(*_):
        raise ask.ContextLengthExceeded("there is no room")

    monkeypatch.setattr("mmchat.server.heat.look_at", full)
    answer = client.post(CHAT, json=about(dog, heat=True)).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["heat"] is None


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ("family", "has no cross-attention"),
        ("base", "is a base model"),
        ("programs", "programs do not tell"),
    ],
)
def test_models_that_do_not_tell_refuse_before_anything_runs(
    client, service, tiny, earlier, monkeypatch, changed, text
):
    llava = find_model("llava-1.5-7b", checkpoint_required=False).spec
    silent = {
        "family": replace(tiny, spec=llava),
        "base": replace(tiny, spec=replace(tiny.spec, chat_format="base")),
        "programs": replace(tiny, most_rows=1),
    }[changed]
    monkeypatch.setattr(service, "all", (replace(service.all[0], model=silent),))
    monkeypatch.setattr(ask, "open_pictures", None)
    for path, body in ((CHAT, about("", heat=True)), ("/page/heat", earlier)):
        refused = client.post(path, json=body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "heat")
        assert text in error["message"]
    assert client.get("/v1/models").json()["data"][0]["meta"]["heat"] is False


def test_an_earlier_answer_looked_where_it_does_now(client, earlier, dog):
    told = client.post("/page/heat", json=earlier).json()["heat"]
    beside = client.post(CHAT, json=about(dog, heat=True)).json()["heat"]
    assert told["pictures"] == beside["pictures"]
    for one, other in zip(told["words"], beside["words"], strict=True):
        assert (one["start"], one["end"]) == (other["start"], other["end"])
        [a], [b] = one["pictures"], other["pictures"]
        assert a["share"] == pytest.approx(b["share"], abs=1e-3)
    assert client.get("/v1/models").json()["data"][0]["meta"]["heat"] is True


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"answer": None}, "answer"),
        ({"answer": 5}, "answer"),
        ({"answer": " "}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    ],
)
def test_what_is_wrong_is_named(client, earlier, changed, param):
    refused = client.post("/page/heat", json=earlier | changed)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "invalid_value"
    assert param is None or error["param"] == param


def test_half_of_a_surrogate_pair_in_the_answer_is_no_failure(client, earlier):
    body = json.dumps({**earlier, "answer": "A \ud83d dog."})
    words = client.post("/page/heat", content=body).json()["heat"]["words"]
    assert [word["text"] for word in words] == ["A", "\ufffd", "dog."]


def test_numbers_are_bounded(client, earlier, monkeypatch):
    """Words behind the bound are told without heat; half a character is none."""
    [grid] = client.post("/page/heat", json=earlier).json()["heat"]["pictures"]
    assert grid["grid"][0] * grid["grid"][1] <= 40 * 160
    monkeypatch.setattr(ask, "HEAT_NUMBERS", 2_000)
    answer = "A dog \N{DOG} " * 200
    words = client.post("/page/heat", json=earlier | {"answer": answer}).json()["heat"]["words"]
    assert len(words) == 600
    told = [word["pictures"] != [None] for word in words]
    assert 1 <= sum(told) <= 8
    assert told == sorted(told, reverse=True)


@pytest.mark.parametrize("path", [CHAT, "/page/heat"])
def test_it_ends_when_the_client_goes(service, dog, earlier, path, monkeypatch):
    """Its row is free, and nobody is served any more."""
    body = about(dog, heat=True) if path == CHAT else earlier
    looking = []

    async def run() -> None:
        gone = asyncio.Event()
        real = ask.Answering.__init__

        def begun(self, call, thread, request, plan):
            real(self, call, thread, request, plan)
            if request.watch is not None:
                looking.append(self)
                gone.set()

        monkeypatch.setattr(ask.Answering, "__init__", begun)
        data = json.dumps(body).encode()
        await call(make_app(service), scope("POST", path), [data], gone)
        assert len(looking) == 1
        assert looking[0].request.owner == ""
        assert not service.answers
        assert not service.is_busy
        while service.all[0].engine.running:
            await asyncio.sleep(0.005)

    asyncio.run(run())


def test_it_is_a_request_of_its_key_like_others(service, earlier, monkeypatch):
    monkeypatch.setattr(service, "is_draining", True)
    data = json.dumps(earlier).encode()
    asked = scope("POST", "/page/heat", [("content-type", "application/json")])
    refused = asyncio.run(call(make_app(service), asked, [data]))
    assert (refused.status, refused.json()["error"]["code"]) == (503, "draining")
