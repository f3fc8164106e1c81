"""Answers held to a schema, and calls of tools, through the routes and by the clients."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import weakref
from enum import Enum

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from mmchat.conversation import Message, Text, ToolCall
from mmchat.engine.grammar import Guide
from mmchat.errors import SchemaError
from mmchat.server import ask, held
from mmchat.server.app import make_app
from mmchat.server.ask import AskedMessage
from mmchat.server.call import Call
from mmchat.server.errors import ApiError
from mmchat.server.stream import notice_header
from mmchat.server.tool_calls import CallStream
from tests.server.conftest import about
from tests.server.test_openai_chat import CHAT, events

MODEL = "tiny"
USER = {"role": "user", "content": "What is in this picture?"}
HOT = {"temperature": 1.5, "seed": 1}


class Animal(Enum):
    CAT = "cat"
    DOG = "dog"


class Seen(BaseModel, extra="forbid"):
    """As people write them: an enum by $ref, an optional by anyOf, a list."""

    animal: Animal
    is_alone: bool
    count: int | None = Field(ge=0, le=9)
    tags: list[Animal] = Field(max_length=2)


SEEN = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "is_alone": {"type": "boolean"}},
    "required": ["animal", "is_alone"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
}


def function(name="weather", **more):
    return {"type": "function", "function": {"name": name, "parameters": CITY, **more}}


def form(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, **more}}


def post(client, status=200, path=CHAT, **body):
    response = client.post(path, json={"messages": [USER], "max_tokens": 300, **HOT, **body})
    assert response.status_code == status, response.text
    return response


def choice(response):
    return response.json()["choices"][0]


@pytest.fixture
def says(monkeypatch):
    """Let the model say a text, in pieces of `size` characters."""

    def say(text, size=3):
        async def coming(self):
            async for _ in real(self):
                pass
            for at in range(0, len(text), size):
                yield text[at : at + size], []

        real = ask.Answering.__aiter__
        monkeypatch.setattr(ask.Answering, "__aiter__", coming)

    return say


# ---- schemas ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_openai_parse_gives_what_the_class_says(theirs, dog):
    messages = about(dog)["messages"]
    for seed in range(3):
        asked = {"model": MODEL, "messages": messages, "temperature": 1.5, "seed": seed}
        answer = theirs.chat.completions.parse(**asked, response_format=Seen)
        assert isinstance(answer.choices[0].message.parsed, Seen)
        assert answer.choices[0].finish_reason == "stop"
    with theirs.chat.completions.stream(**asked, response_format=Seen) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_openai_responses_parse_gives_what_the_class_says(theirs):
    asked = {"model": MODEL, "input": "Hello", "temperature": 1.5, "extra_body": {"seed": 1}}
    assert isinstance(theirs.responses.parse(**asked, text_format=Seen).output_parsed, Seen)
    with theirs.responses.stream(**asked, text_format=Seen) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Seen)


@pytest.mark.parametrize(
    "response_format",
    [form(SEEN), form(SEEN, strict=True), {"type": "json_object", "schema": SEEN}],
)
def test_every_form_of_a_schema_holds_whole_and_streamed(client, response_format):
    whole = choice(post(client, response_format=response_format))
    assert whole["finish_reason"] == "stop"
    assert json.loads(whole["message"]["content"]).keys() == {"animal", "is_alone"}
    chunks = events(post(client, response_format=response_format, stream=True))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["message"]["content"]


@pytest.mark.slow
def test_any_json_is_an_object_as_far_as_it_goes(client):
    whole = choice(post(client, response_format={"type": "json_object"}))
    text = whole["message"]["content"]
    assert text.startswith("{")
    if whole["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


NOT_POSSIBLE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
LARGE = {"enum": ["x" * 70_000]}
LONG_REASON = {"type": "integer", "multipleOf": 1e300}


@pytest.mark.parametrize(
    "schema", [NOT_POSSIBLE, LARGE, {"type": "thing"}, {"$ref": "http://a/b"}, LONG_REASON]
)
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, lambda s: {"response_format": form(s)}, "response_format.json_schema.schema"),
        (
            CHAT,
            lambda s: {"response_format": {"type": "json_object", "schema": s}},
            "response_format.schema",
        ),
        (
            "/v1/responses",
            lambda s: {
                "input": "a",
                "text": {"format": {"type": "json_schema", "name": "a", "schema": s}},
            },
            "text.format.schema",
        ),
    ],
)
def test_a_schema_that_cannot_hold_is_refused_by_its_field(client, schema, path, body, param):
    error = post(client, 400, path, **body(schema)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_schema", param)
    assert error["message"].startswith(param)
    assert len(error["message"]) < 300
    if schema is NOT_POSSIBLE:
        assert 'properties.a: "uniqueItems" cannot be enforced' in error["message"]
    if schema is LARGE:
        assert "at most 65,536" in error["message"]


def test_a_schema_that_is_not_strict_is_followed_as_far_as_it_can_be(client):
    response = post(client, response_format=form(NOT_POSSIBLE, strict=False), max_tokens=5)
    assert "uniqueItems" in response.headers["x-mmchat-notice"]
    assert "x-mmchat-notice" not in post(client, response_format=form(SEEN)).headers


def test_a_notice_is_one_line_whatever_the_schema_says():
    [text] = notice_header(["a\r\nb: c", "é🙂" * 1_000]).values()
    assert text.startswith("a  b: c; \\xe9\\U0001f642")
    assert text.isprintable()
    assert len(text) == 1_000
    [text] = notice_header([" a", "x" * 995 + " b"]).values()
    assert text == "a; " + "x" * 995  # no header may begin or end with a space
    assert notice_header([]) == notice_header(["\0"]) == {}


def test_a_schema_that_fails_disturbs_nobody(service):
    async def both():
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def said(**body):
                body = {"messages": [USER], "max_tokens": 60, "temperature": 0, **body}
                return await client.post(CHAT, json=body)

            alone = await said()
            bad = [said(response_format=form(one)) for one in (NOT_POSSIBLE, LARGE) * 3]
            among, *refused = await asyncio.gather(said(stream=True), *bad)
            return alone, among, refused

    alone, among, refused = asyncio.run(both())
    assert {one.status_code for one in refused} == {400}
    chunks = events(among)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == choice(alone)["message"]["content"]


def test_a_grammar_that_breaks_on_the_way_ends_its_own_answer(client, service, monkeypatch):
    def breaks(_):
        raise SchemaError("the schema cannot be followed any further: too complex; change it")

    monkeypatch.setattr(Guide, "allowed", breaks)
    error = post(client, 400, response_format=form(SEEN)).json()["error"]
    assert error["code"] == "invalid_schema"
    assert choice(post(client, max_tokens=3))["message"]["content"]


# ---- tools ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_come_comes_whole_and_streamed(client, tool_choice):
    body = {"tools": [function()], "tool_choice": tool_choice}
    whole = choice(post(client, **body))
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
    [call] = whole["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    first, *chunks, last = [one["choices"][0] for one in events(post(client, **body, stream=True))]
    assert first["delta"]["role"] == "assistant"
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
    [begin], *rest = [chunk["delta"]["tool_calls"] for chunk in chunks]
    assert (begin["index"], begin["type"], begin["function"]["arguments"]) == (0, "function", "")
    arguments = "".join(piece["function"]["arguments"] for [piece] in rest)
    assert arguments == call["function"]["arguments"]


@pytest.mark.slow
def test_openai_clients_read_calls_and_send_back_what_came_of_them(theirs, dog):
    class Weather(BaseModel):
        city: Animal

    tool = openai.pydantic_function_tool(Weather, name="weather")
    asked = {
        "model": MODEL, "messages": about(dog)["messages"], "tools": [tool], "seed": 3,
        "tool_choice": "required", "temperature": 1.5,
    }  # fmt: skip
    answer = theirs.chat.completions.parse(**asked).choices[0]
    [call] = answer.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with theirs.chat.completions.stream(**asked) as stream:
        [again] = stream.get_final_completion().choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 20}'}
    history = [*asked["messages"], answer.message, result]
    after = {**asked, "messages": history, "tool_choice": "auto"}
    assert theirs.chat.completions.create(**after).choices[0].message.content


CALL = '{"name": "weather", "parameters": {"city": "Rome"}}'


@pytest.mark.parametrize("size", [1, 3, 1_000])
def test_what_the_model_says_by_itself_may_be_a_call(client, says, size):
    says(f"I look. {CALL}; {CALL}", size)
    whole = choice(post(client, tools=[function()]))
    assert whole["finish_reason"] in ("tool_calls", "length")  # as the real answer ended
    assert whole["message"]["content"] == "I look. "
    assert len(whole["message"]["tool_calls"]) == 2
    once = choice(post(client, tools=[function()], parallel_tool_calls=False))
    assert len(once["message"]["tool_calls"]) == 1
    assert once["finish_reason"] == "tool_calls"
    none = choice(post(client, tools=[function()], tool_choice="none"))
    assert none["message"]["content"] == f"I look. {CALL}; {CALL}"
    chunks = [one["choices"][0] for one in events(post(client, tools=[function()], stream=True))]
    calls = [one for chunk in chunks for one in chunk["delta"].get("tool_calls", ())]
    for index in (0, 1):
        pieces = [one["function"]["arguments"] for one in calls if one["index"] == index]
        assert json.loads("".join(pieces)) == {"city": "Rome"}
    assert len({one["id"] for one in calls if "id" in one}) == 2


def test_the_engine_writes_no_further_than_is_wanted(service):
    """A row is let go of once the first call is complete, and that counts as no cancel."""
    cancelled = []

    class Answering(ask.Answering):
        def __init__(self):
            self.stream = CallStream(["weather"], parallel=False)

        def end(self):
            cancelled.append(True)

        async def __aiter__(self):
            yield CALL, []
            yield "and more", []

    async def read(answering):
        return [piece async for pieces, _ in answering.pieces() for piece in pieces]

    answering = Answering()
    assert len(asyncio.run(read(answering))) == 2
    said = answering.stream
    assert (said.text, len(said.calls), cancelled) == ("", 1, [True])


def test_an_answer_that_is_ended_is_finished(service):
    async def read():
        call = Call(service, {"type": "http", "path": CHAT}, None)
        asked = ask.Ask(
            (AskedMessage("user", ("Hello",), "messages.0"),),
            {"max_new_tokens": 1_000, "temperature": 1.5, "seed": 1, "min_p": 0.0},
            schema=held.Schema("x", {"type": "string", "minLength": 900}),
        )
        before = service.metrics.counts["requests_cancelled_total"]
        with call.opened:
            answering = await ask.begin(call, asked)
            async for _ in answering:
                answering.end()
            assert service.metrics.counts["requests_cancelled_total"] == before
        return answering.finished

    assert asyncio.run(read()).reason == "interrupted"


def test_what_is_over_is_let_go_at_once(service):
    """Not when Python looks for objects that hold themselves, which it does ever more seldom."""

    async def read():
        call = Call(service, {"type": "http", "path": CHAT}, None)
        asked = ask.Ask((AskedMessage("user", ("Hello",), "messages.0"),))
        with call.opened:
            answering = await ask.begin(call, asked)
            await answering.whole()
        return weakref.ref(answering.request)

    gc.disable()
    try:
        request = asyncio.run(read())
        until = time.monotonic() + 10
        while request() is not None and time.monotonic() < until:  # the engine's thread lets go
            time.sleep(0.01)
        assert request() is None
        with pytest.raises(SchemaError) as caught:
            service.all[0].model.grammars.compile(NOT_POSSIBLE)
        refusal = weakref.ref(caught.value)
        del caught
        assert refusal() is None
    finally:
        gc.enable()


def test_text_by_a_schema_or_a_call(service):
    """With tools beside a schema, either may come, and nothing else."""
    model = service.all[0].model
    plan = held.plan_of([function(strict=True)])
    grammar = held.grammar_of(model, held.Schema("f", {**CITY, "required": []}), plan)

    def fits(text):
        ids = model.tokenizer.encode(text)
        return grammar.begin().valid(ids) == ids

    assert fits(CALL)
    assert fits('{"city": "Oslo"}')
    assert fits("{}")
    assert not fits('{"city": "Paris')
    assert not fits("Hello")
    with pytest.raises(ApiError, match=r"^f\.properties\.a: ") as caught:
        held.grammar_of(model, held.Schema("f", NOT_POSSIBLE), plan)
    assert caught.value.param == "f"
    with pytest.raises(ApiError, match=r"^f: .* at most 65,536") as caught:
        held.grammar_of(model, held.Schema("f", LARGE), plan)
    assert caught.value.param == "f"


def test_earlier_calls_and_their_results_reach_the_prompt(client, service, monkeypatch):
    seen = []
    real = ask.prompt_of
    monkeypatch.setattr(ask, "prompt_of", lambda *given: seen.append(real(*given)) or seen[-1])
    functions = [{"name": "weather", "arguments": '{"city":  "Rome"}'}, {"name": "weather"}]
    made = [{"id": str(n), "type": "function", "function": f} for n, f in enumerate(functions)]
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": made},
        {"role": "tool", "tool_call_id": "0", "content": [{"type": "text", "text": "warm"}]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]
    post(client, messages=history, tools=[function()], max_tokens=1)
    calls = (ToolCall("weather", '{"city":  "Rome"}'), ToolCall("weather"))
    meant = [
        Message("user", (Text(USER["content"]),)),
        Message("assistant", (), calls),
        Message("tool", (Text("warm"),)),
        Message("tool", ()),
    ]
    prompt = service.all[0].model.processor.chat(meant, held.plan_of([function()]).declared)
    assert seen[0].token_ids == prompt.token_ids
    items = [
        {"role": "user", "content": USER["content"]},
        *[
            {"type": "function_call", "call_id": str(n), "id": "fc_1", **f}
            for n, f in enumerate(functions)
        ],
        {"type": "function_call_output", "call_id": "0", "output": "warm"},
        {"type": "function_call_output", "call_id": "1", "output": ""},
    ]
    body = {"input": items, "tools": [function()], "max_output_tokens": 1}
    post(client, path="/v1/responses", **body)
    assert seen[1].token_ids == prompt.token_ids
    objects = [{"function": {**f, "arguments": {"city": "Rome"}}} for f in functions[:1]]
    ollamas = [USER, {"role": "assistant", "tool_calls": objects},
              {"role": "tool", "tool_name": "weather", "content": "warm"}]  # fmt: skip
    body = {"model": MODEL, "messages": ollamas, "options": {"num_predict": 1}}
    post(client, path="/api/chat", **body)
    assert '{"name": "weather", "parameters": {"city": "Rome"}}' in service.all[
        0
    ].model.tokenizer.decode(seen[2].token_ids)


def test_an_input_without_words_is_refused_by_its_own_name(client):
    answer = client.post("/v1/responses", json={"input": [{"type": "reasoning", "summary": []}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input"


BAD_TOOL = function(
    parameters={"type": "object", "properties": {"a": {"pattern": "(?=a)"}}}, strict=True
)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [3]}, "tools.0", "invalid_value"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "tools", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "invalid_value"),
        ({"tools": [function("a b")]}, "tools.0.function.name", "invalid_value"),
        ({"tools": [function()], "tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [function("b"), BAD_TOOL], "tool_choice": "required"},
            "tools.1.function.parameters",
            "invalid_schema",
        ),
        ({"tools": [BAD_TOOL]}, "tools.0.function.parameters", "invalid_schema"),
        (
            {"tools": [function(parameters=LARGE)], "tool_choice": "required"},
            "tools",
            "invalid_schema",
        ),
        (
            {"messages": [{**USER, "tool_calls": [{"function": {"name": "a"}}]}]},
            "messages.0.tool_calls",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages.0.tool_calls.0.function.name",
            "invalid_value",
        ),
    ],
)
def test_tools_that_mean_nothing_are_refused_by_their_field(client, body, param, code):
    error = post(client, 400, **body).json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    if code == "invalid_schema":
        assert error["message"].startswith(param)


@pytest.mark.slow
def test_responses_call_tools_whole_and_streamed(theirs):
    tool = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    asked = {
        "model": MODEL, "input": "Hello", "tools": [tool], "tool_choice": "required",
        "temperature": 1.5, "extra_body": {"seed": 1},
    }  # fmt: skip
    answer = theirs.responses.create(**asked)
    [call] = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    told = list(theirs.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in told]
    while kinds.count("function_call_arguments.delta") > 1:
        kinds.remove("function_call_arguments.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    with theirs.responses.stream(**asked) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "warm"}
    history = [{"role": "user", "content": "Hello"}, call, result]
    assert theirs.responses.create(**asked | {"input": history, "tool_choice": "auto"}).output


def test_responses_may_say_text_and_call(theirs, says):
    says(f"I look. {CALL}")
    tool = {"type": "function", "name": "weather", "parameters": CITY}
    answer = theirs.responses.create(model=MODEL, input="Hello", tools=[tool])
    message, call = answer.output
    assert (message.content[0].text, call.arguments) == ("I look. ", '{"city": "Rome"}')
    assert message.status == "completed"


# ---- Ollama -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ollama_format_holds(their, dog):
    options = {"temperature": 1.5, "seed": 1, "num_predict": 600}
    message = {**USER, "images": [dog.partition(",")[2]]}

    async def work(client):
        said = await client.chat(MODEL, [message], format=Seen.model_json_schema(), options=options)
        parts = await client.chat(MODEL, [message], format=SEEN, options=options, stream=True)
        text = "".join([part.message.content async for part in parts])
        written = await client.generate(MODEL, "Hello", format=SEEN, options=options)
        few = options | {"num_predict": 40}  # any JSON goes on as long as it may
        some = await client.generate(MODEL, "Hello", format="json", options=few)
        return said.message.content, text, written.response, some.response

    said, text, written, some = their(work)
    assert Seen.model_validate_json(said)
    assert json.loads(text).keys() == json.loads(written).keys() == {"animal", "is_alone"}
    assert some.startswith("{")


def test_ollama_leaves_out_of_a_format_what_cannot_be_enforced(client):
    body = {"model": MODEL, "prompt": "Hello", "stream": False}
    body["options"] = {"num_predict": 5, "num_ctx": 10_000_000}
    response = post(client, path="/api/generate", **body, format=NOT_POSSIBLE)
    notice = response.headers["x-mmchat-notice"]
    assert notice.startswith("num_ctx 10000000 is more than")
    assert "uniqueItems" in notice
    refused = post(client, 400, "/api/generate", **body, format={"type": "thing"})
    assert refused.json()["error"].startswith("format: ")
    tools = [{"type": "web_search"}]
    answer = client.post("/api/chat", json={"model": MODEL, "messages": [USER], "tools": tools})
    assert (answer.status_code, answer.json()["error"].split()[0]) == (400, "tools.0")


@pytest.mark.slow
def test_ollama_calls_come_whole_with_objects(their, says):
    def weather(city: str) -> str:
        """The weather in a city."""
        return city

    async def work(client):
        whole = await client.chat(MODEL, [USER], tools=[weather])
        parts = await client.chat(MODEL, [USER], tools=[weather], stream=True)
        return whole, [part async for part in parts]

    says(f"I look. {CALL}; {CALL}")
    whole, parts = their(work)
    assert whole.message.content == "I look. "
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    for found in (whole.message.tool_calls, calls):
        assert [(c.function.name, c.function.arguments) for c in found] == [
            ("weather", {"city": "Rome"})
        ] * 2
    assert "".join(part.message.content for part in parts) == "I look. "
    assert parts[-1].done
    assert parts[-1].done_reason in ("stop", "length")

    for cut, call in ((-6, {}), (-1, {"city": "Rome"})):  # in the arguments, and behind them
        says(f"I look. {CALL[:cut]}")
        whole, parts = their(work)
        found = [one.function.arguments for one in whole.message.tool_calls or ()]
        assert found == ([call] if call else [])
        assert whole.message.content == "I look. " + ("" if call else CALL[:cut])
        assert "".join(part.message.content for part in parts) == whole.message.content
        assert sum(len(part.message.tool_calls or ()) for part in parts) == len(found)

    says('{"name": "weather", "parameters": {oh}}')  # no JSON: said as it is
    whole, parts = their(work)
    assert whole.message.tool_calls is None
    assert "{oh}" in whole.message.content
    assert "".join(part.message.content for part in parts) == whole.message.content
