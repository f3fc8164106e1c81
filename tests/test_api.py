"""Whatever is given to the Python interface: it works, or the error says what was wrong with it."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import mmchat
from mmchat.chat.session import ChatSession
from mmchat.errors import MmchatError, UsageError
from tests.fake_model import fake_model

ODD = [
    None,
    5,
    2.5,
    True,
    b"dog",
    "dog",
    object(),
    {"a": 1},
    [],
    ["dog", 5],
    (),
    {5},
    "\0",
]


def finish(events):
    *_, last = events
    assert isinstance(last, mmchat.Finished)
    return last


@pytest.fixture(scope="module")
def dog(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "dog.png"
    PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    return path


# A picture in each form that a program may hold it in.
FORMS = {
    "a string": str,
    "a path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "a bytearray": lambda path: bytearray(path.read_bytes()),
    "a stream": lambda path: io.BytesIO(path.read_bytes()),
    "an Image": mmchat.load_image,
    "Pillow": lambda path: PILImage.open(io.BytesIO(path.read_bytes())),
    "numpy": lambda path: np.array(PILImage.open(path)),
    "torch": lambda path: torch.tensor(np.array(PILImage.open(path))).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_picture_and_a_list_of_it_are_the_same_question(form, dog):
    """The fake model's processor reads no picture, so the question itself is looked at."""
    chat = ChatSession(fake_model(*[b"A dog."] * 3))
    expected = mmchat.load_image(dog).content_hash
    for images in (form(dog), [form(dog)], (form(dog),)):
        chat.reset()
        finish(chat.send("What is it?", images))
        assert [image.content_hash for image in chat.messages[0].images] == [expected]


def test_an_open_file_is_a_picture(dog):
    chat = ChatSession(fake_model(b"A dog."))
    with dog.open("rb") as file:
        finish(chat.send("What is it?", file))
    assert len(chat.messages[0].images) == 1


WRONG = {
    "text": (lambda chat: chat.send(5), "text must be a string, not int 5"),
    "text of bytes": (lambda chat: chat.send(b"Hi"), "text must be a string, not bytes"),
    "images": (lambda chat: chat.send("Hi", 5), "a picture comes from a path"),
    "images in a dict": (lambda chat: chat.send("Hi", {"url": "x"}), "not from dict"),
    "sampling": (
        lambda chat: chat.send("Hi", sampling={"seed": 1}), "sampling must be a SamplingParams, not"
    ),
    "message": (lambda chat: chat.ask("Hi"), "message must be a Message, not str 'Hi'"),
    "raw text": (lambda chat: chat.complete(None), "text must be a string, not NoneType"),
    "budget": (lambda chat: chat.budget("Hi"), "message must be a Message, not str 'Hi'"),
    "system": (lambda chat: ChatSession(chat.loaded, 5), "system must be a string, not int"),
    "model": (lambda chat: ChatSession("tiny"), "needs a model of mmchat.load, not str"),
    "messages": (lambda chat: setattr(chat, "messages", "Hi"), "messages must be a list of"),
    "a message": (lambda chat: setattr(chat, "messages", ["Hi"]), "item of messages must be a"),
    "role": (lambda chat: mmchat.Message("bot", ()), "a role is one of system, user, assistant"),
    "content": (lambda chat: mmchat.Message("user", 5), "content of a message must be a list"),
    "part": (lambda chat: mmchat.Message("user", ["Hi"]), "part of a message must be a Text or an"),
    "Text": (lambda chat: mmchat.Text(5), "the text of a message must be a string, not int"),
    "alpha": (
        lambda chat: mmchat.load_image(b"", alpha="black"),
        "alpha must be 'white' or 'drop', not 'black'",
    ),
    "name": (lambda chat: mmchat.load_image(b"", name=5), "name must be a string, not int 5"),
    "fetch": (
        lambda chat: mmchat.load_image(b"", allow_fetch="no"), "allow_fetch must be True or False"
    ),
    "pixels": (lambda chat: mmchat.Image("dog.jpg", "dog", "0"), "; mmchat.load_image makes one"),
    "pixels with alpha": (
        lambda chat: mmchat.Image(PILImage.new("RGBA", (4, 4)), "dog", "0"), "not of mode 'RGBA'"
    ),
    "hash": (
        lambda chat: mmchat.Image(PILImage.new("RGB", (4, 4)), "dog", None),
        "content_hash must be a string, not NoneType None",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("act", "message"), WRONG.values(), ids=WRONG)
def test_arguments_of_another_type_are_named(act, message):
    chat = ChatSession(fake_model(b"A dog."))
    with pytest.raises(UsageError, match=re.escape(message)):
        list(act(chat) or ())
    assert finish(chat.send("Hi")).text == "A dog."


def test_the_content_of_a_message_may_be_its_text_or_a_list():
    assert mmchat.Message("user", "Hi") == mmchat.Message("user", [mmchat.Text("Hi")])
    assert mmchat.Message("user", mmchat.Text("Hi")).content == (mmchat.Text("Hi"),)


def arguments():
    names = ("name", "checkpoint_path", "tokenizer_path", "params_path", "device", "dtype",
             "max_seq_len", "text_only", "alpha", "quantize", "quantize_keep", "compile",
             "progress")  # fmt: skip
    return [(name, value) for name in names for value in ODD]


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in arguments()))
def test_every_wrong_argument_of_load_is_an_error_of_ours(monkeypatch, name):
    """Or no error at all, where the value has a meaning. The model itself is not loaded."""
    monkeypatch.setattr("mmchat.loading.loader._fill", lambda *_, **__: pytest.skip("it may load"))
    for other, value in arguments():
        if other != name:
            continue
        try:
            mmchat.load(**{name: value})
        except MmchatError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert str(error).isprintable()  # noqa: PT017
        except pytest.skip.Exception:
            pass


def test_every_wrong_argument_of_a_chat_is_an_error_of_ours():
    chat = ChatSession(fake_model(*[b"A dog."] * 200))
    for value in ODD:
        for act in (
            lambda v: chat.send(v), lambda v: chat.send("Hi", v),
            lambda v: chat.send("Hi", [v]), lambda v: chat.send("Hi", (), v),
            lambda v: chat.ask(v), lambda v: chat.edit(v), lambda v: chat.complete(v),
            lambda v: chat.complete("Hi", v), lambda v: chat.retry(v),
            lambda v: chat.budget(v), lambda v: chat.turns_over_budget(v),
            lambda v: ChatSession(v), lambda v: ChatSession(chat.loaded, v),
            lambda v: setattr(chat, "messages", v), lambda v: mmchat.load_image(v),
            lambda v: mmchat.load_image(b"", alpha=v), lambda v: mmchat.load_image(b"", name=v),
            lambda v: chat.send("Hi", mmchat.Image(v, "dog", "0")),
            lambda v: mmchat.Image(PILImage.new("RGB", (4, 4)), v, v, v),
            lambda v: mmchat.Message(v, ()), lambda v: mmchat.Message("user", v),
            lambda v: mmchat.SamplingParams(stop=v), lambda v: mmchat.SamplingParams(seed=v),
        ):  # fmt: skip
            try:
                found = act(value)
                if hasattr(found, "__next__"):
                    list(found)
            except MmchatError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_dtypes_and_devices_of_torch_are_known_by_themselves():
    model = mmchat.load(
        "tiny", device=torch.device("cpu"), dtype=torch.bfloat16, max_seq_len=np.int64(99)
    )
    assert (model.dtype, model.max_seq_len) == (torch.bfloat16, 99)
    with pytest.raises(UsageError, match="--quantize-keep head keeps nothing"):
        mmchat.load("tiny", quantize_keep="head")


@pytest.mark.parametrize(("args", "options"), [((), {"quantise": "int8"}), (("tiny", "cpu"), {})])
def test_wrong_arguments_name_the_function_that_was_called(args, options):
    with pytest.raises(TypeError, match=r"^load\(\): "):
        mmchat.load(*args, **options)
