"""`model.ask`: a text and pictures, or messages in OpenAI's form, in; a text out."""

from __future__ import annotations

import base64
import json
import pydoc
import re
from pathlib import Path

import pytest
from PIL import Image as PILImage

import mmchat
from mmchat.chat.foreign import as_messages, as_request
from mmchat.engine.sampling import SamplingParams
from mmchat.errors import ImageError, SchemaError, UsageError

DOG = str(Path(__file__).parents[1] / "assets" / "dog.jpg")
QUESTION = "What's in this image?"
TEXT = {"type": "text", "text": QUESTION}
PICTURE = {"type": "image_url", "image_url": {"url": DOG}}


@pytest.fixture(scope="module")
def model():
    return mmchat.load("tiny", device="cpu")


def test_a_text_and_pictures_get_a_text(model):
    assert model.ask(QUESTION, DOG) == "A brown dog."
    assert model.ask(QUESTION, DOG, sampling=SamplingParams(max_new_tokens=1)) == "A"


@pytest.mark.parametrize(
    "question",
    [
        [{"role": "user", "content": [PICTURE, TEXT]}],
        ({"role": "user", "content": [PICTURE, TEXT]},),
        {
            "model": "any",
            "messages": [{"role": "user", "content": [PICTURE, TEXT]}],
            "max_tokens": 9,
            "temperature": 0,
            "stop": "!",
        },
    ],
)
def test_messages_and_requests_in_the_form_of_openai_do_as_well(model, question):
    assert model.ask(question) == "A brown dog."


def test_earlier_turns_are_seen(model):
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [PICTURE, TEXT]},
        {"role": "assistant", "content": "A brown dog."},
        {"role": "user", "content": "What colour is it?"},
    ]
    assert model.ask(talk) == "It is brown."


def test_parts_keep_their_order_and_pictures_may_be_data_urls():
    data = base64.b64encode(Path(DOG).read_bytes()).decode()
    url = {"type": "image_url", "image_url": f"data:image/unknown;base64,{data}"}
    [message] = as_messages([{"role": "user", "content": [TEXT, url, TEXT, PICTURE]}], "white")
    assert [type(part).__name__ for part in message.content] == ["Text", "Image", "Text", "Image"]
    assert message.images[0].content_hash == message.images[1].content_hash


def test_the_pages_of_a_document_stand_where_it_stood(tmp_path):
    pages = [PILImage.new("RGB", (30, 40), colour) for colour in ("red", "lime", "blue")]
    pages[0].save(tmp_path / "paper.pdf", save_all=True, append_images=pages[1:])
    paper = {"type": "image_url", "image_url": str(tmp_path / "paper.pdf#2-3")}
    [message] = as_messages([{"role": "user", "content": [paper, TEXT, PICTURE]}], "white")
    assert [type(part).__name__ for part in message.content] == ["Image", "Image", "Text", "Image"]
    names = [image.source.rpartition("/")[2] for image in message.images]
    assert names == ["paper.pdf page 2", "paper.pdf page 3", "dog.jpg"]


def test_settings_of_a_request_are_those_of_sampling():
    given = {
        "messages": [],
        "max_completion_tokens": 7,
        "stop": ["a", "b"],
        "seed": 3,
        "top_k": None,
    }
    _, sampling = as_request(given, SamplingParams(temperature=0.5, top_k=4))
    expected = SamplingParams(temperature=0.5, top_k=4, max_new_tokens=7, stop=("a", "b"), seed=3)
    assert sampling == expected


ANIMAL = {
    "type": "object",
    "properties": {"a": {"enum": ["dog"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_an_answer_obeys_a_schema(model):
    sampling = mmchat.SamplingParams(temperature=0.0, max_new_tokens=200)
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}
    request = {"messages": [{"role": "user", "content": "What is it?"}], "response_format": form}
    answers = [
        model.ask("What is it?", sampling=sampling, schema=ANIMAL),
        model.ask(request, sampling=sampling),
        list(model.chat().send("What is it?", (), sampling, schema=json.dumps(ANIMAL)))[-1].text,
    ]
    assert [json.loads(answer)["a"] for answer in answers] == ["dog"] * 3
    with pytest.raises(SchemaError, match='"not" cannot be enforced'):
        model.ask("What is it?", schema={"not": {}})


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ([], "messages is empty; give at least one of the role user"),
        (3, "question must be a text, messages or a dictionary, not int 3"),
        ([3], "messages[0] must be {'role': …, 'content': …}, not int 3"),
        ({"messages": 1}, "messages must be a list of {'role': …, 'content': …}, not int 1"),
        ({"messages": [], "tools": []}, "'tools' of a request is not known; leave it out"),
        ({"messages": [], "n": 2}, "n must be 1, not 2"),
        ({"messages": [], "response_format": {"type": "xml"}}, "response_format of type 'xml' is"),
        ({"messages": [], "response_format": {"type": "json_schema"}}, "response_format of type"),
        ([{"role": "assistant", "content": "x"}], "the last message must be of the role user, not"),
        (
            [{"role": "x", "content": "x"}],
            "a role is one of system, user, assistant, tool, not 'x'",
        ),
        ([{"role": "user"}], "messages[0]['content'] must be a text or a list of parts, not None"),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            "messages[0]['content'][0] is of type 'audio'; parts are text and image_url with a url",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0]['content'][0]['image_url']['url'] must be an address, a path or",
        ),
    ],
)
def test_another_form_is_said(model, question, reason):
    with pytest.raises(UsageError, match=f"^{re.escape(reason)}"):
        model.ask(question)


def test_pictures_are_opened_all_of_them_or_none(model):
    wrong = {"type": "image_url", "image_url": {"url": "nothere.png"}}
    with pytest.raises(ImageError, match=r"'nothere\.png' does not exist"):
        model.ask([{"role": "user", "content": [PICTURE, wrong, TEXT]}])
    with pytest.raises(UsageError, match="pictures of messages stand in them"):
        model.ask([{"role": "user", "content": [TEXT]}], DOG)


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("generate_config", "sampling=mmchat.SamplingParams(…) of ask and send says that"),
        ("urls", "pictures are given to ask and send"),
        ("torch_dtype", "dtype=… says that"),
        ("load_in_4bit", "quantize='int4' says that"),
        ("nonsense", ""),
    ],
)
def test_arguments_of_other_programs_get_a_lead(name, lead):
    reason = f"load(): got an unexpected keyword argument '{name}'" + (f"; {lead}" if lead else "")
    with pytest.raises(TypeError, match=f"^{re.escape(reason)}$"):
        mmchat.load("tiny", **{name: 1})


def test_a_model_is_shown_in_a_line(model):
    assert repr(model) == "<mmchat.Model tiny: cpu, float32, context 131072>"


def test_help_begins_with_the_names_that_matter():
    page = pydoc.plain(pydoc.render_doc(mmchat))
    names = ["load", "Model", "ChatSession", "SamplingParams", "TextDelta", "MmchatError"]
    found = re.findall(r"^    (\w+)  +\S", page, re.M)
    assert found[: len(names)] == names
    assert set(names) <= set(mmchat.__all__)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda model: model.chat().send("Hi", urls=["x"]), "ChatSession.send() has no 'urls'; im"),
        (lambda model: model.chat().complete("Hi", image="x"), "'image'; images=… takes files and"),
        (lambda model: model.ask("Hi", images=["x"]), "Model.ask() has no 'images'; pictures s"),
        (lambda model: model.ask("Hi", max_tokens=3), "sampling=mmchat.SamplingParams(…) of ask"),
        (lambda model: model.ask("Hi", foo=3), "got an unexpected keyword argument 'foo'"),
        (lambda _: SamplingParams(max_tokens=3), "SamplingParams() has no 'max_tokens'; max_new_t"),
    ],
)  # fmt: skip
def test_arguments_of_questions_and_sampling_get_one_too(model, call, reason):
    with pytest.raises(TypeError, match=re.escape(reason)):
        call(model)
