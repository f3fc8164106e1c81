"""`mmchat find` with the built-in model, in this process."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import mmchat
from mmchat import images
from mmchat.batch import ranking
from mmchat.cli import console, model_choice
from mmchat.errors import ImageError
from mmchat.loading.options import LoadOptions
from tests.cli.conftest import Command

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def tiny() -> mmchat.Model:
    return mmchat.load(device="cpu", dtype="float32")


@pytest.fixture
def find(tiny, monkeypatch, tmp_path):
    """`mmchat find` in a folder with some pictures."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("dog.jpg", "street.jpg", "fish.jpg", "shapes.jpg"):
        shutil.copy(ASSETS / name, "in")
    monkeypatch.setattr(model_choice, "load", lambda *_: tiny)
    return lambda *args: Command(lambda: None)("find", *args)


@pytest.mark.parametrize(
    ("text", "name"), [("a dog", "dog"), ("a red heart", "shapes"), ("a blue car", "street")]
)
def test_the_picture_that_shows_it_is_first(find, text, name):
    done = find(text, "in", "-q")
    head, first, *others = done.stdout.splitlines()
    assert (head, done.stderr, done.exit_code) == ("LIKELIHOOD\tPICTURE", "", 0)
    assert first.endswith(f"\tin/{name}.jpg")
    assert len(others) == 3
    shares = [float(line.partition(" ")[0]) for line in (first, *others)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 50 > shares[1]


def test_the_score_is_the_probability_of_yes(find, tiny):
    [best] = json.loads(find("a dog", "in", "-q", "--json", "--top", "1").stdout)
    sampling = mmchat.SamplingParams(temperature=0, max_new_tokens=1, logprobs=2)
    session = tiny.chat()
    *_, end = session.send("Is there a dog in this image?", [best["image"]], sampling)
    assert end.text == "Yes"
    assert best["likelihood"] == pytest.approx(2.718281828459045 ** end.logprobs[0].logprob)


def test_a_page_shows_the_best(find):
    Path("in/ü <b>.jpg").write_bytes(Path("in/dog.jpg").read_bytes())
    done = find("a <dog>", "in/*.jpg", "-q", "--top", "9", "--html", "found.html")
    page = Path("found.html").read_text("utf-8")
    assert done.exit_code == 0
    assert page.count("<img") == 5
    assert "<h1>a &lt;dog&gt;: the likeliest of 5 pictures</h1>" in page
    assert "in/ü &lt;b&gt;.jpg</a>" in page
    assert Path("in").resolve().as_uri() in page


def test_what_is_left_out_is_said_and_equal_likelihoods_are_all_shown(find, monkeypatch):
    shutil.copy("in/dog.jpg", "in/again.jpg")
    done = find("a dog", "in", "--top", "2")
    assert "the 2 likeliest of 5 pictures; --top N shows more" in done.stderr
    assert "likeliest" not in find("a dog", "in", "--top", "5").stderr
    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
    _, first, second = find("a dog", "in", "--top", "2").stdout.splitlines()
    assert first.split()[:2] == second.split()[:2]


def test_a_picture_that_cannot_be_read_is_said(find):
    Path("in/bad.jpg").write_bytes(b"")
    done = find("a dog", "in")
    assert "'in/bad.jpg' is empty" in done.stderr
    assert (done.stdout.count("\n"), done.exit_code) == (5, 8)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((" ", "in"), "TEXT is empty"),
        (("a dog", "none"), "'none' does not exist; give a folder, a glob, or pictures\n"),
        (("a dog", "in", "rows.jsonl"), "'rows.jsonl' holds rows, for mmchat batch; give a folder"),
        (("a dog", "rows.CSV"), "'rows.CSV' holds rows, for mmchat batch; give a folder"),
        (("a dog", "empty"), "there are no pictures"),
    ],
)
def test_wrong_arguments_are_refused(find, args, reason):
    Path("empty").mkdir()
    Path("rows.jsonl").write_text('{"image": "in/dog.jpg"}\n')
    Path("rows.CSV").write_text("image\nin/dog.jpg\n")
    done = find(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert reason in done.stderr


def test_a_picture_that_memory_does_not_take_does_not_end_the_search(find, tiny, monkeypatch):
    real = ranking.user_message

    def user_message(model, text, images):
        if "fish" in images[0]:
            raise MemoryError
        return real(model, text, images)

    monkeypatch.setattr(ranking, "user_message", user_message)
    done = find("a dog", "in")
    assert (done.stdout.count("\n"), done.exit_code) == (4, 8)
    assert "memory" in done.stderr


def test_results_come_before_the_page_which_leaves_out_what_cannot_be_drawn(find, monkeypatch):
    real = images.load_images

    def load_images(sources, **more):
        if more:  # to ask about it
            return real(sources, **more)
        raise ImageError(f"{sources[0]!r} is gone")

    monkeypatch.setattr(images, "load_images", load_images)
    done = find("a dog", "in", "--html", "found.html")
    assert done.exit_code == 0
    assert done.stdout.count("\n") == 5
    assert "left out of the page: 'in/dog.jpg' is gone" in done.stderr
    assert "<img" not in Path("found.html").read_text("utf-8")


def test_the_page_does_not_replace_a_picture(find):
    Path("in/page.html").write_bytes(Path("in/dog.jpg").read_bytes())
    done = find("a dog", "in/page.html", "--html", "in/page.html")
    assert done.exit_code == 2
    assert "--html 'in/page.html' would replace the picture" in done.stderr


def test_a_base_model_ranks_nothing(find, monkeypatch):
    source = LoadOptions().find()
    source = replace(source, spec=replace(source.spec, chat_format="base"))
    monkeypatch.setattr(LoadOptions, "find", lambda *_, **__: source)
    done = find("a dog", "in")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "is a base model, which continues text and cannot chat" in done.stderr


def test_the_first_failures_are_said_and_how_many_there_are(find):
    for number in range(9):
        Path(f"in/bad{number}.png").write_bytes(b"")
    done = find("a dog", "in", "--json")
    assert (done.exit_code, len(json.loads(done.stdout))) == (8, 4)
    assert [line for line in done.stderr.splitlines() if "bad" in line or "more" in line] == [
        *(f"'in/bad{number}.png' is empty" for number in range(3)),
        "and 6 more failed",
    ]
