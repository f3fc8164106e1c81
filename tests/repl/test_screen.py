"""Toolbar, completion and exports, without a terminal."""

import io
import os
import re
import threading
import time

import pytest
from PIL import Image as PILImage
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mmchat.chat.session import ChatSession
from mmchat.cli.console import buffer_console
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import CheckpointError
from mmchat.repl.chat import Chat
from mmchat.repl.completion import ChatCompleter
from mmchat.repl.loading import LoadingModel
from mmchat.repl.loop import dropped_pictures
from mmchat.repl.screen import PlainScreen
from mmchat.repl.terminal_screen import TerminalScreen
from mmchat.repl.thumbnail import Thumbnails
from mmchat.repl.toolbar import toolbar_text
from tests.cli.fake_command import scripted_model


@pytest.fixture
def out():
    """What the chat writes, to stdout and stderr."""
    return io.StringIO()


@pytest.fixture
def chat(tmp_path, monkeypatch, out):
    PILImage.new("RGB", (1100, 500), (200, 0, 0)).save(tmp_path / "wide one.png")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "\x1b[31m.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    session = ChatSession(scripted_model(b"one", b"two"))
    return Chat(session, PlainScreen(out.write, out.write), SamplingParams(), tmp_path / "chats")


def offered(chat, text, *, tab=True):
    document = Document(text, len(text))
    found = ChatCompleter(chat).get_completions(document, CompleteEvent(completion_requested=tab))
    return [text[: len(text) + c.start_position] + c.text for c in found]


def test_the_toolbar_tells_model_context_pictures_and_speed(chat):
    def told(columns):
        return re.split(r"  +", toolbar_text(chat, columns))

    assert told(200) == ["llama3.2-11B", "cpu float32", "context 0/1,000", "0 pictures"]
    chat.line("wide one.png")
    assert told(200)[-1] == "1 picture, 1 new"
    chat.line("Hi")
    *_, context, pictures, speed = told(80)
    assert re.fullmatch(r"context \d+/1,000", context)
    assert pictures == "1 picture"
    assert re.fullmatch(r"[\d.]+ tokens/s", speed)


def loading_chat(load, tmp_path, out):
    model = scripted_model(b"one")
    loading = LoadingModel(model.spec, model.options, "loading it", load)
    session = ChatSession(loading.get)
    screen = PlainScreen(out.write, out.write)
    return Chat(session, screen, SamplingParams(), tmp_path / "chats", loading=loading)


def test_nothing_that_is_shown_while_the_model_is_loaded_waits_for_it(tmp_path, out):
    go = threading.Event()

    def load(stages):
        stages.note("slower than it could be")
        stages.show("loading it: 1 of 2 tensors")
        go.wait(60)
        return scripted_model(b"one")

    chat = loading_chat(load, tmp_path, out)
    assert toolbar_text(chat, 80) == "loading it   0 pictures"
    chat.loading.begin()
    while not chat.loading.notes or "1 of 2" not in chat.loading.stage:
        time.sleep(0.001)
    assert toolbar_text(chat, 80) == "loading it: 1 of 2 tensors   0 pictures"
    assert toolbar_text(chat, 12) == "loading it:"
    assert offered(chat, "\\set tem") == ["\\set temperature"]
    chat.line("\\system Be brief.")
    chat.say_notes()
    assert out.getvalue() == "the system prompt is changed\nslower than it could be\n"
    go.set()
    chat.line("Hi")
    assert out.getvalue().endswith("one\n")
    assert toolbar_text(chat, 200).startswith("llama3.2-11B   cpu float32   context")


def test_a_model_that_cannot_be_loaded_ends_the_chat_and_not_a_line(tmp_path, out):
    def load(_):
        raise CheckpointError("no weights")

    chat = loading_chat(load, tmp_path, out)
    with pytest.raises(CheckpointError, match="no weights"):
        chat.line("Hi")
    assert out.getvalue() == ""


@pytest.mark.parametrize("columns", [10, 20, 40, 60, 80, 200])
def test_the_toolbar_is_one_line_and_its_facts_stay_in_their_places(chat, columns):
    chat.session.loaded.max_seq_len = 131_072
    before = toolbar_text(chat, columns)
    chat.line("wide one.png")
    chat.line("Hi")
    after = toolbar_text(chat, columns)
    for line in (before, after):
        assert "\n" not in line
        assert len(line) < columns
    assert after.find("picture") == before.find("picture")
    assert (before.find("picture") > 0) == (columns >= 40)


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


def test_pages_that_are_written_wrongly_get_how_they_are_written(chat, out, tmp_path):
    (tmp_path / "paper.pdf").write_bytes(b"")
    chat.line("\\image paper.pdf#x")
    chat.line("./paper.pdf#two what is it?")
    *_, image, line = out.getvalue().splitlines()
    assert "'paper.pdf#x' does not exist; pages are written '#3', '#3-5' or '#1,4'" in image
    assert "'./paper.pdf#two'; pages are written '#3', '#3-5' or '#1,4'" in line


def test_a_terminal_that_draws_nothing_gets_lines_that_fit():
    said: list[str] = []
    screen = PlainScreen(
        said.append, said.append, out_columns=lambda: 30, err_columns=lambda: 30, quiet=False
    )
    screen.error("there is no command \\foo; did you mean \\forget?")
    screen.table([("\\save [NAME|PATH.json]", "Name the chat; a path gets a copy of it")])
    screen.say("no system prompt is set in this chat so far")
    lines = "".join(said).splitlines()
    assert max(map(len, lines)) <= 30
    assert " ".join(lines[:2]) == "mmchat: error: there is no command \\foo; did you mean"
    assert "    the chat; a path gets a" in lines


def test_help_names_keys_only_where_there_is_a_line_editor(chat, out):
    chat.line("\\help")
    assert "\\undo" in out.getvalue()
    assert "Tab" not in out.getvalue()


def test_tab_offers_files_of_a_schema(chat, tmp_path):
    (tmp_path / "animal.json").write_text("{}")
    assert offered(chat, f"\\set schema {tmp_path}/ani") == [f"\\set schema {tmp_path}/animal.json"]
    assert "\\set schema none" in offered(chat, "\\set schema ")


@pytest.mark.process
def test_json_is_shown_as_it_is_and_not_as_markdown(monkeypatch):
    written: list[str] = []
    screen = TerminalScreen(written.append, buffer_console, Thumbnails(), color=False)
    text = '{"a": "*x* `y`"}'
    model = scripted_model(text.encode())
    events = ChatSession(model).send("x")
    keyboard, keys = os.openpty()
    with os.fdopen(keys) as typed, os.fdopen(keyboard):
        monkeypatch.setattr("sys.stdin", typed)
        screen.answer(events, lambda: None, lambda piece: None, is_json=True)
    assert text in "".join(written)
