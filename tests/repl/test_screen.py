"""Toolbar, completion and exports, without a terminal."""

import io

import pytest
from PIL import Image as PILImage
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mmchat.chat.session import ChatSession
from mmchat.engine.sampling import SamplingParams
from mmchat.repl.chat import Chat
from mmchat.repl.completion import ChatCompleter
from mmchat.repl.loop import dropped_pictures
from mmchat.repl.screen import PlainScreen
from mmchat.repl.toolbar import toolbar_text
from tests.cli.fake_command import scripted_model


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


def test_the_rows_of_tiles_are_told_and_drawn(chat, tmp_path):
    chat.line("wide one.png")
    chat.line("\\tiles 1 tiles.png")
    assert chat.first_error == 0
    with PILImage.open(tmp_path / "tiles.png") as drawn:
        assert drawn.width > 500
