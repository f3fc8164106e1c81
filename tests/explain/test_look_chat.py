r"""`\look` in the chat, and models that do not tell."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image as PILImage

import mmchat
from mmchat.catalog.find import find_model
from mmchat.catalog.known import data_path
from mmchat.conversation import Conversation
from mmchat.errors import UsageError
from mmchat.explain.look import check_family
from mmchat.repl.chat import Chat
from mmchat.repl.screen import PlainScreen


@pytest.fixture(scope="module")
def tiny():
    return mmchat.load("tiny")


@pytest.fixture
def chat(tiny, tmp_path):
    out = io.StringIO()
    screen = PlainScreen(out.write, out.write)
    chat = Chat(tiny.chat(), screen, tiny.sampling_defaults, tmp_path / "chats")
    chat.out = out
    return chat


def told(chat, line):
    chat.out.seek(0)
    chat.out.truncate()
    chat.line(line)
    return chat.out.getvalue()


def test_look_needs_an_answer_and_a_picture(chat):
    assert "nothing has been asked yet" in told(chat, "\\look")
    told(chat, "Hello!")
    assert "no picture" in told(chat, "\\look")


@pytest.mark.slow
def test_look_tells_the_words_and_writes_files(chat, tmp_path):
    told(chat, f"\\image {data_path('assets/dog.jpg')} What's in this image?")
    words = chat.session.last_turn().answer.split()
    rows = told(chat, "\\look")
    assert rows.splitlines()[1].split() == ["word", "looked", "at", "of", "its", "reading"]
    assert all(word in rows for word in words)
    [saved] = re.findall(r"^wrote '(.*mmchat-look-.*\.png)'$", rows, re.MULTILINE)  # not drawn
    with PILImage.open(saved) as drawn:
        assert drawn.width > 500
    Path(saved).unlink()
    chat.screen.draws = "blocks"
    assert "wrote" not in told(chat, "\\look")
    chat.screen.draws = "off"
    alone = told(chat, f"\\look {words[-1]} {tmp_path / 'a.png'}")
    assert words[0] + " " not in alone.replace(str(tmp_path), "")
    with PILImage.open(tmp_path / "a.png") as drawn:
        assert drawn.width > 500
    told(chat, f"\\look {tmp_path / 'a.html'}")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert "is no word of the answer" in told(chat, "\\look aardvark")


def test_a_family_without_cross_attention_says_so():
    spec = find_model("llava-1.5-7b", checkpoint_required=False).spec
    with pytest.raises(UsageError, match=r"llava-1.5-7b.* has no cross-attention"):
        check_family(spec)


def test_programs_say_so(tiny, monkeypatch):
    """Whatever reads the batch without telling: nothing is shown as if it had been read."""
    session = tiny.chat()
    list(session.send("What's in this image?", data_path("assets/dog.jpg")))
    real = type(tiny.runtime).forward
    monkeypatch.setattr(
        type(tiny.runtime),
        "forward",
        lambda runtime, batch, cache: real(runtime, replace(batch, watch=None), cache),
    )
    with pytest.raises(UsageError, match="programs do not tell where they look"):
        session.look()


def test_the_model_that_answered_is_looked_into(tiny, monkeypatch):
    """Not the one that answers from now on, as after `\\adapter off`."""
    used = []
    monkeypatch.setattr("mmchat.explain.look.look", lambda loaded, *_: used.append(loaded))
    session = tiny.chat()
    list(session.send("What's in this image?", data_path("assets/dog.jpg")))
    session.loaded = other = replace(tiny)
    session.look()
    session.conversation = Conversation.of(session.messages)  # as one that was loaded
    session.look()
    assert used[0] is tiny
    assert used[1] is other
