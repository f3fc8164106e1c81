import json

import pytest

from mmchat.evals import scenes
from mmchat.evals.scenes import Question, Scene

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
    monkeypatch.setattr(scenes, "heldout_scenes", lambda limit: iter(made[:limit]))


def test_scores_are_counted_by_question_type(mmchat_command, three_scenes):
    mmchat_command.use(*ANSWERS)
    done = mmchat_command("eval", "scenes", "-q", "--limit", "3")
    assert done.stdout == (
        "TYPE\tRIGHT\tASKED\tACCURACY\n"
        "colour\t2\t2\t100.0 %\n"
        "count\t0\t1\t0.0 %\n"
        "all\t2\t3\t66.7 %\n"
    )
    assert (done.stderr, done.exit_code) == ("", 0)


def test_json_names_every_wrong_answer(mmchat_command, three_scenes, tmp_path):
    mmchat_command.use(*ANSWERS)
    path = tmp_path / "scores.json"
    done = mmchat_command("eval", "scenes", "-q", "--limit", "3", "--json", "-o", str(path))
    record = json.loads(done.stdout)
    assert json.loads(path.read_text()) == record
    assert record["overall"] == {"right": 2, "total": 3, "accuracy": 0.6667}
    assert record["wrong"] == [
        {"seed": 1, "type": "count", "question": "How many dogs?", "expected": "Three.",
         "answer": "Two."}
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
    assert done.stdout.splitlines()[-1] == "all\t1\t1\t100.0 %"
    assert done.exit_code == 130


def test_held_out_scenes_are_asked_with_their_pictures(mmchat_command):
    mmchat_command.use(*[b"A dog."] * 4)
    done = mmchat_command("eval", "scenes", "-q", "--limit", "4", "--json")
    assert json.loads(done.stdout)["overall"]["total"] == 4
