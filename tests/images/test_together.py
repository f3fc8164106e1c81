"""The pictures of one prompt or chat are bounded together, before the first of them is decoded."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmchat import limits
from mmchat.chat.session import ChatSession
from mmchat.conversation import Conversation, Turn, question
from mmchat.errors import ImageError, MemoryError_
from mmchat.images import from_pil, load_image, load_images, worker
from mmchat.repl import saving
from tests.chat.test_session import finish
from tests.fake_model import fake_model

SIZE = 40, 25  # 1,000 pixels
TOO_MANY = r"4,000 pixels together; at most 3,000"


def red(level: int) -> PILImage.Image:
    return PILImage.new("RGB", SIZE, (level, 0, 0))


def file(level: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    red(level).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def decoded(monkeypatch):
    """Room for three pictures; the requests that decode one."""
    monkeypatch.setattr(limits, "IMAGES_PIXELS", 3_000)
    requests, ask = [], worker.Worker.ask

    def asked(self, request, data, *more):
        if not request.keys() & {"only_size", "only_pages"}:
            requests.append(request)
        return ask(self, request, data, *more)

    monkeypatch.setattr(worker.Worker, "ask", asked)
    return requests


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_sizes_are_read_before_the_first_is_decoded(kind, decoded):
    files = [file(level, kind) for level in range(4)]
    with pytest.raises(MemoryError_, match=TOO_MANY):
        load_images(files)
    assert decoded == []
    assert len(load_images(files[:3])) == len(decoded) == 3


def test_those_that_are_there_already_count_and_each_once(decoded):
    image = load_image(file(1))
    assert len(load_images([file(2), image, file(3)], beside=[image, image])) == 3
    with pytest.raises(MemoryError_, match=TOO_MANY):
        load_images([file(2), file(3)], beside=[image, from_pil(red(4))])


@pytest.mark.parametrize(
    "held", [red, lambda n: np.array(red(n)), lambda n: torch.tensor(np.array(red(n)))]
)
def test_pictures_of_a_program_count(held, decoded, monkeypatch):
    monkeypatch.setattr("mmchat.images.upright_picture", lambda source: pytest.fail("converted"))
    with pytest.raises(MemoryError_, match=TOO_MANY):
        load_images([held(level) for level in range(4)])


def test_a_file_that_holds_more_than_its_header_says_is_refused_as_well(decoded, monkeypatch):
    ask = worker.Worker.ask

    def tiny(self, request, data, *more):
        answer = ask(self, request, data)
        return {"size": (1, 1)} if request.get("only_size") else answer

    monkeypatch.setattr(worker.Worker, "ask", tiny)
    with pytest.raises(MemoryError_, match=TOO_MANY):
        load_images(list(map(file, range(9))))
    assert len(decoded) == 4


def test_a_bad_one_is_named(decoded):
    with pytest.raises(ImageError, match=r"^'second' "):
        load_images([file(1), file(2)[:20]], names=["first", "second"])
    assert decoded == []


def test_sixteen_pictures_of_a_camera_fit_and_their_files_are_bounded_too(monkeypatch):
    assert limits.IMAGES_PIXELS >= 16 * 4000 * 3000
    monkeypatch.setattr(limits, "IMAGES_BYTES", 3 * len(file(1)) - 1)
    with pytest.raises(MemoryError_, match="the files of the pictures"):
        load_images([file(1)] * 3)


def test_a_chat_holds_so_many_over_all_turns(decoded):
    chat = ChatSession(fake_model(*[b"Red."] * 3))
    finish(chat.send("What?", [file(1), file(2)]))
    with pytest.raises(MemoryError_, match=TOO_MANY):
        finish(chat.send("And?", [file(3), red(4)]))
    assert len(chat.messages) == 2
    finish(chat.send("And?", file(3)))


@pytest.mark.parametrize("name", ["chat", "chat.json"])
def test_a_saved_chat_is_not_decoded_if_it_holds_more(name, decoded, tmp_path):
    turns = tuple(Turn(question("?", [from_pil(red(level))] * 2), "Red.") for level in range(4))
    for count in (3, 4):
        chat = saving.SavedChat(Conversation(None, turns[:count]), "tiny")
        saving.write(tmp_path / name, chat)
        if count == 3:
            assert len(saving.read(tmp_path / name).conversation.images) == 6
    decoded.clear()
    with pytest.raises(MemoryError_, match=TOO_MANY):
        saving.read(tmp_path / name)
    assert decoded == []
