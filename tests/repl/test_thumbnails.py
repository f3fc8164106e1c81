"""Pictures in the terminal: what is drawn is the picture, and asking for it harms nobody."""

import os
import pty
import re
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mmchat.cli.console import buffer_console
from mmchat.repl import graphics, thumbnail
from mmchat.repl.terminal_probe import Answers, asked, questions, read_answers
from mmchat.repl.terminal_screen import TerminalScreen
from mmchat.repl.thumbnail import Thumbnails
from tests.repl.pictures import ITERM2, KITTY, PLAIN, SIXEL, PictureTerminal, decoded_sixels
from tests.repl.screens import Terminal
from tests.repl.terminals import colors

XTERM = {"TERM": "xterm-256color"}


def drawing(width: int, height: int) -> Image.Image:
    """Gradients, an edge and flat colours."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], -1)
    pixels[height // 3 : height // 2, : width // 2] = (200, 0, 0)
    return Image.fromarray(pixels.astype(np.uint8))


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean distance of the pixels, 0 to 255."""
    assert first.size == second.size
    return float(np.abs(np.asarray(first, int) - np.asarray(second.convert("RGB"), int)).mean())


# What is drawn


@pytest.mark.parametrize("size", [(300, 10), (10, 300), (1, 1), (640, 480)])
def test_thumbnails_keep_to_their_room(size, monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(columns=60, rows=20)
    picture = Image.new("RGB", size, (1, 2, 3))
    terminal.write(Thumbnails("blocks").draw(picture, buffer_console, (60, 20)))
    lines = terminal.lines()
    assert 1 <= len(lines) <= thumbnail.ROWS
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= thumbnail.COLUMNS
    assert terminal.screen.buffer[0][0].fg == "010203"
    assert Thumbnails("off").draw(picture, buffer_console, (60, 20)) == ""


@pytest.mark.parametrize("columns", [12, 40, 80])
def test_what_is_said_beside_a_picture_never_breaks_into_it(columns):
    terminal = Terminal(columns=columns, rows=40)
    screen = TerminalScreen(terminal.write, buffer_console, Thumbnails("blocks"), color=True)
    screen.size = terminal.size
    name = "attached " + "犬" * 30 + "a" * 30 + ".png"
    screen.picture(drawing(64, 36), name, ["640 x 480 px", "1 tile", *["fact"] * 12])
    lines = terminal.lines()
    # one row is blank, and none was wrapped by the terminal
    assert len(lines) + 1 == terminal.written.count("\n")
    assert len({line.count("▀") for line in lines if "▀" in line}) == 1
    assert lines[-1].strip() == "fact"


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (64, 36)])
def test_sixels_draw_every_pixel(size):
    picture = drawing(*size)
    drawn = decoded_sixels(graphics.sixel(picture)[2:-2])
    assert difference(drawn, picture) < 5
    assert difference(decoded_sixels(graphics.sixel(picture, 16)[2:-2]), picture) < 30


def test_few_colours_are_drawn_exactly():
    picture = Image.new("RGB", (50, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (10, 3, 30, 15))
    assert difference(decoded_sixels(graphics.sixel(picture)[2:-2]), picture) == 0


@pytest.mark.parametrize("way", ["kitty", "iterm2", "sixel"])
def test_the_cursor_is_below_a_picture_wherever_the_terminal_leaves_it(way):
    terminal = Terminal(columns=60, rows=8)
    terminal.write("before\n" * 6)
    drawn = Thumbnails(way).draw(drawing(64, 64), buffer_console, (60, 8))
    codes = r"\x1b[_P].*\x1b\\|\x1b\]1337.*\x07"
    terminal.write(re.sub(codes, "\x1b[3;40H", drawn))  # as a terminal may move it
    terminal.write("after")
    assert terminal.lines() == ["before"] * 6 + [""] * 5 + ["after"]


# What the terminal is asked


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (KITTY, Answers(kitty=True, cell=(18, 9))),
        (SIXEL, Answers(sixel=True, cell=(16, 8))),
        (ITERM2, Answers(iterm2=True, sixel=True, cell=(17, 8))),
        ("\x1bP>|XTerm(399)\x1b\\" + PLAIN, Answers()),
        ("x\x1bP>|iTer", Answers(typed="x", complete=False)),
        ("\x1b[?1;0;16S\x1b[?4;6c", Answers(sixel_colors=16)),  # 4 as the class is no Sixel
        ("\x1b_Gi=31;ENOTSUPPORTED:no\x1b\\" + PLAIN, Answers()),
        ("\x1b_Gi=7;OK\x1b\\\x1b[6;0;0t\x1b[?1;0;0S" + PLAIN, Answers(sixel_colors=2)),
        ("", Answers(complete=False)),
        ("\x1b_Gi=31;O", Answers(complete=False)),
        ("\x1b[?62", Answers(complete=False)),
        ("he\x1b_Gi=31;OK\x1b\\ll" + PLAIN + "o\r", Answers(kitty=True, typed="hello\r")),
        ("\x1b[A\x1b[6~" + PLAIN + "\x1bOP", Answers(typed="\x1b[A\x1b[6~\x1bOP")),
    ],
)
def test_answers_are_told_from_typed_keys(answer, found):
    assert read_answers(answer) == found


@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "screen-256color"}, {"TERM": "tmux-256color"}, {"TERM": "linux"},
        {**XTERM, "TMUX": "/tmp/tmux-0/default,1,0"},
        {**XTERM, "TERM_PROGRAM": "Apple_Terminal"},
    ],
)  # fmt: skip
def test_what_would_show_is_not_asked(environment):
    for question in ("\x1b_", "\x1b[>q"):
        assert question in questions(XTERM)
        assert question not in questions(environment)
    assert "\x1b[c" in questions(environment)


@pytest.mark.parametrize(
    ("mode", "answers", "environment", "way"),
    [
        ("auto", Answers(kitty=True, sixel=True), XTERM, "kitty"),
        ("auto", Answers(sixel=True), XTERM, "sixel"),
        ("auto", Answers(), XTERM, "blocks"),
        ("auto", Answers(iterm2=True, sixel=True), XTERM, "iterm2"),
        ("auto", Answers(), {**XTERM, "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ("auto", Answers(complete=False), {**XTERM, "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ("auto", Answers(kitty=True), {**XTERM, "LC_TERMINAL": "iTerm2"}, "kitty"),
        ("auto", Answers(sixel=True), {**XTERM, "LC_TERMINAL": "iTerm2", "TMUX": "x"}, "sixel"),
        ("auto", Answers(), {"TERM": "screen", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ("iterm2", Answers(), {**XTERM, "TMUX": "x"}, "blocks"),
        ("auto", Answers(), {**XTERM, "NO_COLOR": "1"}, "off"),
        ("auto", Answers(), {"TERM": "vt100"}, "off"),
        ("kitty", Answers(), XTERM, "kitty"),
        ("sixel", Answers(kitty=True), XTERM, "sixel"),
        ("off", Answers(kitty=True), XTERM, "off"),
        ("kitty", Answers(), {**XTERM, "TMUX": "x"}, "blocks"),
    ],
)
def test_the_best_way_that_the_terminal_knows_is_taken(
    mode, answers, environment, way, monkeypatch
):
    for name in ("NO_COLOR", "TMUX", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert thumbnail.choose(mode, answers).way == way


class Line:
    """A terminal line in this process: `keyboard` is its other end."""

    def __init__(self, monkeypatch) -> None:
        self.keyboard, terminal = pty.openpty()
        self.stdin = os.fdopen(terminal, "r")
        monkeypatch.setattr(sys, "stdin", self.stdin)
        for name in ("TMUX", "TERM_PROGRAM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())


@pytest.fixture
def line(monkeypatch):
    line = Line(monkeypatch)
    yield line
    os.close(line.keyboard)
    line.stdin.close()


@pytest.mark.process
def test_keys_pressed_before_during_and_after_the_answers_are_kept(line):
    line.press("What is\rit")  # Return, while the terminal still makes a newline of it
    written = []
    with asked(written.append) as answers:
        line.press("?" + KITTY[:20])
        line.press(KITTY[20:] + "\r")
        found = answers()
    assert "".join(written) == questions({"TERM": "xterm"})
    assert (found.kitty, found.cell, found.complete) == (True, (18, 9), True)
    assert found.typed == "What is\rit?\r"


@pytest.mark.process
def test_a_silent_terminal_is_not_waited_for_long_and_loses_no_key(line):
    begun = time.monotonic()
    with asked(lambda text: None) as answers:
        line.press("hello")
        found = answers()
    assert found == Answers(typed="hello", complete=False)
    assert time.monotonic() - begun < 30  # no hang


@pytest.mark.process
def test_slow_answers_in_pieces_are_put_together(line):
    def answer() -> None:
        for piece in re.findall(".{1,4}", SIXEL):
            time.sleep(0.01)
            line.press(piece)

    writer = threading.Thread(target=answer)
    with asked(lambda text: None) as answers:
        writer.start()
        found = answers()
        writer.join()
    assert found == Answers(sixel=True, cell=(16, 8))


@pytest.mark.process
def test_nothing_is_asked_where_no_answer_is_needed(line):
    line.press("a")
    with asked(lambda text: pytest.fail(text), ask=False) as answers:
        assert answers() == Answers(typed="a")


# A chat in such a terminal


@pytest.fixture
def folder(tmp_path):
    drawing(320, 200).save(tmp_path / "drawing.png")
    return tmp_path


@pytest.mark.process
def test_a_terminal_with_kitty_graphics_gets_the_picture_and_no_history_leaves_nothing(folder):
    chat = PictureTerminal(folder, ["One."], "--no-history", reply=KITTY)
    chat.line("drawing.png")
    [(keys, picture)] = chat.kitty
    assert (keys["a"], keys["f"], keys["C"]) == ("T", "100", "1")
    columns, rows = int(keys["c"]), int(keys["r"])
    assert picture.size == (9 * columns, 18 * rows)
    with Image.open(folder / "drawing.png") as original:
        assert difference(picture, original.resize(picture.size)) == 0
    assert chat.sixels == []
    lines = chat.lines()
    at = lines.index("> drawing.png") + 1
    facts = ["attached drawing.png", "320 x 200 px", "1 tile", "1,601 vision tokens"]
    beside = [" " * (columns + thumbnail.GAP) + fact for fact in facts]
    assert lines[at : at + rows] == [*beside, *[""] * (rows - len(facts))]
    chat.line("What is it?")
    assert "One." in chat.lines()
    chat.send("\x04")
    assert chat.end() == 0
    assert not (folder / "state").exists()


@pytest.mark.process
def test_iterm2_gets_the_picture_by_its_own_protocol(folder):
    chat = PictureTerminal(folder, ["One."], reply=ITERM2)
    chat.line("drawing.png")
    [(keys, picture)] = chat.iterm2
    columns, rows = int(keys["width"]), int(keys["height"])
    assert picture.size == (8 * columns, 17 * rows)
    with Image.open(folder / "drawing.png") as original:
        assert difference(picture, original.resize(picture.size)) == 0
    assert (chat.kitty, chat.sixels) == ([], [])
    assert "iTerm2" not in chat.text()
    chat.send("\x04")
    assert chat.end() == 0


@pytest.mark.process
def test_a_terminal_with_sixel_gets_the_picture_and_typing_ahead_is_kept(folder):
    chat = PictureTerminal(folder, ["One.", "Two."], reply="ab" + SIXEL, typed="drawing.png\r")
    chat.wait("attached drawing.png")
    chat.wait("> ab")
    [picture] = chat.sixels
    assert (picture.width % 8, picture.height % 16) == (0, 0)
    with Image.open(folder / "drawing.png") as original:
        assert difference(picture, original.resize(picture.size)) < 5
    chat.line("c?")
    assert "> abc?" in chat.lines()
    assert "One." in chat.lines()
    chat.send("\x04")
    assert chat.end() == 0


@pytest.mark.process
def test_a_terminal_that_answers_late_gets_blocks_and_no_junk(folder, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat = PictureTerminal(folder, ["One."], reply="")
    chat.send("x" + KITTY + "y")
    chat.wait("> xy")
    chat.send("\x03")
    chat.line("drawing.png")
    assert (chat.kitty, chat.sixels) == ([], [])
    assert len(colors(chat)) > 10
    assert not re.search(r"OK|62;|6;18", chat.text())
    chat.send("\x04")
    assert chat.end() == 0
