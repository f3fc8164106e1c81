import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.errors import CheckpointError, ParamsError, quoted
from mmchat.strict_json import (
    Where,
    escaped,
    nearest,
    parse_dataclass,
    parse_json,
    parse_object,
    read_json,
)

WHERE = Where("x.json")


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["big", "small"]
    inner: Inner
    maybe: Inner | None
    rows: tuple[int, ...]
    pair: tuple[float, float]
    flag: bool = False


BOUNDS = {Inner: {"size": (1, 10), "rate": (0.5, 1.5)}, Outer: {"rows": (0, 3)}}
GOOD = {
    "name": "x",
    "kind": "big",
    "inner": {"size": 10, "rate": 1},
    "maybe": None,
    "rows": [0, 3],
    "pair": [1, 2.5],
}


def test_a_dataclass_comes_out_with_the_types_of_its_fields():
    found = parse_dataclass(Outer, GOOD, WHERE, BOUNDS)
    assert found == Outer("x", "big", Inner(10, 1.0), None, (0, 3), (1.0, 2.5))
    assert type(found.inner.rate) is float
    more = {**GOOD, "flag": True, "maybe": {"size": 1, "rate": 0.5}}
    assert parse_dataclass(Outer, more, WHERE, BOUNDS).maybe == Inner(1, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "unknown key 'nmae' (nearest: 'name')"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"inner": {"size": 1}}, "inner: missing key 'rate'"),
        ({"inner": {}}, "inner: missing keys 'size', 'rate'"),
        ({"inner": {"size": True, "rate": 1}}, "inner.size: expected an integer, found true"),
        ({"inner": {"size": 4.0, "rate": 1}}, "inner.size: expected an integer, found 4.0"),
        ({"inner": {"size": "4", "rate": 1}}, "inner.size: expected an integer, found '4'"),
        ({"inner": {"size": 0, "rate": 1}}, "inner.size: 0 is out of range; 1 to 10 is possible"),
        ({"inner": {"size": 11, "rate": 1}}, "inner.size: 11 is out of range; 1 to 10 is possible"),
        ({"inner": {"size": 1, "rate": 1.6}}, "inner.rate: 1.6 is out of range"),
        ({"inner": {"size": 1, "rate": None}}, "inner.rate: expected a number, found null"),
        ({"inner": [1]}, "inner: expected an object, found a list"),
        ({"maybe": 1}, "maybe: expected an object, found 1"),
        ({"rows": [1, 2, 4]}, "rows[2]: 4 is out of range"),
        ({"rows": 1}, "rows: expected a list, found 1"),
        ({"pair": [1]}, "pair: expected a list of 2, found 1 entries"),
        ({"pair": [1, "2"]}, "pair[1]: expected a number, found '2'"),
        ({"kind": "bgi"}, "kind: expected one of 'big', 'small', found 'bgi'"),
        ({"kind": ["big"]}, "kind: expected one of 'big', 'small', found a list"),
        ({"name": None}, "name: expected a string, found null"),
        ({"flag": 1}, "flag: expected true or false, found 1"),
    ],
)
def test_each_fault_names_file_key_and_reason(change, message):
    with pytest.raises(ParamsError) as caught:
        parse_dataclass(Outer, {**GOOD, **change}, WHERE, BOUNDS)
    assert str(caught.value).startswith(f"x.json: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "key 'a' appears twice in one object"),
        ('{"a": NaN}', "number 'NaN' is not finite"),
        ('{"a": -Infinity}', "number '-Infinity' is not finite"),
        ('{"a": 1e999}', "number '1e999' is not finite"),
        ('{"a": -1e999}', "number '-1e999' is not finite"),
        ('{"a": ' + "9" * 5000 + "}", "integer '99999"),
        ('{"a": 9223372036854775808}', "integer '9223372036854775808' does not fit into 64 bits"),
        ('{"a": -9223372036854775809}', "integer '-9223372036854775809' does not fit into 64"),
        ("[" * 100_000, "nested more than 32 levels deep"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested more than 32 levels deep"),
        ('{"a": 1,}', "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON: Extra data at line 1 column 10"),
        ('{"a": "\n"}', "not valid JSON: Invalid control character"),
        ('{"a', "not valid JSON: Unterminated string starting at line 1 column 2"),
        ("", "not valid JSON"),
        ('"' + '\\"' * 500_000, "not valid JSON"),
        ('{"a":' * 32 + "[" + "}" * 32, "nested more than 32"),
    ],
)
def test_json_that_others_accept_or_choke_on_is_refused(text, message):
    with pytest.raises(ParamsError) as caught:
        parse_json(text.encode(), WHERE)
    assert str(caught.value).startswith(f"x.json: {message}")


def test_good_json_is_what_python_reads():
    text = '{"a": [1, -2.5e3, true, null, "\\u00e9 [[[{\\" "], "b": {"c": {}}}'
    assert parse_json(text.encode(), WHERE) == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), WHERE) == json.loads(text)
    assert parse_json(b"[-9223372036854775808, 9223372036854775807]", WHERE) == [
        -(2**63),
        2**63 - 1,
    ]
    assert parse_json(b"[" * 32 + b"]" * 32, WHERE) == json.loads("[" * 32 + "]" * 32)
    assert parse_json(b'"' + b"[" * 99 + b'"', WHERE) == "[" * 99


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-10**17, 10**17) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
))  # fmt: skip
def test_what_json_writes_comes_back(value):
    assert parse_json(json.dumps(value).encode(), WHERE) == value


def test_bytes_that_are_no_text_are_refused():
    for data in (b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16")):
        with pytest.raises(ParamsError, match="not UTF-8 text"):
            parse_json(data, WHERE)


def test_parse_object_says_what_is_wrong_without_a_place():
    assert parse_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="expected an object, found a list"):
        parse_object(b"[]")
    with pytest.raises(ValueError, match="appears twice"):
        parse_object(b'{"a": 1, "a": 2}')


def test_files_are_read_only_if_they_are_small_regular_and_themselves(tmp_path):
    path = tmp_path / "config.json"
    cases = [
        (b"", "the file is empty"),
        (b" " * 1_048_577, "1,048,577 bytes; such a file has at most 1,048,576"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ParamsError, match=f"config.json: .*{message}"):
            read_json(path)
    path.write_bytes(b"[1]" + b" " * (1_048_576 - 3))
    assert read_json(path) == [1]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for odd in (pipe, tmp_path):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_json(odd, Where(str(odd), error=CheckpointError))
    with pytest.raises(ParamsError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ParamsError, match="cannot be read"):
        read_json(tmp_path / ("n" * 300))


def test_messages_hold_no_control_characters_and_stay_short():
    evil = "\x1b]52;c;Zm9v\x07\u202e" + "x" * 10_000
    with pytest.raises(ParamsError) as caught:
        parse_dataclass(Outer, {**GOOD, evil: 1}, Where("a\nb.json"), BOUNDS)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    with pytest.raises(ParamsError) as caught:
        parse_dataclass(Outer, {**GOOD, "name": {evil: evil}}, WHERE, BOUNDS)
    assert str(caught.value).isprintable()
    assert escaped("plain.json") == "plain.json"
    assert quoted("\ud800") == "'\\ud800'"
    assert nearest("hiden_size", ["hidden_size", "head"]) == " (nearest: 'hidden_size')"
    assert nearest("qqq", ["hidden_size"]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (None, "None"),
        ([1, "a"], "[1, 'a']"),
        (b"\x1b", r"b'\x1b'"),
        (10**5000, "int of very many digits"),
        (Path("a b"), "'a b'"),
        ("http://me:secret@host/x", "'http://…@host/x'"),
        ("a" * 60 + "b" * 60, f"'{'a' * 50}…{'b' * 50}'"),
    ],
    ids=["int", "none", "list", "bytes", "digits", "path", "password", "long"],
)
def test_a_value_from_outside_is_quoted(value, text):
    assert quoted(value) == text


def test_mutated_text_raises_nothing_but_params_errors():
    rng = random.Random(1)
    data = json.dumps(GOOD).encode()
    parsed = 0
    for _ in range(10_000):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(changed))
            new = rng.choice(
                [b"", b"[", b"{", b'"', b"\\", b"9", b"e", b"-", b"\xff", b"\x00", b","]
            )
            changed[at : at + rng.randrange(2)] = new
        try:
            parse_dataclass(Outer, parse_json(bytes(changed), WHERE), WHERE, BOUNDS)
            parsed += 1
        except ParamsError:
            pass
    assert parsed < 5_000
