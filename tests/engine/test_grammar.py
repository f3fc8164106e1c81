"""Answers that obey a schema, by a model that would say anything, and by the built-in one."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmchat
from mmchat import limits
from mmchat.catalog.known import data_path
from mmchat.engine import grammar, row
from mmchat.engine.drafts import Drafter, Pace
from mmchat.engine.driver import run
from mmchat.engine.engine import Engine
from mmchat.engine.grammar import Grammars
from mmchat.engine.request import Request
from mmchat.engine.sampling import SamplingParams
from mmchat.engine.schema import as_text, mapped, moved, places, read
from mmchat.errors import MissingExtra, NumericalError, SchemaError
from mmchat.models.base import Batch
from mmchat.models.prompt import Prompt
from mmchat.tokenizers import open_tokenizer
from tests.fake_model import FakeCache

TOKENIZER = open_tokenizer(data_path("assets/tiny"))
STOPS = frozenset(map(TOKENIZER.special_id, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")))
GRAMMARS = Grammars(TOKENIZER, STOPS, TOKENIZER.vocab_size)
CAT = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["animal", "count"],
    "additionalProperties": False,
}


class AnythingGoes:
    """Random logits, the same whenever the same ids were read. reads: tokens of each step."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.reads: list[int] = []
        self.change: Any = lambda logits: logits

    def new_cache(self, slots: int, positions: int) -> FakeCache:
        return FakeCache(slots)

    def forward(self, batch, cache):
        ids = batch.token_ids.tolist()
        self.reads.append(len(ids))
        logits = torch.empty(len(ids), TOKENIZER.vocab_size)
        for one in batch.rows():
            for at in range(one.offset, one.offset + one.count):
                cache.rows[one.slot].append(ids[at])
                seed = hash(tuple(cache.rows[one.slot])) % 2**31
                generator = torch.Generator().manual_seed(seed)
                logits[at] = 3 * torch.randn(TOKENIZER.vocab_size, generator=generator)
        return self.change(logits)[list(batch.wanted)]


def anything_goes() -> Any:
    return SimpleNamespace(
        runtime=AnythingGoes(),
        processor=SimpleNamespace(stop_ids=STOPS),
        tokenizer=TOKENIZER,
        vocab_size=TOKENIZER.vocab_size,
        peak_memory=lambda: 1,
    )


def request(schema: Any, prompt: int = 1, **sampling: Any) -> Request:
    """Of a random answer, at most 3,000 tokens long."""
    params = SamplingParams(**{"temperature": 1.0, "seed": 3, "max_new_tokens": 3_000, **sampling})
    compiled = None if schema is None else GRAMMARS.compile(schema)
    return Request(Prompt((prompt, 2, 3)), params, grammar=compiled)


def answers(*requests: Request, model: Any = None) -> list[Any]:
    engine = Engine(model or anything_goes(), rows=len(requests))
    going = [engine.submit(one) for one in requests]
    while engine.step():
        pass
    return [answer.finished or answer.error for answer in going]


# ---- what is said obeys the schema


def obeys(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value does, for the keywords that `schemas` makes."""
    match schema:
        case {"anyOf": choices}:
            return any(obeys(value, choice) for choice in choices)
        case {"enum": values}:
            return any(type(value) is type(one) and value == one for one in values)
        case {"type": "object", "properties": properties, "required": required}:
            return (
                isinstance(value, dict)
                and set(required) <= set(value) <= set(properties)
                and all(obeys(one, properties[name]) for name, one in value.items())
            )
        case {"type": "array", "items": items, "maxItems": most}:
            is_short = isinstance(value, list) and len(value) <= most
            return is_short and all(obeys(one, items) for one in value)
        case {"type": "string", "pattern": pattern}:
            return isinstance(value, str) and re.search(pattern, value) is not None
        case {"type": "string", "maxLength": most}:
            return isinstance(value, str) and len(value) <= most
        case {"type": "integer", "minimum": low, "maximum": high}:
            return type(value) is int and low <= value <= high
    kinds = {"boolean": (bool,), "null": (type(None),), "number": (int, float)}
    return type(value) in kinds[schema["type"]]


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}]),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 9)),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)},
        st.integers(-999, 999),
        st.integers(-999, 999),
    ),
    st.builds(lambda n: {"type": "string", "pattern": f"^[a-f]{{1,{n}}}x?$"}, st.integers(1, 4)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(NAMES | st.integers(-9, 9) | st.booleans() | st.none(), min_size=1, max_size=4),
    ),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], is_required: list[bool]) -> dict[str, Any]:
        pairs = zip(properties, is_required, strict=False)
        return {
            "type": "object",
            "properties": properties,
            "required": [name for name, needed in pairs if needed],
            "additionalProperties": False,
        }

    flags = st.lists(st.booleans(), min_size=4, max_size=4)
    return st.builds(build, st.dictionaries(NAMES, inner, max_size=4), flags)


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda items, n: {"type": "array", "items": items, "maxItems": n},
            inner,
            st.integers(0, 3),
        ),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.7, 3.0]))
def test_whatever_the_model_would_say_the_answer_obeys(schema, seed, temperature):
    [end] = answers(request(schema, seed, seed=seed, temperature=temperature))
    assert end.reason == "stop", end
    assert obeys(json.loads(end.text), schema)
    *said, last = end.output_ids
    assert not any(map(TOKENIZER.is_special, said))
    assert last in STOPS or not TOKENIZER.is_special(last)


@settings(max_examples=20, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 99), length=st.sampled_from([1, 3, 15, "auto"]))
def test_drafts_change_nothing(schema, seed, length):
    asked = request(schema, seed, seed=seed, speculate="off")
    [plain] = answers(asked)
    [drafted] = answers(replace(asked, sampling=replace(asked.sampling, speculate=length)))
    assert drafted.output_ids == plain.output_ids


def test_a_schema_is_compiled_once_for_each_owner_and_the_last_are_kept(monkeypatch):
    count = 0

    def counted(*given):
        nonlocal count
        count += 1
        return compiled(*given)

    compiled = grammar._compiled
    monkeypatch.setattr(grammar, "_compiled", counted)
    grammars = Grammars(TOKENIZER, STOPS, TOKENIZER.vocab_size)
    first = grammars.compile(CAT)
    assert grammars.compile(json.dumps(CAT)) is first
    first.begin().accept(TOKENIZER.encode("{")[0])
    assert first.begin().length is None
    assert grammars.compile(CAT, owner="b") is not first
    assert grammars.compile(CAT, lenient=True) is not first
    assert count == 3
    for value in range(grammar.GRAMMARS_KEPT):
        grammars.compile({"const": value})
    assert grammars.compile(CAT) is not first


def test_text_that_must_come_is_read_in_one_step():
    name = "a_name_that_is_long_and_known"
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"}},
        "required": [name],
        "additionalProperties": False,
    }
    plain, drafted = anything_goes(), anything_goes()

    def writes_canonically(logits):  # as models do: they say known text by its usual tokens
        usual = TOKENIZER.encode(f'{{"{name}":true}}')
        logits[:, usual] += 50
        return logits

    plain.runtime.change = drafted.runtime.change = writes_canonically
    [first] = answers(request(schema, speculate="off", temperature=0.0), model=plain)
    [second] = answers(request(schema, speculate=15, temperature=0.0), model=drafted)
    assert first.output_ids == second.output_ids
    assert len(drafted.runtime.reads) <= len(plain.runtime.reads) / 2


def test_drafts_that_are_cut_have_a_length_that_is_timed():
    ids = list(range(20))
    for speculate, length in (("auto", 7), (20, 9)):
        drafter = Drafter(ids, speculate, Pace(), stop_ids=(), vocab_size=99)
        assert drafter.shortened(ids[:9]) == ids[:length]
        assert drafter.shortened([]) == []


def test_any_filter_and_penalty_leaves_something_that_may_come():
    hard = {"top_k": 1, "top_p": 0.0, "min_p": 1.0, "repetition_penalty": 9.0}
    [end] = answers(request(CAT, **hard, frequency_penalty=2.0, temperature=50.0))
    assert obeys(json.loads(end.text), {**CAT, "properties": _with_minimum(CAT)})


def _with_minimum(schema):
    count = {"type": "integer", "minimum": -(10**18), "maximum": 9}
    return {**schema["properties"], "count": count}


# ---- how an answer ends


def test_a_complete_value_ends_the_answer_without_a_token_that_says_so():
    [end] = answers(request(CAT))
    assert end.reason == "stop"
    assert TOKENIZER.decode([end.output_ids[-1]]).endswith("}")


def test_a_number_ends_where_the_model_ends_it():
    [end] = answers(request({"type": "integer"}))
    assert (end.reason, end.output_ids[-1] in STOPS) == ("stop", True)
    assert str(int(end.text)) == end.text


@pytest.mark.parametrize(
    ("schema", "begin", "token", "is_allowed"),
    [
        ({"type": "number"}, "1e30", "7", True),
        ({"type": "number"}, "1e30", "9", False),
        ({"type": "number"}, "-1e30", "9", False),
        ({"type": "number"}, "1e-30", "9", True),
        ({"type": "number"}, "1E+99", "9", False),
        ({"type": "number"}, "9" * 308, "9", False),
        ({"type": "number"}, "9" * 308, ".", True),
        ({"type": "number"}, "0." + "9" * 500, "9", True),
        ({"type": "number", "minimum": 0}, "9" * 308, "9", False),
        ({"type": "array"}, '["1e999", 1e99', "9", False),
        ({"type": "array"}, '["a\\"b", "1e99', "9", True),
        ({"type": "string"}, '"1e99', "9", True),
    ],
)
def test_a_number_is_finite_when_it_is_read_back(schema, begin, token, is_allowed):
    guide = GRAMMARS.compile(schema).begin()
    for token_id in TOKENIZER.encode(begin):
        assert guide.allowed()[token_id]
        guide.accept(token_id)
    [token_id] = TOKENIZER.encode(token)
    assert bool(guide.allowed()[token_id]) is is_allowed


def test_a_text_beside_a_schema_says_any_number():
    guide = GRAMMARS.compile(CAT, or_text=True).begin()
    for token_id in TOKENIZER.encode("It is 1e999"):
        assert guide.allowed()[token_id]
        guide.accept(token_id)


@pytest.mark.parametrize("said", ["9", "e9"])
def test_a_model_that_says_no_end_of_digits_gives_a_finite_number(said):
    model = anything_goes()
    often = torch.tensor([ids[0] for one in said if (ids := TOKENIZER.encode(one))])
    model.runtime.change = lambda logits: logits.index_add(
        1, often, torch.full((len(logits), len(often)), 30.0)
    )
    [end] = answers(request({"type": "number"}), model=model)
    assert math.isfinite(json.loads(end.text))


def test_an_answer_that_is_cut_is_no_whole_value():
    [end] = answers(request({"type": "array", "minItems": 99}, max_new_tokens=5))
    assert (end.reason, len(end.output_ids)) == ("length", 5)


def test_a_schema_that_nothing_obeys_ends_its_row_alone():
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    plain = request(None, 7, max_new_tokens=30)
    later = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}
    failed, end = answers(request(later), plain)
    assert isinstance(failed, SchemaError)
    assert end.output_ids == answers(plain)[0].output_ids
    [end] = answers(request(endless, max_new_tokens=20))
    assert end.reason == "length"


def test_nan_is_found_though_all_but_few_tokens_are_left_out():
    model = anything_goes()
    model.runtime.change = lambda logits: logits.index_fill(1, torch.tensor([0]), torch.nan)
    [error] = answers(request(CAT), model=model)
    assert isinstance(error, NumericalError)


def test_log_probabilities_are_of_the_model_and_not_of_the_schema():
    model = anything_goes()
    [end] = answers(request(CAT, logprobs=2), model=model)
    cache = FakeCache()
    cache.rows[0] = []
    ids = [*Prompt((1, 2, 3)).token_ids, *end.output_ids]
    fresh = AnythingGoes()
    logits = fresh.forward(Batch.all_of(torch.tensor(ids), 0), cache)
    scores = logits.log_softmax(-1)
    for at, entry in enumerate(end.logprobs):
        assert entry.logprob == pytest.approx(float(scores[2 + at, entry.token_id]), abs=1e-5)
        assert [top for top, _ in entry.top] == scores[2 + at].topk(2).indices.tolist()


# ---- beside others, and on other devices


@pytest.mark.parametrize("speculate", ["off", 3])
def test_a_row_says_the_same_beside_one_with_a_schema(speculate):
    plain = request(None, 7, max_new_tokens=40, temperature=0.0, speculate=speculate)
    bound = request(CAT, temperature=0.0, speculate=speculate)
    alone = [answers(one)[0].output_ids for one in (plain, bound)]
    assert [end.output_ids for end in answers(plain, bound)] == alone


def test_a_device_that_works_by_itself_waits_for_each_token(monkeypatch):
    [plain] = answers(request(CAT))
    monkeypatch.setattr(row, "is_asynchronous", lambda device: True)
    [end] = answers(request(CAT))
    assert end.output_ids == plain.output_ids


def test_the_built_in_model_obeys_beside_a_row_that_says_what_it_says_alone():
    model = mmchat.load("tiny", dtype="float32")
    params = SamplingParams(temperature=0.0, max_new_tokens=40)
    prompts = [
        model.processor.chat([mmchat.Message("user", (mmchat.Text(text),))])
        for text in ("What do you see?", "Name an animal.")
    ]
    free = model.request(prompts[0], params)
    bound = model.request(prompts[1], replace(params, schema=CAT, max_new_tokens=200))
    [*_, (_, alone)] = run(model.engine, [model.engine.submit(free)])
    engine = Engine(model, rows=2)
    going = [engine.submit(one) for one in (free, bound)]
    while engine.step():
        pass
    assert going[0].finished.output_ids == alone.output_ids
    assert json.loads(going[1].finished.text)["animal"] in ("cat", "dog")


# ---- schemas


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"properties": {"a": {"not": {}}}},
            'properties.a: "not" cannot be enforced; leave it out',
        ),
        ({"items": {"uniqueItems": True}}, 'items: "uniqueItems" cannot be enforced; leave it out'),
        ({"anyOf": [{}, {"if": {}}]}, 'anyOf[1]: "if" cannot be enforced; leave it out'),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"b": {"contains": {}}}}}},
            "'$defs'.A.properties.b: \"contains\" cannot be enforced; leave it out",
        ),
        (
            {"$ref": "#/$defs/A", "$defs": {"A": {"items": {"$ref": "#/$defs/A"}, "not": {}}}},
            "'$defs'.A: \"not\" cannot be enforced; leave it out",
        ),
        ({"properties": {"a/b~": {"type": "no"}}}, "properties.'a/b~': Invalid type: no; change"),
        ({"format": "iri", "type": "string"}, "Unknown format: iri; change that"),
        ({"type": "string", "pattern": "(?=x)a"}, "regex parse error: look-around"),
        ({"type": "string", "pattern": "("}, "regex parse error: unclosed group"),
        ({"$ref": "http://a.b/c"}, "$ref to http://a.b/c; only places of the schema (#/…) can be"),
        ({"anyOf": [{"$ref": "#/x"}]}, "anyOf[0]: $ref to #/x, which is not there"),
        ({"$ref": "#"}, "no text obeys it"),
        (
            {
                "items": {},
                "$ref": "#/$defs/A",
                "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}] * 2}},
            },
            "'$defs'.A: no text obeys it",
        ),
        ({"minimum": 5, "maximum": 3, "type": "integer"}, "Unsatisfiable schema: minimum (5)"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name_and_place(schema, message):
    for refuse in (grammar.check, GRAMMARS.compile):
        with pytest.raises(SchemaError) as caught:
            refuse(schema)
        assert str(caught.value).startswith(f"schema: {message}")
        assert "\n" not in str(caught.value)


def test_what_cannot_be_enforced_can_be_left_out_and_is_said():
    compiled = GRAMMARS.compile({"type": "array", "uniqueItems": True}, lenient=True)
    assert compiled.notices == ('"uniqueItems" is not enforced',)


def deep(levels: int) -> dict[str, Any]:
    return {"items": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([1], "must be a dictionary or JSON text, not list"),
        (True, "must be a dictionary or JSON text, not bool"),
        ("[]", "expected an object, found a list"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice in one object"),
        ({"maximum": float("nan")}, "cannot be written as JSON"),
        ({"const": {1, 2}}, "cannot be written as JSON"),
        ({"enum": ["\ud800"]}, r"holds \ud800 alone, half of a pair, which is no character"),
        (r'{"const": "\uDC00x"}', r"holds \udc00 alone, half of a pair"),
        (deep(40), "nested more than 32 levels deep"),
        ({"enum": ["x" * 70_000]}, "70,013 bytes; at most 65,536 are possible"),
    ],
)
def test_what_is_no_schema_is_refused(schema, message):
    with pytest.raises(SchemaError, match=f"^schema: {re.escape(message)}"):
        SamplingParams(schema=schema)


def test_compiling_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(limits, "SCHEMA_SECONDS", 0.0)
    with pytest.raises(SchemaError, match=r"takes longer than 0 s to compile; simplify it"):
        GRAMMARS.compile({"enum": [f"value {number}" for number in range(4_000)]})


def test_a_grammar_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "GRAMMAR_SYMBOLS", 10)
    with pytest.raises(SchemaError, match=r"grammar size .* too big"):
        GRAMMARS.compile({**CAT, "minProperties": 2})  # which nobody compiled before


def test_schemas_of_any_kind_are_kept_as_their_text():
    class Described:
        @staticmethod
        def model_json_schema():
            return CAT

    text = json.dumps(CAT, indent=2)
    kinds = [SamplingParams(schema=one) for one in (CAT, text, Described)]
    assert kinds[0] == kinds[1] == kinds[2]
    assert hash(kinds[0]) == hash(kinds[1])
    assert json.loads(kinds[0].schema) == CAT
    assert list(json.loads(kinds[0].schema)["properties"]) == ["animal", "count"]


@pytest.mark.parametrize(("gap", "is_legal"), [("", 1), (" ", 1), ("\n    ", 1), ("  ", 0)])
def test_gaps_are_a_space_or_an_indentation(gap, is_legal):
    """Small models fill wider ones with spaces."""
    matcher = GRAMMARS.compile(CAT).matcher
    tokens = TOKENIZER.encode(f'{{{gap}"animal":{gap}"cat"')
    assert (matcher.validate_tokens(tokens) == len(tokens)) == bool(is_legal)


def test_what_says_nothing_is_no_reason_to_refuse():
    [end] = answers(request({"type": "array", "items": CAT, "uniqueItems": False}))
    assert json.loads(end.text) is not None


def test_an_anchor_stays_when_a_schema_is_put_into_another():
    given = {"$ref": "#b", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$anchor": "b", **CAT}}}
    put = moved(given, ("anyOf", 0))
    assert put["$ref"] == "#b"
    assert put["$defs"]["A"]["$ref"] == "#/anyOf/0/$defs/B"
    [end] = answers(request({"anyOf": [put]}))
    assert json.loads(end.text)


def test_settings_of_the_library_are_taken_out_wherever_it_would_read_them():
    theirs = {"x-guidance": {"key_separator": "="}}
    given = {**CAT, **theirs, "$defs": {"a": {**theirs, "const": theirs}}}
    assert json.loads(as_text(given)) == {**CAT, "$defs": {"a": {"const": theirs}}}
    [end] = answers(request(given))
    assert json.loads(end.text)


@given(SCHEMAS)
def test_walking_a_schema_changes_nothing_and_misses_nothing(schema):
    before = json.dumps(schema)
    seen = []
    assert mapped(schema, lambda one: seen.append(one) or one) == schema
    assert json.dumps(schema) == before
    assert len(seen) == len(list(places(schema)))


def test_a_schema_is_read_from_a_file_or_an_argument(tmp_path):
    file = tmp_path / "cat.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(CAT, indent=1).encode())
    assert read(str(file)) == read(json.dumps(CAT)) == as_text(CAT)
    file.write_text("{")
    with pytest.raises(SchemaError, match=r"cat\.json: not valid JSON"):
        read(str(file))
    with pytest.raises(SchemaError, match=r"gone\.json: no such file"):
        read(str(tmp_path / "gone.json"))
    with pytest.raises(SchemaError, match=r"the schema is empty; give JSON that begins with"):
        read(" ")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmchat\[server\]'"):
        grammar.check(CAT)


# ---- text or a value


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("A dog { and } a cat.\n\n{}", True),
        ("\n {", False),
        ('{"animal":"cat","count":1}', True),
        ('{"animal":"cow"', False),
    ],
)
def test_an_answer_may_be_text_or_obey(text, fits):
    guide = GRAMMARS.compile(CAT, or_text=True).begin()
    ids = TOKENIZER.encode(text)
    assert (guide.valid(ids) == ids) is fits
