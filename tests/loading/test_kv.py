"""`--kv int8` from the option to the answer: what is kept, what is counted, and what is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mmchat
from mmchat.api import Model
from mmchat.cli.app import app
from mmchat.engine.sampling import SamplingParams

KEPT = "float32, keys and values in int8"
DOG = "assets/dog.jpg"
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
QUESTIONS = [
    ("What animal is this?", [DOG]),
    ("What colour is the sky?", []),
    ("Is there a dog in the picture?", [DOG]),
    ("Say something long about pictures and words.", []),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return mmchat.load("tiny", kv="int8")


def test_the_cache_of_its_engine_takes_the_bytes_that_are_counted(model: Model) -> None:
    cache: Any = model.runtime.new_cache(1, 256)
    held = [tensor for layer in cache.layers for tensor in layer.row(0)]
    assert {tensor.dtype for tensor in held} == {torch.int8}
    assert sum(tensor.nbytes for tensor in held) == 256 * model.position_bytes
    picture = mmchat.load_image(DOG)
    [media] = [p.media for p in model.processor.raw(mmchat.Message("user", (picture,))).media]
    for _ in model.runtime.encode([media], cache):
        pass
    [kept] = cache.encoded.values()
    assert sum(t.nbytes for pair in kept for t in pair) == model.media_bytes(media.facts)
    plain = mmchat.load("tiny")
    width = 32 * plain.dtype.itemsize
    assert model.position_bytes * width == plain.position_bytes * (32 + 4)


def test_answers_together_are_those_alone_and_mostly_those_of_the_model_as_it_is(
    model: Model,
) -> None:
    alone = [model.ask(text, *pictures, sampling=GREEDY) for text, pictures in QUESTIONS]
    together = [done.text for done in model.generate_many(QUESTIONS, GREEDY, rows=3)]
    assert together == alone
    plain = mmchat.load("tiny")
    assert alone == [plain.ask(text, *pictures, sampling=GREEDY) for text, pictures in QUESTIONS]


def test_a_conversation_undone_and_gone_on_with_is_that_from_the_start(model: Model) -> None:
    def say(chat: mmchat.ChatSession, text: str, *pictures: str) -> mmchat.Finished:
        *_, last = chat.send(text, pictures, GREEDY)
        assert isinstance(last, mmchat.Finished)
        return last

    chat, other = model.chat(), model.chat()
    for one in (chat, other):
        say(one, "What animal is this?", DOG)
    say(chat, "Is it large?")
    chat.undo()
    drafted, fresh = say(chat, "What colour is it?"), say(other, "What colour is it?")
    assert drafted.output_ids == fresh.output_ids
    assert drafted.usage.cached_tokens > 0


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_commands_have_it() -> None:
    ask = ("generate", "-p", "What animal is this?", "-i", DOG, "--json")
    facts = [json.loads(run(*ask, "--dry-run", "--kv", kv).stdout) for kv in ("auto", "int8")]
    plain, rounded = (one["memory"] for one in facts)
    assert rounded["cache"] < 0.57 * plain["cache"]
    assert rounded["pictures"] < 0.57 * plain["pictures"]
    answers = [json.loads(run(*ask, "--kv", kv).stdout)["text"] for kv in ("auto", "int8")]
    assert answers[0] == answers[1]
    wrong = run(*ask, "--kv", "int4")
    assert wrong.exit_code == 2
    assert "'int4'" in wrong.stderr


def test_what_runs_says_so() -> None:
    asked = ["generate", "tiny", "-p", "Hi", "-n", "2", "--kv", "int8"]
    done = CliRunner().invoke(app, [*asked, "-v"])
    assert "cpu, float32 (a small model), keys and values in int8\n" in done.stderr
    assert json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["kv"] == "int8"
    assert KEPT in CliRunner().invoke(app, [*asked, "--dry-run"]).stdout
    chat = CliRunner().invoke(app, ["chat", "tiny", "--kv", "int8"], input="\\show\n")
    assert f"tiny on cpu, {KEPT}\n" in chat.stdout
