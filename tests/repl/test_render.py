"""Streamed Markdown on a terminal emulator: the screen and the scrollback, not only the stream."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.repl.render import TAIL_ROWS, BlockReader, Tail, terminal_reflows, wrapped
from mmchat.terminal import ESCAPE_MARK, sanitize
from tests.repl.screens import SAMPLE, Terminal, cuts


def streamed(text, pieces, **size):
    terminal = Terminal(**size)
    stream = terminal.markdown()
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return terminal


def test_blocks_are_shown_as_markdown():
    lines = streamed(SAMPLE, [SAMPLE]).lines()
    shown = "\n".join(lines)
    assert lines[0].startswith("Here is what I see")
    assert "**" not in shown
    assert "```" not in shown
    assert "    return x" in shown
    assert next(line for line in lines if "•" in line).strip() == "• a brown dog"
    assert any(line.split() == ["1", "one"] for line in lines)
    assert "------" not in shown
    assert lines[-1] == "The end, without a newline"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("columns", "rows"), [(60, 12), (23, 7)])
def test_the_scrollback_is_that_of_the_whole_text_however_it_was_cut(seed, columns, rows):
    whole = streamed(SAMPLE, [SAMPLE], columns=columns, rows=rows)
    pieces = cuts(SAMPLE, seed, longest=1 + 3 * seed)
    assert streamed(SAMPLE, pieces, columns=columns, rows=rows).lines() == whole.lines()


def test_what_is_committed_is_never_written_over():
    """Nothing moves the cursor above the live rows."""
    terminal = Terminal()
    stream = terminal.markdown()
    for piece in cuts(SAMPLE, 1):
        stream.feed(piece)
    stream.finish()
    ups = [int(n) for n in re.findall(r"\x1b\[(\d+)A", terminal.written)]
    assert max(ups) < TAIL_ROWS
    assert set(re.findall(r"\x1b\[\d*([A-Z])", terminal.written)) <= {"A", "J"}


def test_unfinished_text_is_seen_while_it_is_written():
    terminal = Terminal()
    stream = terminal.markdown()
    for word in ["A", "sentence", "that", "has", "**not**", "ended"]:
        stream.feed(word + " ")
    assert terminal.lines() == ["A sentence that has **not** ended"]
    stream.finish()
    assert terminal.lines() == ["A sentence that has not ended"]


def test_items_and_lines_of_code_are_committed_one_by_one():
    reader = BlockReader()
    reader.feed("- one\n- two\n- thr")
    assert [b.source for b in reader.take()] == ["- one"]
    assert reader.unfinished == "- two\n- thr"
    reader.feed("ee\n\n```py\na = 1\n\nb")
    assert [(b.kind, b.source) for b in reader.take()] == [
        ("markdown", "- two"),
        ("markdown", "- three"),
        ("code", "a = 1"),
        ("code", ""),
    ]
    assert reader.unfinished == "b"


def test_code_ends_at_its_own_fence_only():
    reader = BlockReader()
    reader.feed("````\n```\n~~~~\n````\nafter\n")
    reader.finish()
    assert [(b.kind, b.source) for b in reader.take()] == [
        ("code", "```"),
        ("code", "~~~~"),
        ("markdown", "after"),
    ]


def test_wide_glyphs_do_not_leave_rows_behind():
    text = "犬🐶" * 40 + "\n\n" + "漢" * 45 + " end\n\nlast"
    terminal = streamed(text, list(text), columns=31, rows=8)
    assert "".join(terminal.lines()) == text.replace("\n", "").replace(" ", "")[:-7] + "endlast"


@pytest.mark.parametrize("seed", range(10))
def test_a_terminal_of_another_width_keeps_every_committed_line_once(seed):
    """Numbered paragraphs while the window changes: none lost, none twice, all in order."""
    rng = random.Random(seed)
    terminal = Terminal(columns=50, rows=10)
    stream = terminal.markdown()
    text = "\n\n".join(f"[{n}] some words that are wrapped when it is narrow" for n in range(12))
    for piece in cuts(text, seed, longest=12):
        stream.feed(piece)
        if rng.random() < 0.1:
            terminal.screen.resize(lines=10, columns=rng.choice([50, 60, 70]))
    stream.finish()
    found = re.findall(r"\[(\d+)\]", "\n".join(terminal.lines()))
    assert found == [str(n) for n in range(12)]


def test_rows_are_counted_anew_where_the_terminal_wraps_them_anew():
    for reflows, up in ((True, 3), (False, 1)):
        widths = [40, 20]  # when it is drawn, and when it is erased
        tail = Tail(lambda widths=widths: (widths.pop(0), 20), reflows)
        tail.draw("x" * 39 + "\n" + "y" * 39, gap=False)
        assert tail.erase() == f"\r\x1b[{up}A\x1b[J"


def test_most_terminals_wrap_rows_anew():
    assert terminal_reflows({"TERM": "xterm-256color"})
    assert not terminal_reflows({"TERM": "xterm-256color", "XTERM_VERSION": "XTerm(380)"})
    assert not terminal_reflows({"TERM": "linux"})


@given(st.text(st.characters(codec="utf-8", categories=["L", "Zs", "S"]), max_size=80))
@settings(max_examples=60, deadline=None)
def test_wrapped_rows_fit(text):
    from rich.cells import cell_len

    line = text.replace("\n", " ")
    assert all(cell_len(row) <= 11 for row in wrapped(line, 11))


HOSTILE = st.sampled_from(
    [
        "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",
        "\x1b]52;c;cm0gLXJm\x07",
        "\x1b]0;title\x07",
        "\x1b[2J\x1b[H",
        "\x1b[?1049h",
        "\x9b31m",
        "\x1bPq\x1b\\",
        "\x1b",
        "\u202e",
        "\u2066",
        "\x08\x08",
        "\r",
        "\x00",
        "text",
        "**bold**",
        "\n\n",
        "- item\n",
        "```\n",
        "[a](http://b)",
        "| a |\n|---|\n",
        "\U000e0041",
    ]
)


@pytest.mark.slow
@given(st.lists(HOSTILE, max_size=14), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_model_text_cannot_drive_the_terminal(parts, seed):
    """Whatever is said and wherever it is cut: our own sequences only, nothing above the answer."""
    terminal = Terminal()
    terminal.write("above\n")
    titles = []
    terminal.screen.set_title = titles.append
    streamed_to(terminal, cuts("".join(parts), seed, longest=5))
    assert titles == []
    assert terminal.lines()[0] == "above"
    harmless = re.sub(r"\x1b\[[0-9;]*[mAJ]|\r(?=\x1b\[)", "", terminal.written)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", harmless)


def streamed_to(terminal, pieces):
    stream = terminal.markdown()
    for piece in pieces:
        stream.feed(piece)
    stream.finish()


def test_a_removed_sequence_leaves_a_mark():
    terminal = streamed("", ["a\x1b", "[2Jb"])
    assert terminal.lines() == [f"a{ESCAPE_MARK}b"]


@pytest.mark.parametrize(
    "entity", ["&#x202E;", "&#xE0041;", "&#8238;", "&#x2066;", "&#x9b;", "&#27;"]
)
@pytest.mark.parametrize(
    "form", ["a{}b", "# a{}b", "- **a{}b**", "| a{}b |\n|---|", "[a{}b](c{}d)"]
)
def test_entities_are_sanitized_after_they_are_decoded(entity, form):
    terminal = Terminal()
    stream = terminal.markdown()
    stream.feed(form.replace("{}", entity))
    stream.finish()
    text = re.sub(r"\x1b\[[0-9;]*[mJA]", "", terminal.written)
    assert sanitize(text.replace("\r", "")) == text.replace("\r", "")
