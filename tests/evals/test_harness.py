"""lm_eval with a model of ours: what it is given is what we compute without it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmchat
from mmchat.conversation import Message, Text
from mmchat.errors import NetworkError, UsageError
from mmchat.evals import harness
from mmchat.evals.run import judge_scenes
from mmchat.evals.scenes import heldout_scenes
from mmchat.images import from_pil
from mmchat.models.base import Batch
from mmchat.models.prompt import Prompt
from tests.server.serving import serving

pytest.importorskip("lm_eval", reason="lm_eval is not installed: mmchat[eval] is NOT TESTED")
from mmchat.evals.engine_lm import EngineLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples/lm_eval"


@pytest.fixture(scope="module")
def tiny() -> mmchat.Model:
    return mmchat.load(device="cpu", dtype="float32")


def lm_of(model: mmchat.Model, *, is_chat: bool = True, rows: int = 4) -> EngineLM:
    return EngineLM(model, rows, is_chat=is_chat, bar=lambda _: nullcontext(int))


def request(*args: Any, doc: int = 0) -> SimpleNamespace:
    return SimpleNamespace(args=args, task_name="t", doc_id=doc)


def tasks(*names: str) -> harness.Tasks:
    return harness.load_tasks(names, TASKS, None)


def run(model: mmchat.Model, found: harness.Tasks, limit: int, **more: Any) -> harness.Outcome:
    options = {"rows": 8, "is_chat": True, "cache_key": None, "bar": lambda _: nullcontext(int)}
    return harness.run(model, found, limit=limit, **{**options, **more})


def plain(model: mmchat.Model, prompt: Prompt, begin: int) -> tuple[float, bool]:
    """The score of a prompt's tokens from `begin` on, by one forward."""
    cache = model.runtime.new_cache(1, len(prompt.token_ids))
    cache.begin(0, prompt)
    with torch.inference_mode():
        for placed in prompt.media:
            for _ in model.runtime.encode([placed.media], cache):
                pass
        logits = model.runtime.forward(Batch.all_of(torch.tensor(prompt.token_ids), 0), cache)
    scores, ids = logits.double().log_softmax(-1), prompt.token_ids
    at = range(begin, len(ids))
    is_greedy = all(int(scores[i - 1].argmax()) == ids[i] for i in at)
    return sum(float(scores[i - 1, ids[i]]) for i in at), is_greedy


def check(found: tuple[float, bool], expected: tuple[float, bool]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-4)
    assert found[1] == expected[1]


def raw(model: mmchat.Model, text: str) -> Prompt:
    return model.processor.raw(Message("user", (Text(text),)))


def test_the_accuracy_on_drawn_scenes_is_that_of_eval_scenes(tiny):
    count = 40  # one of each kind at least, pairs and none among them
    outcome = run(tiny, tasks("drawn_scenes"), count)
    scenes = [
        replace(scene, questions=(question,))
        for scene in heldout_scenes(2 * count)
        for question in scene.questions
        if not question.earlier
    ][:count]
    assert {len(scene.pictures) for scene in scenes} == {0, 1, 2}
    verdicts = list(judge_scenes(tiny, scenes, rows=8))
    answers = [sample["resps"][0][0] for sample in outcome.samples["drawn_scenes"]]
    assert answers == [verdict.answer for verdict in verdicts]
    right = sum(verdict.is_right for verdict in verdicts)
    assert 0 < right < count
    [(task, metric, value, error)] = harness.metrics(outcome.record)
    assert (task, metric, value) == ("drawn_scenes", "exact_match", right / count)
    assert error == pytest.approx(math.sqrt(value * (1 - value) / (count - 1)))


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("The picture shows a red", " square"),
        ("The picture shows a red ", "square and a blue"),  # the space is the continuation's
        ("Three blue circles.\n\n", "What?"),
        ("", "A dog."),
        ("It is b", "rown."),  # tokens merge where the two meet
    ],
)
def test_scores_of_text_are_those_of_a_plain_forward(tiny, context, continuation):
    before, whole = (
        raw(tiny, text).token_ids for text in (context.rstrip(), context + continuation)
    )
    ids = (*before, *whole[len(before) :])  # as lm_eval's own models split them
    [found] = lm_of(tiny, is_chat=False).loglikelihood([request(context, continuation)])
    check(found, plain(tiny, Prompt(ids), len(before)))


def test_what_does_not_fit_is_cut_on_the_left(tiny):
    small = replace(tiny, max_seq_len=64)
    lm = lm_of(small, is_chat=False)
    text = "A red circle and a blue square. " * 20
    [found] = lm.loglikelihood([request(text, "A dog.")])
    ids = raw(tiny, text + "A dog.").token_ids
    rest = len(ids) - len(raw(tiny, text.rstrip()).token_ids)
    check(found, plain(tiny, Prompt(ids[-63:]), 63 - rest))
    assert lm.notices == ["cut on the left, to the context of 64 (1 request)"]


def test_choices_about_pictures_are_those_of_a_plain_forward(tiny):
    outcome = run(tiny, tasks("drawn_colours"), 4, rows=3)
    assert len(outcome.samples["drawn_colours"]) == 4
    found = tasks("drawn_colours").loaded["tasks"]["drawn_colours"].eval_docs
    for row, sample in zip(found, outcome.samples["drawn_colours"], strict=False):
        images = [from_pil(picture) for picture in row["pictures"]]
        asked = tiny.processor.chat([Message("user", (*images, Text(row["question"])))])
        assert asked.media
        for choice, [(score, is_greedy)] in zip(row["choices"], sample["resps"], strict=True):
            ids = (*asked.token_ids, *tiny.tokenizer.encode(choice))
            whole = replace(asked, token_ids=ids)
            check((score, is_greedy), plain(tiny, whole, len(asked.token_ids)))


def test_an_answer_that_is_begun_goes_on(tiny):
    lm = lm_of(tiny)
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is"}]
    context = lm.apply_chat_template(turns, add_generation_prompt=False)
    [found] = lm.loglikelihood([request(context, " brown.")])
    asked = tiny.processor.chat([Message("user", "What is it?")])
    begun = (*asked.token_ids, *tiny.tokenizer.encode("It is"))
    ids = (*begun, *tiny.tokenizer.encode(" brown."))
    check(found, plain(tiny, Prompt(ids), len(begun)))


@pytest.mark.parametrize("context", [16, 4_096])
def test_rolling_scores_read_every_token_once(tiny, context):
    text = "Three green triangles are left of a yellow star. " * 6
    ids = tiny.tokenizer.encode(text)
    assert 16 < len(ids) < 4_000
    [found] = lm_of(replace(tiny, max_seq_len=context)).loglikelihood_rolling([request(text)])
    [begin] = tiny.processor.raw(Message("user", ())).token_ids
    most, expected = context - 2, 0.0
    for at in range(len(ids)):  # by lm_eval's definition: windows that are as full as can be
        window = at // most
        end = min(most * (window + 1), len(ids))
        seen = (begin, *ids)[max(0, end - most) : at + 1]
        expected += plain(tiny, Prompt((*seen, ids[at])), len(seen))[0]
    assert found == pytest.approx(expected, abs=1e-3)


def test_settings_of_a_task_are_those_of_the_answer(tiny):
    lm = lm_of(tiny, is_chat=False)
    text = "A red circle and"
    settings = {"until": [" circle", ""], "max_gen_toks": 7, "temperature": 0.0, "beams": 4}
    ask = [request(text, settings), request(text, {"max_gen_toks": 3, "until": None})]
    drawn = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.5}
    ask += [request(text, drawn)] * 3
    found = lm.generate_until(ask)
    greedy = mmchat.SamplingParams(temperature=0, max_new_tokens=7)
    *_, end = tiny.chat().complete(text, (), greedy)
    assert found[0] == end.text.split(" circle")[0]
    assert end.text.startswith(found[1])
    assert len(tiny.tokenizer.encode(found[1])) <= 3
    assert len(set(found[2:])) > 1
    assert found == lm_of(tiny, is_chat=False).generate_until(ask)
    assert lm.notices == ["'beams' of a task's generation_kwargs is not known here (1 request)"]


def test_marks_are_the_places_of_pictures_and_others_are_refused(tiny):
    picture = heldout_scenes(1).__next__().pictures[0]
    lm = lm_of(tiny)

    def ask(text: str, visual: Any) -> list[str]:
        context = lm.apply_chat_template([{"role": "user", "content": text}])
        return lm.generate_until([request(context, {"max_gen_toks": 4}, {"visual": visual})])

    assert ask("<image>What is this?", picture) == ask("What is this?", [[picture], None])
    with pytest.raises(UsageError, match="2 <image> marks for 1 picture"):
        ask("<image><image>What is this?", [picture])


def test_tasks_that_cannot_be_run_say_why(tmp_path):
    with pytest.raises(UsageError, match="there is no task 'mmmu_vall'; nearest: 'mmmu_val'"):
        harness.load_tasks(["mmmu_vall"], None, None)
    usual = {"output_type": "generate_until", "doc_to_text": "a", "doc_to_target": "b"}
    rest = {**usual, "test_split": "test"}
    for name, more in {
        "away": {"dataset_path": "someone/something"},
        "gone": {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "no")}},
        "broken": {"custom_dataset": 5},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **rest, **more}))
    with pytest.raises(NetworkError, match="'away' is not on this machine, and this run is off"):
        harness.load_tasks(["away"], tmp_path, None)
    for name in ("gone", "broken"):
        with pytest.raises(UsageError, match=f"the task '{name}' cannot be loaded: ") as error:
            harness.load_tasks([name], tmp_path, None)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="is no folder"):
        harness.load_tasks(["x"], tmp_path / "none", None)


def test_a_task_that_fails_while_it_is_asked_says_why(tiny, tmp_path):
    (tmp_path / "drawn.py").write_text("import sys\n"
        f"sys.path.append({str(TASKS)!r})\nfrom scenes import *\n"
        "def wrong(doc, results):\n    return {'acc': doc['none']}\n")  # fmt: skip
    (tmp_path / "wrong.yaml").write_text(
        "task: wrong\ncustom_dataset: !function drawn.questions\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "process_results: !function drawn.wrong\nmetric_list: [{metric: acc}]\n"
    )
    found = harness.load_tasks(["wrong"], tmp_path, None)
    with pytest.raises(UsageError, match=r"^the task 'wrong' failed: KeyError: 'none'$"):
        run(tiny, found, 1)


def test_lm_eval_gets_the_same_answers_from_our_server(tiny, tmp_path):
    count = 26
    found = tasks("drawn_scenes")
    outcome = run(tiny, found, count)
    with serving("--dtype", "float32", "--device", "cpu", "--max-rows", "4") as server:
        command = re.search(r"(?<=```bash lm_eval\n)lm_eval run .*?(?=\n```)", docs(), re.DOTALL)
        assert command, "docs/evaluation.md shows the command"
        line = command[0].replace("\\\n", " ").replace("http://127.0.0.1:5000", server.url)
        line = line.replace("llama3.2-11B", "tiny").replace("mmmu_val", "drawn_scenes")
        more = ["--include_path", str(TASKS), "--limit", str(count), "--output_path", str(tmp_path)]
        args = [sys.executable, "-m", *shlex.split(line), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            args, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3_000:]
    [path] = tmp_path.rglob("samples_drawn_scenes_*.jsonl")
    theirs = sorted(map(json.loads, path.read_text("utf-8").splitlines()), key=doc_id)
    ours = sorted(outcome.samples["drawn_scenes"], key=doc_id)
    answers = [[sample["resps"][0][0] for sample in samples] for samples in (ours, theirs)]
    assert len(ours) == count
    assert answers[0] == answers[1]


def doc_id(sample: dict[str, Any]) -> int:
    return sample["doc_id"]


def docs() -> str:
    return (ROOT / "docs/evaluation.md").read_text("utf-8")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs `mmchat eval …` in a process of its own, with a cache of its own."""
    folder = tmp_path_factory.mktemp("eval")

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mmchat", "eval", *args],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                "XDG_CACHE_HOME": str(folder / "cache"),
            },
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip

    call.folder = folder  # type: ignore[attr-defined]
    return call


def test_the_command_shows_a_table_and_keeps_what_repeats_it(command):
    ask = ("drawn_scenes", "--include-path", str(TASKS), "--limit", "6", "--dtype", "float32")
    done = command(*ask, "-o", "out", "--cache", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    head, line = done.stdout.splitlines()
    assert head == "TASK\tMETRIC\tVALUE\t± ERROR\tASKED"
    record = json.loads((command.folder / "out/results.json").read_text("utf-8"))
    value = record["results"]["drawn_scenes"]["exact_match,none"]
    assert line.startswith(f"drawn_scenes\texact_match\t{value:.4f}\t")
    assert line.endswith("\t6")
    samples = (command.folder / "out/samples_drawn_scenes.jsonl").read_text("utf-8")
    samples = [json.loads(line) for line in samples.splitlines()]
    assert sum(sample["exact_match"] for sample in samples) == pytest.approx(6 * value)
    assert (record["model"], record["dtype"], record["quantize"]) == ("tiny", "float32", "none")
    assert [path.suffix for path in (command.folder / "cache/mmchat/eval").iterdir()] == [".db"]
    again = command(*shlex.split(record["command"])[2:], "-q", "--json", "--cache")
    assert again.returncode == 0, again.stderr
    repeated = json.loads(again.stdout)
    assert {**repeated, "seconds": 0} == {**record, "seconds": 0}
    other = command(*ask[:-1], "bfloat16", "-q", "--cache")
    assert other.returncode == 0, other.stderr
    assert len(list((command.folder / "cache/mmchat/eval").iterdir())) == 2
