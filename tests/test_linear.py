"""Text from outside costs work in proportion to its length, however it is made up.

Four times the text is four times the work; a quadratic scan would make it sixteen.
"""

from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from mmchat.engine.text import AnswerText
from mmchat.images import sources
from mmchat.repl import blocks, paths
from mmchat.strict_json import loads
from mmchat.terminal import Sanitizer, filled
from tests.kinds import some
from tests.repl.screens import Terminal
from tests.work import growth, uncounted

LINEAR = 4.9  # 4, and what does not divide evenly


def repeated(unit):
    return lambda size: unit * (size // len(unit))


LINES = ["x", "a.png ", "/x/a.png b ", "it's ", "'a \"b ", '"\\" ', "'\\' ", "a\\ b ", "\"' '\""]


@pytest.mark.slow
@pytest.mark.parametrize("unit", some(LINES, ["a.png ", "'a \"b ", '"\\" ', "\"' '\""]))
def test_names_of_pictures_are_found_in_linear_work(unit, monkeypatch):
    monkeypatch.setattr(paths, "existing", lambda name, listings=None: None)
    for read in (paths.read_line, paths.read_argument, paths.plain):
        assert growth(read, repeated(unit)) < LINEAR


def test_a_picture_in_the_line_is_read_in_linear_work():
    url = lambda size: "data:image/png;base64," + "A" * size  # noqa: E731
    assert growth(lambda text: paths.read_argument(f"{text} What is it?"), url) < LINEAR
    assert growth(sources.read_source, url) < LINEAR


BLOCKS = {
    "table": "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 6_000,
    "paragraph": "some words\n" * 6_000,
    "list in an item": "- a\n" + "  - b\n" * 6_000,
    "paragraphs of an item": "- a\n" + "\n  b\n" * 6_000,
    "quote": "> some words\n" * 6_000,
    "nested quotes": ">" * 6_000 + "a\n",
    "code in an item": "- a\n  ```\n" + "  x\n" * 6_000,
    "HTML with fences": "<div>\n" + "```\n" * 6_000,
    "code": "```\n" + "x\n" * 6_000,
    "one line": "word " * 6_000,
    "one word": "x" * 6_000,
    "brackets": "[" * 6_000,
}


@pytest.mark.parametrize("bound", some([512, blocks.BLOCK_CHARACTERS], [512]))
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_in_linear_work(name, bound, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", bound)
    monkeypatch.setattr(blocks, "LINE_CHARACTERS", 64)
    monkeypatch.setattr("markdown_it.MarkdownIt.parse", uncounted(MarkdownIt.parse))

    def read(text):
        reader = blocks.BlockReader()
        for start in range(0, len(text), 16):
            reader.feed(text[start : start + 16])
            assert len(reader.unfinished) < 512
        reader.finish()

    assert growth(read, lambda size: BLOCKS[name][:size]) < LINEAR


def test_what_is_too_long_for_a_block_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 512)
    terminal = Terminal(columns=60, rows=12)
    stream = terminal.markdown()
    rows = [f"| {number} | b |" for number in range(300)]
    stream.feed("\n".join(["| a | b |", "|---|---|", *rows, "", "**end**"]))
    stream.finish()
    shown = terminal.lines()
    assert shown[-2:] == ["", "end"]
    assert shown[-3] == rows[-1]
    assert sum(line.startswith("| ") for line in shown) >= 299


@pytest.mark.parametrize("unit", ["x", "\x1b[", "\x1b]0;", "\x1b", "\x9b1", "\u202e", "a\n"])
def test_text_is_made_safe_in_linear_work(unit):
    def feed(text):
        sanitizer = Sanitizer()
        for start in range(0, len(text), 16):
            sanitizer.feed(text[start : start + 16])

    assert growth(feed, repeated(unit)) < LINEAR


@pytest.mark.parametrize("unit", ["word ", "'", "' ", "'a b", "x"])
def test_text_is_broken_into_lines_in_linear_work(unit):
    assert growth(lambda text: filled(text, 40, "  "), repeated(unit)) < LINEAR


@pytest.mark.parametrize(
    ("answer", "stop"), [("a", "aaaab"), ("ab", "ababac"), ("a", "a" * 2_000 + "b"), ("x", "y")]
)
def test_stop_strings_are_looked_for_in_linear_work(answer, stop):
    tokenizer = SimpleNamespace(is_special=lambda _: False, token_bytes=lambda i: bytes([i]))

    def read(text):
        found = AnswerText(tokenizer, (stop,))
        shown = "".join(found.push(ord(char)) for char in text) + found.flush()
        assert shown == text

    assert growth(read, repeated(answer)) < LINEAR


@pytest.mark.parametrize("unit", ['"a",', "1,", "[],", '{"a":1},', "1e9,", '"\\"",'])
def test_json_is_read_in_linear_work(unit):
    assert growth(loads, lambda n: f"[{repeated(unit)(n)}0]".encode()) < LINEAR
    keys = lambda n: ("{" + ",".join(f'"{i}":1' for i in range(n)) + "}").encode()  # noqa: E731
    assert growth(loads, keys) < LINEAR
