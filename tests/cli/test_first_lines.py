"""The first lines that people type: words in any order, with and without a command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmchat.cli import console, wrong_names
from mmchat.cli.app import COMMANDS, load
from mmchat.cli.positional import Said, sort_words
from mmchat.errors import ParamsError, UsageError

ROOT = Path(__file__).parents[2]
ANSWER = "A brown dog.\n"
BUILT_IN = "using the built-in model 'Llama-3.2-11B-Vision-Instruct'; see 'mmchat list'\n"
USUAL = 'no question is given; asking "What\'s in this image?"\n'


@pytest.fixture
def here(tmp_path, picture, monkeypatch):
    """A folder with dog.png, dog.jpg and other things, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.jpg").write_bytes(picture.read_bytes())
    (tmp_path / "my dog.png").write_bytes(picture.read_bytes())
    (tmp_path / "describe").write_text("a file with the name of a word")
    (tmp_path / "plain").write_bytes(picture.read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", Said()),
        ("'What is this?' dog.jpg", Said(None, "What is this?", ("dog.jpg",))),
        ("dog.jpg 'What is this?'", Said(None, "What is this?", ("dog.jpg",))),
        ("dog.jpg", Said(None, None, ("dog.jpg",))),
        ("dog.png dog.jpg", Said(None, None, ("dog.png", "dog.jpg"))),
        ("'my dog.png'", Said(None, None, ("my dog.png",))),
        ("plain", Said(None, None, ("plain",))),  # its bytes are a picture's
        ("- 'What?'", Said(None, "What?", ("-",))),
        ("https://a.b/c 'What?'", Said(None, "What?", ("https://a.b/c",))),
        ("data:image/png;base64,aaaa", Said(None, None, ("data:image/png;base64,aaaa",))),
        ("tiny", Said("tiny")),
        ("tiny What?", Said("tiny", "What?")),
        ("TINY 'What is it?' dog.jpg", Said("TINY", "What is it?", ("dog.jpg",))),
        ("dog.jpg tiny", Said("tiny", None, ("dog.jpg",))),
        ("'What is it?' dog.jpg tiny", Said("tiny", "What is it?", ("dog.jpg",))),
        ("llama3.2-vision:11b-instruct-q4 ?", Said("llama3.2-vision:11b-instruct-q4", "?")),
        ("folder What?", Said("folder", "What?")),
        ("'What is it?' folder", Said("folder", "What is it?")),
        ("./no/such/folder What?", Said("./no/such/folder", "What?")),
        ("model.safetensors What?", Said("model.safetensors", "What?")),
        ("acme/model What?", Said("acme/model", "What?")),
        ("what is this dog.jpg", Said(None, "what is this", ("dog.jpg",))),
        ("what is in folder dog.jpg", Said(None, "what is in folder", ("dog.jpg",))),
        ("'describe dog.jpg'", Said(None, "describe dog.jpg")),
        ("'is there a dog in nothere.jpg'", Said(None, "is there a dog in nothere.jpg")),
        # what is missing stays a picture, so that its error says so
        ("nothere.jpg", Said(None, None, ("nothere.jpg",))),
        ("dog.jgp", Said(None, None, ("dog.jgp",))),
        ("'my nothere.jpg'", Said(None, None, ("my nothere.jpg",))),
        ("no/such/place.PNG What?", Said(None, "What?", ("no/such/place.PNG",))),
    ],
)  # fmt: skip
def test_words_are_the_model_the_question_and_pictures(here, line, said):
    assert sort_words(shlex.split(line)) == said


@pytest.mark.parametrize(
    ("line", "question", "note"),
    [
        ("describe dog.jpg", "describe", "'describe' is no model and no picture; taken as the"),
        ("Caption", "Caption", "'Caption' is no model and no picture; taken as the question"),
        ("is it tiny dog.jpg", "is it tiny", "'tiny' is taken as a word of the question; -m tiny"),
        ("gemma 'Is it?'", "gemma Is it?", "'gemma' 'Is it?' are taken as one question"),
        ("'Is it?' dog.jpg So?", "Is it? So?", "'Is it?' 'So?' are taken as one question"),
    ],
)  # fmt: skip
def test_what_could_be_something_else_is_said(here, line, question, note):
    said = sort_words(shlex.split(line))
    assert (said.model, said.question) == (None, question)
    assert [n[: len(note)] for n in said.notes] == [note]


def test_a_folder_that_is_named_like_a_picture_is_one_so_that_its_error_says_so(here):
    (here / "album.jpg").mkdir()
    assert sort_words(["What?", "album.jpg"]) == Said(None, "What?", ("album.jpg",))


def test_a_model_that_is_also_a_folder_here_is_said(here):
    (here / "tiny").mkdir()
    assert sort_words(["tiny"]) == Said(
        "tiny", notes=("'tiny' is taken as the model; ./tiny is what lies here",)
    )


@pytest.mark.parametrize(
    "word", ["tyni", "tinny", "llama3.2-11C", "llama", "Llama3.2", "qwen2-vl:7b", "llama3.2:1b"]
)
def test_a_mistyped_model_is_no_question(word):
    with pytest.raises(ParamsError, match=f"^no model '{word}' .*goes behind --prompt$"):
        sort_words([word, "What?"])


def test_with_a_prompt_a_bare_word_is_the_model():
    assert sort_words(["acme", "dog.jpg"], has_prompt=True) == Said("acme", None, ("dog.jpg",))
    with pytest.raises(UsageError, match="are two questions"):
        sort_words(["What is it?"], has_prompt=True)


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("generate 'What is this?' dog.jpg", ""),
        ("generate 'What is this?' -i dog.jpg", ""),
        ("generate q dog.jpg", "'q' is no model and no picture; taken as the question\n"),
        ("'What is this?' dog.jpg", ""),
        ("what is this dog.jpg", ""),
        ("-q -t 0 'What is this?' dog.jpg", None),
        ("-p 'What is this?' -i dog.jpg", ""),
        ("-i dog.jpg 'What is this?'", ""),
    ],
)
def test_a_question_and_a_picture_get_an_answer(mmchat_command, here, line, notes):
    done = mmchat_command(*shlex.split(line))
    expected = "" if notes is None else BUILT_IN + notes
    assert (done.stdout, done.stderr, done.exit_code) == (ANSWER, expected, 0)


@pytest.mark.parametrize("line", ["generate dog.jpg", "dog.jpg", "generate tiny dog.jpg"])
def test_a_question_may_come_through_the_pipe(mmchat_command, here, line):
    done = mmchat_command(*line.split(), stdin="What is this?\n")
    assert (done.stdout, done.exit_code) == (ANSWER, 0)
    assert USUAL not in done.stderr


def asked(mmchat_command, monkeypatch):
    """The requests that `generate` runs from here on."""
    from mmchat.cli import generate

    requests = []
    monkeypatch.setattr(generate, "run", lambda request, *_: requests.append(request))
    return requests


def test_a_picture_through_the_pipe_is_asked_about(mmchat_command, here, monkeypatch, picture):
    requests = asked(mmchat_command, monkeypatch)
    data = picture.read_bytes()
    assert mmchat_command("What is this?", stdin=data).exit_code == 0
    assert mmchat_command("generate", "-p", "What?", "dog.jpg", stdin=data).exit_code == 0
    found = [(r.text, [image.source for image in r.images]) for r in requests]
    assert found == [("What is this?", ["stdin"]), ("What?", ["stdin", "dog.jpg"])]


def test_text_that_begins_like_a_bitmap_is_text(mmchat_command, monkeypatch):
    requests = asked(mmchat_command, monkeypatch)
    mmchat_command("What is it about?", stdin="BMW makes cars.")
    assert [(r.text, r.images) for r in requests] == [("BMW makes cars.\n\nWhat is it about?", [])]


def test_a_large_picture_through_the_pipe_is_not_too_long_a_text(
    mmchat_command, monkeypatch, picture
):
    from mmchat import limits

    requests = asked(mmchat_command, monkeypatch)
    monkeypatch.setattr(limits, "PROMPT_BYTES", 60)
    assert mmchat_command("What is this?", stdin=picture.read_bytes()).exit_code == 0
    assert len(requests[0].images) == 1
    done = mmchat_command("What is this?", stdin="x" * 61)
    assert (done.stdout, done.exit_code) == ("", 2)


def test_an_empty_pipe_is_no_question(mmchat_command, here):
    done = mmchat_command("generate", "dog.jpg")
    assert done.stderr == (
        "mmchat: error: the prompt is empty; give a question with --prompt TEXT or on stdin\n"
    )
    assert (done.stdout, done.exit_code) == ("", 2)


@pytest.mark.parametrize("command", ["", "generate", "chat"])
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("dgo.jpg", "'dgo.jpg' does not exist; is it 'dog.jpg'?\n"),
        ("dog.jgp", "'dog.jgp' does not exist; is it 'dog.jpg'?\n"),
        ("no/such.png", "'no/such.png' does not exist: there is no folder 'no'\n"),
        ("empty.png", "'empty.png' is empty\n"),
    ],
)
def test_a_picture_that_is_not_there_is_exit_code_4_before_torch(
    mmchat_command, here, monkeypatch, command, word, reason
):
    from mmchat.cli import model_choice

    (here / "empty.png").touch()
    monkeypatch.setattr(model_choice, "begin_loading", lambda *_: pytest.fail("began to load"))
    done = mmchat_command(*([command] if command else []), word, stdin="What?")
    assert (done.stdout, done.stderr, done.exit_code) == ("", f"mmchat: error: {reason}", 4)


def test_what_needs_no_model_is_said_before_torch(mmchat_command, monkeypatch, tmp_path):
    from mmchat.cli import model_choice

    monkeypatch.setattr(model_choice, "begin_loading", lambda *_: pytest.fail("began to load"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert mmchat_command("chat", "--resume", "nothere").exit_code == 1
    assert mmchat_command("generate", "-p", "x", *["-i", "-"] * 2).exit_code == 2
    mmchat_command.use(b"x", params="llama3.2-11B-base")
    assert mmchat_command("generate", "-p", "x", "-s", "y").exit_code == 2


def test_chat_begins_with_the_question_of_the_command_line(mmchat_command, here):
    mmchat_command.use(b"A brown dog.", b"Brown.")
    done = mmchat_command("chat", "What is this?", "dog.jpg", stdin="What colour?\n")
    assert (done.stdout, done.exit_code) == ("A brown dog.\nBrown.\n", 0)
    assert done.stderr.startswith("attached dog.jpg: ")


def test_the_question_of_the_command_line_is_no_command_of_the_chat(mmchat_command):
    done = mmchat_command("chat", "\\quit now", stdin="")
    assert (done.stdout, done.exit_code) == (ANSWER, 0)


@pytest.mark.parametrize("terminals", ["both", "stdin", "stdout", "none"])
@pytest.mark.parametrize(
    ("line", "on_terminal", "elsewhere"),
    [
        ("'What is this?' dog.jpg", "chat", "generate"),
        ("dog.jpg", "chat", "generate"),
        ("tiny", "chat", "generate"),
        ("-m tiny --debug", "chat", "generate"),
        ("--device cpu", "chat", "generate"),
        ("-p What?", "generate", "generate"),
        ("'What is this?' --json", "generate", "generate"),
        ("'What is this?' --output=x", "generate", "generate"),
        ("what is this", "chat", "generate"),
    ],
)
def test_without_a_command_it_is_chat_on_a_terminal_and_generate_elsewhere(
    monkeypatch, terminals, line, on_terminal, elsewhere
):
    there = {"both": ("stdin", "stdout"), "none": ()}.get(terminals, (terminals,))
    monkeypatch.setattr(console, "is_terminal", lambda s: s in [getattr(sys, n) for n in there])
    args = shlex.split(line)
    meant = on_terminal if terminals == "both" else elsewhere
    assert wrong_names.with_command(args, COMMANDS, load) == [meant, *args]
    debug = wrong_names.with_command(["--debug", *args], COMMANDS, load)
    assert debug == ["--debug", meant, *args]


@pytest.mark.parametrize(
    "line",
    ["generate x", "--help", "-h", "-V", "--version", "--show-completion=bash",
     "genrate 'What?' dog.jpg", "frobnicate", "frobnicate -q", "pull llama3.2-vision", "tyni a.jpg",
     "chta"],
)  # fmt: skip
def test_what_names_a_command_or_was_meant_to_stays_as_it_is(line):
    args = shlex.split(line)
    assert wrong_names.with_command(args, COMMANDS, load) == args


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("-q generate x", "generate -q x"),
        ("-m tiny list", "list -m tiny"),
        ("--debug --device cpu -n 3 chat", "--debug chat --device cpu -n 3"),
        ("-n3 --device=cpu chat", "chat -n3 --device=cpu"),
        ("-m tiny -p list", "generate -m tiny -p list"),
        ("-s chat -i list.png What? list", "generate -s chat -i list.png What? list"),
        ("-q - list", "generate -q - list"),
        ("help", "--help"),
        ("help generate", "generate --help"),
        ("help config show", "config show --help"),
        ("help help", "help --help"),
        ("--debug help nope", "--debug nope --help"),
        ("help me with dog.jpg", "generate help me with dog.jpg"),
        ("describe dog.jpg", "generate describe dog.jpg"),
    ],
)
def test_options_may_stand_in_front_of_the_command_and_help_is_one(line, meant):
    args = shlex.split(line)
    assert wrong_names.with_command(args, COMMANDS, load) == shlex.split(meant)


def test_nothing_at_all_is_chat_on_a_terminal_and_help_where_nothing_can_come(monkeypatch, capfd):
    with open(os.devnull) as nothing:  # noqa: PTH123 - as a shell gives it
        monkeypatch.setattr(sys, "stdin", nothing)
        assert wrong_names.with_command([], COMMANDS, load) == []
    read, write = os.pipe()
    os.close(write)
    with open(read) as pipe:  # noqa: PTH123 - as a shell gives it
        monkeypatch.setattr(sys, "stdin", pipe)
        assert wrong_names.with_command([], COMMANDS, load) == ["generate"]
    monkeypatch.setattr(console, "is_terminal", lambda _: True)
    assert wrong_names.with_command([], COMMANDS, load) == ["chat"]


@pytest.mark.process
def test_a_picture_alone_gets_the_usual_question_where_no_text_can_come():
    script = json.dumps({"answer": "A brown dog."})
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.fake_program", script, "generate", "assets/dog.jpg"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == (ANSWER, BUILT_IN + USUAL, 0)


@pytest.mark.parametrize(
    "command", ["generate", "chat", "export", "inspect", "tiles", "bench", "download", "where",
                "verify", "remove"],
)  # fmt: skip
def test_a_model_may_be_named_by_its_option_everywhere(command):
    [option] = [p for p in load(command).params if "--model" in p.opts]
    assert option.opts == ["-m", "--model"]


def test_the_option_names_the_model(mmchat_command, run_real):
    assert run_real("inspect", "--model", "tiny").stdout == run_real("inspect", "tiny").stdout
    mmchat_command("generate", "-m", "tiny", "-p", "x")
    mmchat_command("generate", "mllama-tiny", "-p", "x")
    assert [options.name for options in mmchat_command.loaded] == ["tiny", "mllama-tiny"]


def test_variables_of_other_programs_are_said_not_to_be_read(mmchat_command, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_PATH", "/x")
    assert mmchat_command("generate", "-p", "x").stderr == BUILT_IN + (
        "CHECKPOINT_PATH is set, which mmchat does not read; --checkpoint-path says it\n"
    )
