"""A first evening with the chat, in a real pseudo-terminal, read from its screen and scrollback."""

import http.server
import json
import os
import re
import signal
import stat
import sys
import termios
import threading

import pexpect
import pytest
from PIL import Image

from mmchat.repl.commands import COMMANDS
from tests.repl.terminals import READY, ROOT, SECONDS, ChatTerminal, colors

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]  # long: begun early

ANSWERS = [
    "A **red** square.",
    "Two pictures:\n\n- one red\n- one blue",
    "Again: two.",
    "This answer is long. " * 40,
    "Three lines came.",
    "Welcome back.",
]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (200, 200), (200, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (1100, 500), (0, 0, 200)).save(tmp_path / "My Blue Picture.png")
    return tmp_path


def test_a_first_evening(folder):
    chat = ChatTerminal(folder, ANSWERS, delay=0.002)
    assert "context 0/131,072" in chat.bottom()

    chat.line("red.png")  # a picture by its name
    assert re.search(r"▀  attached red\.png\n▀+  200 x 200 px\n▀+  1 tile\n", chat.text())
    assert "c80000" in colors(chat)
    assert "1 picture, 1 new" in chat.bottom()
    chat.line("What is it?")
    assert chat.lines().count("A red square.") == 1
    assert "tokens/s" in chat.bottom()

    chat.paste(f"{folder}/My\\ Blue\\ Picture.png ")  # a dropped one
    chat.wait(r"attached My Blue Picture\.png\n▀+  1100 x 500 px\n▀+  2 tiles \(1 row, 2 columns\)")
    chat.line("And both?")
    assert [line for line in chat.lines() if "•" in line] == [" • one red", " • one blue"]

    chat.line("see ./gone.png please")  # a wrong path
    assert "no such picture: './gone.png'; nothing was sent" in chat.text()

    chat.line("\\undo")
    assert "took back 'And both?'" in chat.text()
    chat.line("\\retry temperature 0.5")
    assert "Again: two." in chat.lines()

    chat.send("Tell me more\r")  # an answer that is stopped
    chat.wait("This answer is long. This")
    chat.send("\x03")
    chat.wait("interrupted;")
    chat.settle()
    assert "interrupted; the answer so far is kept" in re.sub(r"\s+", " ", chat.text())
    assert chat.text().count("This answer is long") < 40

    chat.paste("first line\nsecond line\nthird line")  # stays one message
    chat.wait("third line")
    chat.line("")
    assert "Three lines came." in chat.lines()

    chat.line("\\save evening")
    assert "saved as 'evening'" in chat.text()
    chat.send("\\quit\r")
    assert chat.end() == 0

    [evening] = (folder / "state" / "mmchat" / "chats").iterdir()
    assert evening.name == "evening"
    saved = json.loads((evening / "chat.json").read_text())
    questions = [part.get("text") for turn in saved["turns"] for part in turn["question"]]
    assert questions == [None, "What is it?", "Tell me more", "first line\nsecond line\nthird line"]
    assert [turn["finish_reason"] for turn in saved["turns"]] == ["stop", "interrupted", "stop"]

    again = ChatTerminal(folder, ANSWERS[-1:], "--continue")
    assert "going on after 3 turns with 1 picture" in again.text()
    assert "Drop a picture" not in again.text()
    assert "\x1b[2m> first line" in again.written  # the last turn is dim
    assert "\x1b[2mThree lines came.\x1b[0m" in again.written
    again.line("Hello again")
    assert "Welcome back." in again.lines()
    again.send("\x04")
    assert again.end() == 0
    for file in (folder / "state").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o700 if file.is_dir() else 0o600), file


def test_the_first_screen_greets_and_the_built_in_model_offers_what_it_answers(folder):
    chat = ChatTerminal(folder, model="tiny", cwd=ROOT)
    at = chat.lines().index("Drop a picture into this window, or type its path, and ask about it.")
    tried = [line.strip() for line in chat.lines()[at + 5 : at + 8]]
    assert tried == [
        "assets/dog.jpg What's in this image?",
        "What colour is the dog?",
        "assets/street.jpg What's in this image?",
    ]
    for count, said in ((1, "A brown dog."), (2, "It is brown.")):
        chat.send("\x1b[A" * count)
        chat.line("")
        assert said in chat.lines()
    rows = chat.screen.buffer.values()
    accent = {"".join(c.data for c in row.values() if c.fg == "magenta").strip() for row in rows}
    assert f"> {tried[1]}" in accent
    chat.send("\x04")
    assert chat.end() == 0


def test_a_window_made_narrower_keeps_no_copy_of_the_rule(folder):
    chat = ChatTerminal(folder, ["One."], columns=80)
    chat.line("Hi")
    for columns in (60, 40):
        chat.child.setwinsize(24, columns)
        chat.screen.resize(24, columns)
        chat.settle()
        rules = [line for line in chat.lines() if "─" in line]
        assert rules == ["─" * columns]
    chat.send("\x04")
    assert chat.end() == 0


def test_without_colour_what_is_quiet_is_dim_and_nothing_has_a_colour(folder, monkeypatch):
    chat = ChatTerminal(folder, ["A `b`."], "--color", "never")
    chat.line("red.png What is it?")
    chat.line("\\drop 9")
    codes = {
        int(n)
        for found in re.findall(r"\x1b\[([\d;]*)m", chat.written)
        for n in found.split(";")
        if n
    }
    assert codes <= {0, 1, 2, 22}
    chat.send("\x04")
    assert chat.end() == 0


def test_keys_at_the_prompt(folder):
    chat = ChatTerminal(folder, ["one", "two"])
    chat.send("some text")
    chat.wait("> some text")
    chat.send("\x03")  # clears the line and stays
    chat.wait_until(lambda: "some text" not in chat.text(), "empty line")
    chat.send("a\x1b\rb")  # Alt-Enter
    chat.wait(r"> a\n  b")
    chat.line("")
    assert "one" in chat.lines()
    for key in ("\x1b", "\x03"):  # Esc and Ctrl-C leave an edit and keep the question
        chat.send("\\edit\r")
        chat.wait(r"edit \(Esc keeps the old\)> a")
        chat.wait("Esc or Ctrl-C keeps the old one")
        prompts = chat.written.count(READY)
        chat.send("more" + key)
        chat.wait_until(lambda before=prompts: chat.written.count(READY) > before, "prompt")
        chat.settle()
    assert chat.lines().count("nothing is changed") == 2
    chat.send("\x12a")  # Ctrl-R finds it
    chat.wait("I-search backward: a")
    chat.send("\x03\x03")
    chat.send("\\im\t")  # completion
    chat.wait(r"\\image")
    chat.send("\x03")
    chat.send("\x03")
    chat.wait("Ctrl-C again leaves")
    chat.send("\x03")
    assert chat.end() == 130


def test_what_is_typed_soon_after_esc_is_the_next_line(folder):
    chat = ChatTerminal(folder, ["one", "two", "three"])
    chat.line("old")
    chat.send("\\edit\r")
    chat.wait("Esc or Ctrl-C keeps the old one")
    chat.send("\x1b")
    chat.watch(0.3)
    chat.send("new")
    chat.wait("> new")
    assert "edit (Esc keeps the old)> old\nnothing is changed\n" in chat.text()
    chat.line("")
    assert "two" in chat.lines()
    chat.send("\\edit\r")
    chat.wait("Esc or Ctrl-C keeps the old one")
    chat.send("\x1bb\x1b[Ca\x1b\r")  # Alt-B to the word's begin, Right, and Alt-Enter
    chat.wait(r"> na\n  ew")
    chat.line("")
    assert "three" in chat.lines()
    chat.send("\x04")
    assert chat.end() == 0


def test_ctrl_c_that_comes_as_an_answer_ends_does_not_leave(folder):
    chat = ChatTerminal(folder, ["One.", "Two."], late=True)
    chat.line("Hi")
    chat.line("And then?")
    assert "Two." in chat.lines()
    chat.send("\x04")
    assert chat.end() == 0


def test_ctrl_c_twice_aborts_an_answer_hard(folder):
    chat = ChatTerminal(folder, ["never ends " * 50], delay=1.0)
    chat.send("Hi\r")
    chat.wait("Hi")
    chat.watch(1.5)
    chat.send("\x03")
    chat.watch(0.3)
    chat.send("\x03")
    assert chat.end() == 130


@pytest.mark.parametrize(
    ("number", "code", "busy"),
    [
        (signal.SIGTERM, 143, True),
        (signal.SIGHUP, 129, False),
        pytest.param(signal.SIGTERM, 143, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, True, marks=pytest.mark.slow),
    ],
)
def test_signals_leave_the_terminal_sane(folder, number, code, busy):
    chat = ChatTerminal(folder, ["never ends " * 50], delay=0.2)
    if busy:
        chat.send("Hi\r")
        chat.wait("never")
    chat.child.kill(number)
    while chat.pump():
        pass
    flags = termios.tcgetattr(chat.child.child_fd)[3]
    assert flags & termios.ECHO
    assert flags & termios.ICANON
    modes = re.findall(r"\x1b\[\?(2004|25)([hl])", chat.written)
    assert dict(modes) == {"2004": "l", "25": "h"}  # the last of each
    chat.child.wait()
    assert chat.child.exitstatus == code
    if busy:
        chats = list((folder / "state" / "mmchat" / "chats").glob("*/chat.json"))
        assert json.loads(chats[0].read_text())["turns"][0]["finish_reason"] == "interrupted"


def test_a_killed_chat_loses_at_most_two_seconds(folder):
    chat = ChatTerminal(folder, ["word " * 200], delay=0.02)
    chat.send("Hi\r")
    chat.wait(r"(word ){5}")
    chat.watch(2.5)
    shown = chat.text().count("word")
    chat.child.kill(signal.SIGKILL)
    [file] = (folder / "state" / "mmchat" / "chats").glob("*/chat.json")
    [turn] = json.loads(file.read_text())["turns"]
    assert turn["question"][0]["text"] == "Hi"
    words = turn["answer"].count("word")
    assert shown - 2 / (5 * 0.02) <= words <= shown + 5
    assert words > 0
    chat.child.close(force=True)


def test_help_on_a_narrow_terminal_breaks_between_words_and_hangs(folder):
    chat = ChatTerminal(folder, [], columns=40)
    chat.line("\\help")
    lines = chat.lines()
    assert max(map(len, lines)) <= 40
    at = lines.index("\\undo  Take back the last question and")
    assert lines[at + 1] == "    its answer"
    words = {word for line in lines for word in line.split()}
    for found in COMMANDS.values():  # no word is cut in two
        assert set(found.help.split()) <= words, found.name
    chat.send("\x04")
    assert chat.end() == 0


def test_a_slow_picture_is_waited_for_visibly_and_ctrl_c_stops_the_wait(folder):
    asked, go_on = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            go_on.wait(60)
            self.close_connection = True

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chat = ChatTerminal(folder, ["Hello."])
        chat.send(f"\\image http://127.0.0.1:{server.server_port}/slow.png\r")
        chat.wait(r"reading slow\.png \(\d+ s, Ctrl-C stops\)")
        chat.wait_until(asked.is_set, "request")
        chat.send("\x03")
        chat.wait("stopped")
        chat.settle()
        assert "reading slow.png" not in chat.text()
        chat.line("Hi")
        assert "Hello." in chat.lines()
        chat.send("\x04")
        assert chat.end() == 0
        go_on.set()
        server.shutdown()


def test_a_terminal_without_control_codes_gets_a_prompt_and_no_codes(folder):
    script = json.dumps({"answers": ["A **red** square.", "Yes."]})
    for last, code in (("\x04", 0), ("\x03", 130)):
        child = pexpect.spawn(
            sys.executable,
            ["-m", "tests.repl.fake_chat", script, "chat"],
            cwd=str(folder),
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "TERM": "dumb"},
            encoding="utf-8",
            timeout=SECONDS,
        )
        written = ""
        for line in ("red.png", "What is it?"):
            child.expect_exact("> ")
            written += child.before
            assert "Drop a picture into this window" in written
            child.sendline(line)
        child.expect_exact("> ")
        written += child.before
        child.send(last)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == code
        assert "attached red.png: 200 x 200 px" in written
        assert "A **red** square.\r\n" in written
        assert "\x1b" not in written + child.before
        assert child.before.endswith("\r\n")
