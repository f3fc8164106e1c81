import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mmchat.catalog.known import data_path
from mmchat.chat.session import ChatSession
from mmchat.cli import model_choice
from mmchat.cli.look import heat_of
from mmchat.conversation import Conversation
from mmchat.loading.options import LoadOptions

ROOT = Path(__file__).parents[2]
DOG = str(data_path("assets", "dog.jpg"))
ASK = ("look", "What's in this image?", DOG)


def test_the_words_of_the_answer_and_where_they_looked(run_real):
    done = run_real(*ASK, "-q")
    answer, heads, *rows = done.stdout.splitlines()
    assert heads == "word\tlooked at\tof its reading"
    assert [row.split("\t")[0] for row in rows] == answer.split()
    for _, place, share in (row.split("\t") for row in rows):
        x, y = map(int, place.split(", "))
        assert 0 <= x <= 187
        assert 0 <= y <= 179
        assert 0 < float(share.rstrip("%")) <= 100
    assert (done.stderr, done.exit_code) == ("", 0)


def test_the_objects_of_the_documented_picture_are_where_their_words_looked(run_real):
    pages = [(ROOT / page).read_text("utf-8") for page in ("README.md", "docs/ask.md")]
    lines = re.findall(r"(?m)^mmchat look (.*)$", "\n".join(pages))
    assert len(lines) == 5
    assert all("assets/street.jpg" in line for line in lines)
    done = run_real("look", ASK[1], str(data_path("assets", "street.jpg")), "-q")
    rows = [row.split("\t") for row in done.stdout.splitlines()[2:]]
    seen = {word.strip(",."): int(place.partition(",")[0]) for word, place, _ in rows}
    between = {"car": (20, 105), "tree": (147, 198), "house": (229, 314)}  # pixels from the left
    assert all(left <= seen[word] <= right for word, (left, right) in between.items()), seen


@pytest.mark.slow
def test_a_picture_and_a_page_are_written(run_real, tmp_path):
    done = run_real(*ASK, "--word", "dog", "-o", str(tmp_path / "out.png"), "-q")
    assert (len(done.stdout.splitlines()), done.exit_code) == (3, 0)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 500
    assert run_real(*ASK, "-o", str(tmp_path / "out.html")).exit_code == 0
    assert 'alt="' in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize("args", [(*ASK, "--json"), ("generate", *ASK[1:], "--json", "--heat")])
def test_json_has_the_heat(run_real, args):
    done = run_real(*args, "-q")
    record = json.loads(done.stdout)
    assert [word["text"] for word in record["heat"]["words"]] == record["text"].split()
    assert record["heat"]["pictures"][0]["source"] == DOG


def test_generate_has_none_unasked(run_real):
    assert "heat" not in json.loads(run_real("generate", *ASK[1:], "--json", "-q").stdout)


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("look", "What?"), 2, "no picture to look at; give one with -i"),
        ((*ASK, "-o", "out.jpg"), 2, "end the name in .png or .html"),
        ((*ASK, "-o", "no/such/out.png"), 7, "no/such"),
        (("look", "What?", "no-such.png"), 4, "no-such.png"),
        ((*ASK, "--word", "cow"), 2, "'cow' is no word of the answer; its words are: 1 "),
        ((*ASK, "-m", "llava-1.5-7b"), 2, "llava-1.5-7b-hf has no cross-attention"),
        ((*ASK, "-m", "llama3.2-11B-base"), 2, "is a base model, which answers no question"),
        (("generate", *ASK[1:], "--json", "--heat", "-m", "qwenvl"), 2, "no cross-attention"),
        (("generate", *ASK[1:], "--heat"), 2, "--heat needs --json"),
        (("generate", *ASK[1:], "--heat", "--json", "--raw"), 2, "contradict"),
        (("generate", "-p", "Hi", "--heat", "--json"), 2, "--heat needs a picture to look at"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(run_real, args, code, reason):
    done = run_real(*args, "-q")
    assert done.exit_code == code
    assert reason in done.stderr
    assert done.stderr.startswith("mmchat: error: ")
    assert "Traceback" not in done.stderr


def test_the_picture_itself_is_not_replaced(run_real, tmp_path):
    picture = tmp_path / "dog.png"
    with Image.open(DOG) as dog:
        dog.save(picture)
    before = picture.read_bytes()
    done = run_real("look", "What?", str(picture), "-o", str(picture))
    assert done.exit_code == 2
    assert "would replace the picture" in done.stderr
    assert picture.read_bytes() == before


def test_nothing_is_heat_where_there_is_no_picture():
    session = SimpleNamespace(conversation=Conversation())
    assert heat_of(session, pytest.fail, SimpleNamespace(text="Hi")) == {"heat": None}


def test_it_is_computed_once(run_real, monkeypatch):
    counted = []
    real = ChatSession.look
    monkeypatch.setattr(ChatSession, "look", lambda self: counted.append(self) or real(self))
    assert run_real(*ASK, "--json", "--word", "dog", "-q").exit_code == 0
    assert len(counted) == 1


def text_alone(monkeypatch):
    source = LoadOptions().find()
    source = replace(source, spec=replace(source.spec, text_only=True))
    monkeypatch.setattr(LoadOptions, "find", lambda *_, **__: source)
    monkeypatch.setattr(model_choice, "load", lambda *_: pytest.fail("loaded"))


@pytest.mark.parametrize(
    "args",
    [
        ASK,
        ("generate", "What?", DOG),
        ("chat", "-i", DOG),
        ("batch", DOG, "-o", "out.jsonl"),
        ("find", "a dog", DOG),
    ],
)
def test_a_checkpoint_without_vision_refuses_pictures_before_it_is_loaded(
    run_real, args, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    text_alone(monkeypatch)
    done = run_real(*args)
    assert done.exit_code == 2
    assert "holds the language model alone, which sees no pictures" in done.stderr
