"""Boxes in answers: read, in pixels, drawn, in JSON and in the chat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from typer.testing import CliRunner

from mmchat.api import Model, load
from mmchat.chat.session import ChatSession
from mmchat.cli.app import app
from mmchat.conversation import Box, Conversation, Image, Message, Text, Turn
from mmchat.engine.sampling import SamplingParams
from mmchat.images.boxes import box_records, draw_boxes, in_pixels
from mmchat.models.qwen_vl.processor import boxes_in
from mmchat.repl import settings
from mmchat.repl.chat import Chat
from mmchat.repl.screen import PlainScreen
from tests.models.qwen_vl.folders import write_folder
from tests.models.qwen_vl.oracle import image

ANSWER = "<ref>击掌</ref><box>(517,508),(589,611)</box>"
CASES = {
    ANSWER: [("击掌", ((0.517, 0.508), (0.589, 0.611)))],
    "A <box>(0,0),(1000,999)</box>.": [(None, ((0.0, 0.0), (1.0, 0.999)))],
    "<ref> two dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>": [
        ("two dogs", ((0.001, 0.002), (0.003, 0.004))),
        ("two dogs", ((0.005, 0.006), (0.007, 0.008))),
    ],
    "<ref>a</ref><box>(1,2),(3,4)</box> and <box>(5,6),(7,8)</box>": [
        ("a", ((0.001, 0.002), (0.003, 0.004))),
        (None, ((0.005, 0.006), (0.007, 0.008))),
    ],
    "<ref>s</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>": [
        ("s", ((0.001, 0.002), (0.003, 0.004), (0.005, 0.006), (0.007, 0.008)))
    ],
    "<box>(9999,2),(3,4)</box>": [(None, ((1.0, 0.002), (0.003, 0.004)))],
    "<box>(1,2),(3,4)": [],
    "<box>(1,2)</box> <box>x</box> <box>(1,2),(3,4),(5,6)</box>": [],
    "<box>(-1,2),(3,4)</box>": [],
    "no boxes": [],
}


@pytest.mark.parametrize("text", CASES)
def test_whole_boxes_are_read_and_others_are_text(text):
    assert [(box.ref, box.points) for box in boxes_in(text)] == CASES[text]


def test_corners_are_pixels_of_the_picture_as_it_was():
    wide = Image(PILImage.new("RGB", (500, 200)), "wide.png", "x")
    [box] = boxes_in(ANSWER)
    assert in_pixels(box, wide) == [(258, 101), (294, 122)]
    assert box_records([box], wide) == [
        {"ref": "击掌", "box": [258, 101, 294, 122], "picture": "wide.png"}
    ]
    [quad] = boxes_in("<quad>(0,0),(100,0),(100,100),(0,100)</quad>")
    assert box_records([quad], wide) == [
        {"ref": None, "quad": [0, 0, 50, 0, 50, 20, 0, 20], "picture": "wide.png"}
    ]


def test_boxes_are_drawn_on_a_copy_in_the_colour_of_their_name():
    ground = Image(PILImage.new("RGB", (400, 300), (9, 9, 9)), "x", "x")
    points = ((0.25, 0.25), (0.75, 0.75))
    boxes = [Box(None, points), Box("a\nb" * 60, ((0.1, 0.1), (0.2, 0.2))), Box(None, points)]
    drawn = np.asarray(draw_boxes(boxes, ground))
    assert np.asarray(ground.pixels).max() == 9
    assert drawn[75, 200].tolist() == [255, 59, 48] == drawn[225, 200].tolist()
    assert drawn[30:33, 60].max(0).tolist() != [9, 9, 9]
    assert drawn[150, 200].tolist() == [9, 9, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("boxes") / "tiny-qwen")


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(folder, device="cpu")


@pytest.fixture
def png(tmp_path) -> str:
    image(0).pixels.save(tmp_path / "dog.png")
    return str(tmp_path / "dog.png")


def run(*arguments: str, code: int = 0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done


def test_generate_tells_and_draws_the_boxes_of_its_answer(folder, png, tmp_path, monkeypatch):
    """The tiny model answers nonsense, so an answer is put into its mouth."""
    ask = ("generate", str(folder), "-p", "dog", "-i", png, "-n", "2", "-t", "0", "--json")
    drawing = tmp_path / "out.png"
    assert json.loads(run(*ask).stdout)["boxes"] == []
    done = run(*ask, "--draw-boxes", str(drawing))
    assert "the answer has no boxes" in done.stderr
    assert not drawing.exists()
    monkeypatch.setattr("mmchat.models.qwen_vl.processor.boxes_in", lambda text: boxes_in(ANSWER))
    done = run(*ask, "--draw-boxes", str(drawing))
    assert json.loads(done.stdout)["boxes"] == [
        {"ref": "击掌", "box": [46, 30, 53, 37], "picture": png}
    ]
    with PILImage.open(drawing) as drawn:
        assert drawn.size == (90, 61)


@pytest.mark.parametrize(
    ("option", "said"),
    [("out.jpg", "end the name in .png"), ("dog.png", "would replace the picture")],
)
def test_a_drawing_is_a_png_and_no_input(folder, png, option, said):
    target = str(Path(png).with_name(option))
    ask = ("generate", str(folder), "-p", "x", "-i", png, "--draw-boxes", target)
    assert said in run(*ask, code=2).stderr
    assert "contradict each other" in run(*ask, "--dry-run", code=2).stderr


def test_families_without_boxes_say_so():
    done = run("generate", "tiny", "-p", "What is it?", "--draw-boxes", "out.png", code=2)
    assert "--draw-boxes does not fit tiny" in done.stderr


def chat_of(session: ChatSession, folder: Path, *, interactive: bool = True):
    said: list[str] = []
    screen = PlainScreen(said.append, said.append)
    screen.interactive = interactive
    screen.picture = lambda *shown: None
    return Chat(session, screen, SamplingParams(max_new_tokens=2), folder), said


def test_the_chat_shows_and_draws_the_boxes_of_the_last_answer(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = model.chat()
    chat, said = chat_of(session, tmp_path)
    chat.line("\\boxes")
    assert "nothing has been asked yet" in said.pop()
    question = Message("user", (image(0), Text("dog")))
    session.conversation = Conversation(None, (Turn(question, "A dog."),))
    chat.line("\\boxes")
    assert "the last answer has no boxes" in said.pop()
    session.conversation = Conversation(None, (Turn(question, ANSWER),))
    chat.line("\\boxes out.png")
    assert "击掌" in said[-1]
    assert "[46, 30, 53, 37]" in said[-1]
    with PILImage.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (90, 61)


def test_at_a_terminal_image_tags_let_a_question_open_what_it_names(model, tmp_path, png):
    session = model.chat()
    chat, said = chat_of(session, tmp_path)
    chat.line(f"<img>{png}</img> dog")
    assert session.conversation.images == []
    assert "image_tags" in settings.candidates(chat, "im")
    assert settings.candidates(chat, "image_tags o") == ["image_tags on", "image_tags off"]
    for wrong in ("\\set image_tags", "\\set image_tags maybe"):
        chat.line(wrong)
        assert "takes on or off" in said.pop()
    chat.line("\\set image_tags on")
    assert said.pop() == "image_tags is on\n"
    chat.line(f"<img>{png}</img> dog")
    assert [one.source for one in session.conversation.images] == [png]
    chat.line("<img>/nowhere/x.png</img>")
    assert "does not exist" in said.pop()
    chat.line("\\set image_tags off")
    chat.line(f"<img>{png}</img> dog")
    assert len(session.conversation.images) == 1


def test_in_a_pipe_they_stay_off(model, tmp_path):
    chat, said = chat_of(model.chat(), tmp_path, interactive=False)
    chat.line("\\set image_tags on")
    assert "image_tags is for a terminal" in said.pop()
    assert not chat.image_tags
