import re

import pyte
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmchat.terminal import ESCAPE_MARK, Sanitizer, cells, filled, one_line, sanitize

PIECES = [
    "\x1b", "[", "]", "P", "\\", "\x07", "\x9b", "\x9d", "\x90", "\x9c", "\x18", "52;c;aGk=", "31m",
    "2J", "8;;http://x", "(0", "\n", "\t", "\r", "\b", "\x00", "\x7f", "a", "é", "界", "🐕",
    "\u202e", "\u2066", "\U000e0041", " ",
]  # fmt: skip
hostile = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join)

FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]"
)


@given(hostile)
def test_nothing_that_a_terminal_obeys_comes_out(text):
    assert not FORBIDDEN.search(sanitize(text))


@given(hostile, st.lists(st.integers(min_value=1, max_value=5)))
@example("a\x1b]52;c;aGk=\x1b\\b", [1] * 20)
def test_cuts_do_not_change_what_comes_out(text, cuts):
    stream, pieces, start = Sanitizer(), [], 0
    for length in [*cuts, len(text)]:
        pieces.append(stream.feed(text[start : start + length]))
        start += length
    assert "".join(pieces) == sanitize(text)


@given(hostile)
def test_a_terminal_shows_sanitized_text_as_plain_lines(text):
    safe = sanitize(text)
    screen = pyte.Screen(80, 24)
    screen.set_title("mine")
    pyte.Stream(screen).feed(safe.replace("\n", "\r\n"))
    assert screen.title == "mine"
    assert not screen.cursor.attrs.bold
    assert screen.cursor.attrs.fg == "default"


@given(st.text(st.characters(exclude_categories=["C"])))
def test_ordinary_text_passes_unchanged(text):
    assert sanitize(text) == text


@given(hostile)
def test_sanitizing_twice_changes_nothing(text):
    assert sanitize(sanitize(text)) == sanitize(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red \x1b[31mrose\x1b[0m", f"red {ESCAPE_MARK}rose{ESCAPE_MARK}"),
        ("copy \x1b]52;c;aGVsbG8=\x07this", f"copy {ESCAPE_MARK}this"),
        ("link \x1b]8;;http://x\x1b\\here\x1b]8;;\x1b\\", f"link {ESCAPE_MARK}here{ESCAPE_MARK}"),
        ("clear\x9b2J!", f"clear{ESCAPE_MARK}!"),
        ("title \x9d0;x\x9cend", f"title {ESCAPE_MARK}end"),
        ("device \x1bPq#0\x1b\\ok", f"device {ESCAPE_MARK}ok"),
        ("charset \x1b(0lqk", f"charset {ESCAPE_MARK}lqk"),
        ("line\r\nnext\ttab\x00\b\x7f.", "line\nnext\ttab."),
        ("right\u202eto left\u2066", "rightto left"),
        ("hid\U000e0068\U000e0069den", "hidden"),
        ("cut \x1b[3é", f"cut {ESCAPE_MARK}é"),
    ],
)
def test_each_kind_of_sequence_is_taken_out_whole(text, shown):
    assert sanitize(text) == shown


def test_an_unfinished_sequence_hides_at_most_its_line():
    assert sanitize("a\x1b]0;never ended\nb\nc") == f"a{ESCAPE_MARK}\nb\nc"


LONG_PATH = "/x/y-z/" + "p" * 30
LONG = f"the file '/a b/c d/e.png' is not there; run 'mmchat download tiny' or {LONG_PATH}"


@given(st.integers(min_value=1, max_value=120))
def test_lines_are_filled_without_breaking_paths_and_commands(columns):
    lines = filled(LONG, columns).split("\n")
    assert " ".join(lines) == LONG
    for whole in ("'/a b/c d/e.png'", "'mmchat download tiny'", LONG_PATH):
        assert any(whole in line for line in lines)
    for line in lines:
        assert len(line) <= columns or " " not in line or line.startswith("'")


def test_wide_glyphs_count_twice_when_lines_are_filled():
    assert [cells(text) for text in ("dog", "犬", "e\u0301", "")] == [3, 2, 1, 0]
    assert filled("犬犬 犬犬 dog", 9) == "犬犬 犬犬\ndog"


def test_short_lines_and_indents_are_left_alone():
    assert filled("  a  b\n\nc", 80) == "  a  b\n\nc"
    assert filled("  one two", 6, indent="  ") == "  one\n  two"


def test_no_line_break_is_left_in_one_line():
    for code in range(0x3000):
        assert len(one_line(f"a{chr(code)}b").splitlines()) == 1
    assert one_line("a\nb") == "a\\nb"
