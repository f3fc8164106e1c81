import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmchat.evals import harness, run, scenes
from mmchat.evals.scenes import Question, Scene
from tests.cli.fake_command import scripted_model

ANSWERS = [b"Red.", b"Two.", b" Blue. "]


@pytest.fixture
def three_scenes(monkeypatch):
    """Three scenes without pictures, with known answers."""
    questions = [
        Question("colour", "What colour is the dog?", "Red."),
        Question("count", "How many dogs?", "Three."),
        Question("colour", "What colour is the cat?", "Blue."),
    ]
    made = [Scene(i, "talk", (), (question,)) for i, question in enumerate(questions)]
    monkeypatch.setattr(scenes, "heldout_scenes", lambda limit, wording: iter(made[:limit]))


def test_scores_are_counted_by_question_type(mmchat_command, three_scenes):
    mmchat_command.use(*ANSWERS)
    done = mmchat_command("eval", "scenes", "-q", "--limit", "3")
    assert done.stdout == (
        "TYPE\tRIGHT\tASKED\tACCURACY\tINTERVAL\n"
        "colour\t2\t2\t100.0 %\t34.2 to 100.0 %\n"
        "count\t0\t1\t0.0 %\t0.0 to 79.3 %\n"
        "all\t2\t3\t66.7 %\t20.8 to 93.9 %\n"
    )
    assert (done.stderr, done.exit_code) == ("", 0)


def test_json_names_every_wrong_answer(mmchat_command, three_scenes, tmp_path):
    mmchat_command.use(*ANSWERS)
    path = tmp_path / "scores.json"
    done = mmchat_command("eval", "scenes", "-q", "--limit", "3", "--json", "-o", str(path))
    record = json.loads(done.stdout)
    assert json.loads(path.read_text()) == record
    overall = {"right": 2, "total": 3, "accuracy": 0.6667, "interval": [0.2077, 0.9385]}
    assert record["overall"] == overall
    assert record["wrong"] == [
        {"seed": 1, "type": "count", "canvas": "no picture", "question": ["How many dogs?"],
         "expected": "Three.", "answer": "Two."}
    ]  # fmt: skip


def test_the_limit_holds(mmchat_command, three_scenes):
    mmchat_command.use(*ANSWERS)
    done = mmchat_command("eval", "scenes", "-q", "--limit", "1", "--json")
    assert json.loads(done.stdout)["overall"]["total"] == 1


def test_ctrl_c_prints_the_scores_so_far(mmchat_command, three_scenes):
    model, seen = mmchat_command.use(*ANSWERS), []

    def hook(logits):
        seen.append(1)
        if len(seen) == len(ANSWERS[0]) + 3:  # within the second answer
            raise KeyboardInterrupt
        return logits

    model.runtime.logits_hook = hook
    done = mmchat_command("eval", "scenes", "-q", "--limit", "3")
    assert done.stdout.splitlines()[-1] == "all\t1\t1\t100.0 %\t20.7 to 100.0 %"
    assert done.exit_code == 130


def test_held_out_scenes_are_asked_with_their_pictures(mmchat_command):
    mmchat_command.use(*[b"A dog."] * 4)
    done = mmchat_command("eval", "scenes", "-q", "--limit", "4", "--json")
    assert json.loads(done.stdout)["overall"]["total"] == 4


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("type", ["caption", "colour", "count", "where"]),
        ("canvas", ["1 x 1", "1 x 2", "2 x 1"]),
        ("tiles", ["1", "2"]),
        ("objects", ["1", "2", "3"]),
    ],
)
def test_the_table_shows_the_parts_that_are_asked_for(mmchat_command, by, parts):
    mmchat_command.use(*[b"A dog."] * 4)
    done = mmchat_command("eval", "scenes", "-q", "--limit", "4", "--by", by)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [by.upper(), *parts, "all"]
    assert sum(int(line[2]) for line in lines[1:-1]) == 4


def test_a_page_shows_the_wrong_answers_with_their_pictures(mmchat_command, tmp_path):
    mmchat_command.use(*[b"<b>A dog.</b>"] * 3)
    path = tmp_path / "wrong.html"
    done = mmchat_command("eval", "scenes", "-q", "--limit", "3", "--wrong", str(path))
    page = path.read_text()
    assert done.exit_code == 0
    assert page.count("<figure>") == page.count("data:image/png;base64,") == 3
    assert "&lt;b&gt;A dog.&lt;/b&gt;" in page
    assert "<b>A dog.</b>" not in page
    assert "http" not in page


def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_loaded(mmchat_command):
    done = mmchat_command("eval", "scenes", "--wrong", "no/such/folder/wrong.html")
    assert done.exit_code == 7
    assert "no/such/folder" in done.stderr


def test_a_follow_up_is_asked_after_the_question_before_it():
    asked = []
    model = scripted_model(b"answer 1", b"answer 2")
    chat = model.processor.chat

    def heard(messages):
        asked.append([(message.text, len(message.images)) for message in messages])
        return chat(messages)

    model.processor.chat = heard
    first = Question("presence", "Is there a dog?", "Yes, there is a dog.")
    follow = Question("follow", "What colour is it?", "answer 2", earlier=(first,))
    scene = replace(scenes.make_scene(1, kind="objects"), questions=(follow,))
    (verdict,) = run.judge_scenes(model, [scene])
    first = [("Is there a dog?", 1)]
    assert asked == [first, [*first, ("answer 1", 0), ("What colour is it?", 0)]]
    assert verdict.is_right


def test_a_benchmark_names_the_extra_that_it_needs(mmchat_command, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    done = mmchat_command("eval", "mmmu_val,chartqa", "--limit", "3")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        "mmchat: error: benchmarks need lm_eval: pip install 'mmchat[eval]'; 'mmchat eval scenes'"
        " does without\n"
    )


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("x", "-o", "no/such/folder"), 7, "the folder 'no/such' does not exist"),
        (("x", "-o", "file"), 7, "'file': it is no folder"),
        (("x", "--include-path", "none"), 2, "--include-path 'none' is no folder"),
        (("x", "--limit", "0"), 2, "'0' should be greater than or equal to 1"),
        ((",",), 2, "no task is given"),
        (("scene",), 2, "there is no task 'scene'; nearest: 'scenes'"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_one_line(
    mmchat_command, monkeypatch, tmp_path, args, code, reason
):
    manager = SimpleNamespace(TaskManager=lambda **_: Tasks())
    monkeypatch.setattr(harness, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    done = mmchat_command("eval", *args)
    assert (done.exit_code, done.stdout) == (code, "")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


class Tasks:
    """As lm_eval's TaskManager, which knows none."""

    all_tasks = ("mmmu_val",)

    def match_tasks(self, _: list[str]) -> list[str]:
        return []
