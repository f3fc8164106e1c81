"""Toolbar, thumbnails, completion and exports, without a terminal."""

import io

import pytest
from PIL import Image as PILImage
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mmchat.cli.console import buffer_console
from mmchat.errors import MissingExtra
from mmchat.repl import thumbnail
from mmchat.repl.chat import Chat
from mmchat.repl.completion import ChatCompleter
from mmchat.repl.loop import dropped_pictures
from mmchat.repl.screen import PlainScreen
from mmchat.repl.toolbar import toolbar_text
from mmchat.sampling import SamplingParams
from mmchat.session import ChatSession
from tests.cli.fake_command import scripted_model
from tests.repl.screens import Terminal


@pytest.fixture
def chat(tmp_path, monkeypatch):
    PILImage.new("RGB", (1100, 500), (200, 0, 0)).save(tmp_path / "wide one.png")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "\x1b[31m.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    session = ChatSession(scripted_model(b"one", b"two"))
    return Chat(session, PlainScreen(out.write, out.write), SamplingParams(), tmp_path / "chats")


def offered(chat, text, *, tab=True):
    document = Document(text, len(text))
    found = ChatCompleter(chat).get_completions(document, CompleteEvent(completion_requested=tab))
    return [text[: len(text) + c.start_position] + c.text for c in found]


def test_the_toolbar_tells_model_context_pictures_and_speed(chat):
    assert toolbar_text(chat, 200) == (
        "Llama-3.2-11B-Vision-Instruct, cpu float32 | context 0/1,000"
    )
    chat.line("wide one.png")
    assert toolbar_text(chat, 200).endswith("| wide one.png 1x2")
    chat.line("Hi")
    assert "| 1 picture in the chat | " in toolbar_text(chat, 200)
    assert toolbar_text(chat, 200).split(" | ")[-1].endswith(" s")
    assert all(len(line) < 50 for line in toolbar_text(chat, 50).split("\n"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\und", ["\\undo"]),
        ("\\re", ["\\replace", "\\retry"]),
        ("/und", ["/undo"]),
        ("\\set temp", ["\\set temperature"]),
        ("\\set seed ", ["\\set seed none", "\\set seed 0"]),
        ("\\export h", ["\\export html"]),
        ("\\help und", ["\\help undo"]),
        ("\\image wi", ["\\image wide\\ one.png"]),
        ("\\image cli", ["\\image clipboard"]),
        ("\\load a", ["\\load a\\ folder/"]),
        ("what is ./wi", ["what is ./wide\\ one.png"]),
        ("what is wi", []),
    ],
)
def test_tab_offers_commands_values_and_paths(text, found, chat):
    assert offered(chat, text) == found


def test_names_that_would_drive_the_terminal_are_not_offered(chat):
    assert offered(chat, "\\image ") == ["\\image a\\ folder/", "\\image wide\\ one.png"]


def test_addresses_are_offered_again(chat):
    chat.addresses.append("https://example.org/a.png")
    assert offered(chat, "\\image htt") == ["\\image https://example.org/a.png"]


def test_only_local_files_are_attached_on_paste(chat, tmp_path):
    path = str(tmp_path / "wide one.png")
    assert dropped_pictures(path + " ") == (path,)
    assert dropped_pictures(f"'{path}'\n") == (path,)
    assert dropped_pictures("https://example.org/a.png") == ()
    assert dropped_pictures(f"What is {path}") == ()
    assert dropped_pictures("./gone.png") == ()
    assert dropped_pictures("  \n") == ()


@pytest.mark.parametrize("size", [(300, 10), (10, 300), (1, 1), (640, 480)])
def test_thumbnails_keep_to_their_room(size, monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(columns=60, rows=20)
    picture = PILImage.new("RGB", size, (1, 2, 3))
    terminal.write(thumbnail.draw(picture, "blocks", buffer_console, 60))
    lines = terminal.lines()
    assert 1 <= len(lines) <= thumbnail.ROWS
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= thumbnail.COLUMNS
    assert terminal.screen.buffer[0][0].fg == "010203"
    assert thumbnail.draw(picture, "off", buffer_console, 60) == ""


def test_kitty_without_the_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "textual_image", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmchat\[thumbnails\]'"):
        thumbnail.choose("kitty")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert thumbnail.choose("auto") == "blocks"
    monkeypatch.setenv("TERM", "dumb")
    assert thumbnail.choose("auto") == "off"


def test_the_rows_of_tiles_are_told_and_drawn(chat, tmp_path):
    chat.line("wide one.png")
    chat.line("\\tiles 1 tiles.png")
    assert chat.first_error == 0
    with PILImage.open(tmp_path / "tiles.png") as drawn:
        assert drawn.width > 500
