"""Calls of tools: told from text however it comes, and forced where they must come."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mmchat
from mmchat.conversation import Message, Text, ToolCall
from mmchat.engine.driver import run
from mmchat.engine.sampling import SamplingParams
from mmchat.server.errors import ApiError
from mmchat.server.held import Plan, grammar_of, plan_of
from mmchat.server.tool_calls import (
    CallArguments,
    CallBegin,
    CallStream,
    Content,
)
from tests.kinds import some

NAMES = ("weather", "weather_now", "add")


def function(name="weather", **more):
    return {"type": "function", "function": {"name": name, **more}}


def told(pieces):
    """(content, [(name, arguments)]) of what came out."""
    content, calls = "", []
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case CallBegin(index, _, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    return content, [tuple(call) for call in calls]


def read(text, cuts=(), **options):
    stream = CallStream(NAMES, **options)
    places = [0, *sorted(cuts), len(text)]
    pieces = []
    for start, end in pairwise(places):
        pieces += stream.feed(text[start:end])
    pieces += stream.end()
    assert all(piece.text for piece in pieces if not isinstance(piece, CallBegin))
    return told(pieces), stream


ROME = '{"city": "Rome"}'
CALL = f'{{"name": "weather", "parameters": {ROME}}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [("weather", ROME)]),
        (f"\n {CALL}\n", "", [("weather", ROME)]),
        (CALL.replace("parameters", "arguments"), "", [("weather", ROME)]),
        (CALL.replace('"name"', '"type": "function", "name"'), "", [("weather", ROME)]),
        (CALL.replace(" ", "").replace(":", " :\n "), "", [("weather", '{"city" :\n "Rome"}')]),
        (CALL[:-1] + ', "type": "function", "x": {"y": "}"}}', "", [("weather", ROME)]),
        (CALL[:-1], "", [("weather", ROME)]),
        (f"{CALL}; {CALL}", "", [("weather", ROME)] * 2),
        (f"{CALL}\n{CALL},{CALL}", "", [("weather", ROME)] * 3),
        (f"[{CALL}, {CALL}]", "", [("weather", ROME)] * 2),
        (f"I look. {CALL}", "I look. ", [("weather", ROME)]),
        (f"{CALL}\n\nIt is {{warm}}.", "\n\nIt is {warm}.", [("weather", ROME)]),
        (f"{{{CALL}", "{", [("weather", ROME)]),
        (f'{{"name": {CALL}', '{"name": ', [("weather", ROME)]),
        ('{"name": "add", "parameters": {"a": {"b": ["}"]}, "c": "\\"}"}}', "",
         [("add", '{"a": {"b": ["}"]}, "c": "\\"}"}')]),
        ('{"name": "weather"}', "", [("weather", "{}")]),
        ('{"name": "weather_now", "parameters": {}}', "", [("weather_now", "{}")]),
        ('{"name": "rain", "parameters": {}}', '{"name": "rain", "parameters": {}}', []),
        ('{"name": "weather", "x": 1}', '{"name": "weather", "x": 1}', []),
        ('{"name": "weather", "parameters": "x"}', '{"name": "weather", "parameters": "x"}', []),
        ('{"name": "wea', '{"name": "wea', []),
        ('{"name": "weather", "parameters": {"city": "Ro', "", [("weather", '{"city": "Ro')]),
        ("plain { text }", "plain { text }", []),
        (" [", " [", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_calls_are_told_from_text(text, content, calls):
    found, stream = read(text)
    assert found == (content, calls)
    whole = [ToolCall(name, given) for name, given in calls if given.endswith("}")]
    assert stream.calls == whole[: len(stream.calls)]
    assert stream.finish_reason("stop") == ("tool_calls" if calls else "stop")
    assert stream.finish_reason("length") == "length"
    for cut in range(1, len(text)):
        assert read(text, [cut])[0] == found
    assert read(text, range(len(text)))[0] == found


PIECES = [
    CALL, '{"name": "add", "arguments": {"a": [1, {"b": "}\\"{"}]}}', "{", "}", "; ", ",", "\n",
    "[", "]", '"name"', ":", '"weather"', '"parameters"', " ", "Look: ", '{"name": "', "add", "ü",
    "\\", '{"type": "function", ', '"arguments": {', '"}', "{}",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.data())
@example(CALL + CALL, None)
def test_any_cuts_give_the_same_calls(text, data):
    whole, stream = read(text)
    cuts = [] if data is None else data.draw(st.lists(st.integers(0, len(text)), max_size=9))
    again, other = read(text, cuts)
    assert again == whole
    assert other.calls == stream.calls
    for call in stream.calls:
        assert call.arguments.startswith("{")
        assert call.name in NAMES


def value(draw, depth=0):
    kind = draw.randrange(4 if depth > 2 else 6)
    if kind == 4:
        return [value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if kind == 5:
        return {word(draw): value(draw, depth + 1) for _ in range(draw.randrange(3))}
    return [draw.randrange(99), word(draw), True, None][kind]


def word(draw):
    return "".join(draw.choice('ab {}[]",:;\\\n"é') for _ in range(draw.randrange(6)))


@pytest.mark.parametrize("count", some([1_000, 10_000], [1_000]))
def test_many_answers_with_calls_are_told_right(count):
    draw = random.Random(count)
    separators = ["; ", ";", "\n", ", ", " ", ""]
    for _ in range(count):
        calls, texts = [], []
        for _ in range(draw.randint(1, 3)):
            indent = draw.choice([None, None, 2])
            given = json.dumps(
                {word(draw): value(draw) for _ in range(draw.randrange(4))},
                ensure_ascii=draw.random() < 0.5,
                indent=indent,
            )
            name = draw.choice(NAMES)
            key = draw.choice(["parameters", "arguments"])
            kind = draw.choice(["", '"type": "function", '])
            calls.append((name, given))
            texts.append(f'{{{kind}"name": "{name}", "{key}": {given}}}')
        before = draw.choice(["", "", "Let me look: ", "\n"])
        text = before + draw.choice(separators).join(texts)
        cuts = sorted(draw.randrange(len(text)) for _ in range(draw.randrange(12)))
        found, stream = read(text, cuts)
        assert found == (before.strip() and before, calls)
        assert stream.calls == [ToolCall(*call) for call in calls]


def test_each_character_costs_the_same_however_much_came_before():
    """No text is looked at again: a long one that is held back to its end is read at once."""
    text = '{"name"' + " " * 200_000 + ': "no"}'
    found, _ = read(text, range(0, len(text), 2))
    assert found == (text, [])


def test_only_the_first_call_is_taken_where_one_is_wanted():
    found, stream = read(f"{CALL}; {CALL}", parallel=False)
    assert found == ("", [("weather", ROME)])
    assert stream.is_done
    assert stream.finish_reason("interrupted") == "tool_calls"


def test_arguments_come_as_they_are_written_and_text_at_once():
    stream = CallStream(NAMES)
    assert stream.feed("Sure. ") == [Content("Sure. ")]
    assert stream.feed('{"name": "add", "param') == []
    [begin, first] = stream.feed('eters": {"a"')
    assert (begin.index, begin.name, first) == (0, "add", CallArguments(0, '{"a"'))
    assert re.fullmatch(r"call_\w{24}", begin.id)
    assert stream.feed(": 1}} ") == [CallArguments(0, ": 1}")]
    assert stream.end() == []
    [again, _] = CallStream(NAMES).feed('{"name": "add", "parameters": {')
    assert again.id != begin.id


@pytest.mark.parametrize("text", [
    f"I look. {CALL}", f"[{CALL}]", f"; {CALL}", f"{{{CALL}", f'{{"name": {CALL}', f"\n\n.{CALL}",
])  # fmt: skip
def test_text_that_no_grammar_binds_holds_no_call(text):
    """As where a tool is strict: only an answer that begins as a call is bound."""
    for cuts in ((), range(len(text))):
        found, stream = read(text, cuts, anywhere=False)
        assert found == (text, [])
        assert stream.finish_reason("stop") == "stop"
        assert read(CALL, cuts[: len(CALL)], anywhere=False)[0] == ("", [("weather", ROME)])
    assert read(CALL + text, anywhere=False)[0] == (text, [("weather", ROME)])


def test_without_tools_all_is_content():
    stream = CallStream(())
    assert stream.feed(CALL) == [Content(CALL)]
    assert stream.finish_reason("stop") == "stop"


# ---- what is asked for


def test_tools_are_shown_as_the_template_shows_them():
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    given = function(description="d", parameters=parameters, strict=False, other=1)
    shown = function(description="d", parameters=parameters)
    flat = {"type": "function", "name": "weather", "description": "d", "parameters": parameters}
    for tool in (given, flat):
        assert plan_of([tool]).declared == (shown,)
    assert plan_of([function()]).declared[0]["function"]["parameters"]["type"] == "object"


def test_a_choice_says_what_is_shown_and_what_must_come():
    tools = [function(), function("add")]
    allowed = [{"type": "function", "function": {"name": "add"}}]
    assert plan_of([]) == plan_of(tools, "none") == Plan()
    auto = plan_of(tools)
    assert auto.calls.keys() == {"weather", "add"}
    assert (auto.is_required, auto.is_strict, auto.parallel) == (False, False, True)
    assert plan_of(tools, "auto", False).parallel is False
    must = plan_of(tools, "required")
    assert (len(must.calls), must.is_required) == (2, True)
    assert must.places[1] == "tools.1.function.parameters"
    for choice in (allowed[0], {"type": "function", "name": "add"}):
        assert plan_of(tools, choice).calls.keys() == {"add"}
        assert plan_of(tools, choice).calls["add"]["properties"]["name"]["const"] == "add"
    for inner in ({"mode": "auto", "tools": allowed}, {"mode": "required", "tools": allowed}):
        for choice in (
            {"type": "allowed_tools", "allowed_tools": inner},
            {"type": "allowed_tools", **inner},
        ):
            plan = plan_of(tools, choice)
            assert plan.calls.keys() == {"add"}
            assert plan.is_required == (inner["mode"] == "required")


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "web_search"}], None, "tools.0"),
        ([function(name="a b")], None, "tools.0.function.name"),
        ([function(name="x" * 65)], None, "tools.0.function.name"),
        ([function(), {"type": "function", "name": 3}], None, "tools.1.name"),
        ([{"type": "function"}], None, "tools.0.function"),
        ([{"type": "function", "function": None}], None, "tools.0.function"),
        ([{"type": "function", "function": 5}], None, "tools.0.function"),
        ([{"type": "function", "function": 5, "name": "x"}], None, "tools.0.function"),
        ([{"type": "function", "function": {}}], None, "tools.0.function.name"),
        ([function(parameters=[])], None, "tools.0.function.parameters"),
        ([function(description=3)], None, "tools.0.function.description"),
        ([function(), function()], None, "tools"),
        ([function()], {"type": "function", "function": {"name": "no"}}, "tool_choice"),
        ([], "required", "tool_choice"),
        ([function()], "maybe", "tool_choice"),
        ([function()], {"type": "allowed_tools", "mode": "x", "tools": []}, "tool_choice"),
    ],
)
def test_what_means_nothing_is_refused_by_its_field(tools, choice, param):
    with pytest.raises(ApiError) as caught:
        plan_of(tools, choice)
    assert caught.value.param == param


def test_a_tool_of_responses_without_a_name_lacks_that():
    with pytest.raises(ApiError) as caught:
        plan_of([{"type": "function"}], flat=True)
    assert (caught.value.param, str(caught.value)) == (
        "tools.0.name",
        "tools.0.name: field required",
    )


CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
}
SUM = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
       "required": ["n"], "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return mmchat.load("tiny", dtype="float32")


def asked(model, plan, seed):
    """Pieces of an answer to a question with these tools, and why it ended."""
    message = Message("user", (Text("How warm is it?"),))
    prompt = model.processor.chat([message], tools=plan.declared)
    params = SamplingParams(temperature=1.5, seed=seed, max_new_tokens=600)
    grammar = grammar_of(model, None, plan)
    request = model.request(prompt, params, None, grammar)
    [*_, (_, end)] = run(model.engine, [model.engine.submit(request)])
    stream = plan.stream()
    return [*stream.feed(end.text), *stream.end()], stream.finish_reason(end.reason)


def test_a_call_that_must_come_comes_and_obeys_its_schema(model):
    tools = [function(parameters=CITY), function("add", parameters=SUM)]
    names = set()
    for seed in range(3):
        pieces, reason = asked(model, plan_of(tools, "required"), seed)
        content, [(name, arguments)] = told(pieces)
        assert (content, reason) == ("", "tool_calls")
        names.add(name)
        given = json.loads(arguments)
        assert given["city"] in ("Rome", "Oslo") if name == "weather" else 0 <= given["n"] <= 9
    forced = plan_of(tools, {"type": "function", "function": {"name": "add"}})
    assert told(asked(model, forced, 1)[0])[1][0][0] == "add"


def test_a_strict_tool_is_called_as_declared_or_not_at_all(model):
    plan = plan_of([function(parameters=CITY, strict=True), function("add", parameters=SUM)])
    assert (plan.is_required, plan.is_strict) == (False, True)
    loose = 'I look. {"name": "weather", "parameters": {"city": "Paris"}}'
    assert told(plan.stream().feed(loose)) == (loose, [])
    grammar = grammar_of(model, None, plan)

    def fits(text):
        ids = model.tokenizer.encode(text)
        return grammar.begin().valid(ids) == ids

    assert fits("It is warm { there.")
    assert fits('{"name": "weather", "parameters": {"city": "Rome"}}')
    assert fits('{"name": "add", "parameters": {"anything": []}}')
    assert not fits('{"name": "weather", "parameters": {"city": "Ro"')
    assert not fits('{"name": "rain"')


def test_what_cannot_be_enforced_is_refused_of_strict_tools_alone(model):
    for strict in (False, True):
        tool = function(parameters={"type": "object", "propertyNames": {}}, strict=strict)
        plan = plan_of([tool], "required")
        if not strict:
            assert grammar_of(model, None, plan).notices
            continue
        with pytest.raises(ApiError, match='parameters: "propertyNames" cannot') as caught:
            grammar_of(model, None, plan)
        found = caught.value
        assert (found.code, found.param) == ("invalid_schema", "tools.0.function.parameters")
