"""`mmchat batch` with the built-in model, in this process."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mmchat
from mmchat.batch import cluster, run
from mmchat.catalog.adapters import AdapterSource
from mmchat.checkpoints.packed.base import Packing
from mmchat.cli import model_choice
from mmchat.cli.batch import _run_name
from mmchat.cli.sampling_options import SamplingOptions
from mmchat.errors import NetworkError
from mmchat.loading.options import LoadOptions
from tests.batch.drawn import draw
from tests.cli.conftest import Command, Outcome

ASSETS = Path(__file__).parents[2] / "assets"
ASK = ("-q", "-n", "12", "-t", "0", "-o", "out.jsonl")


@pytest.fixture(scope="module")
def tiny() -> mmchat.Model:
    return mmchat.load(device="cpu", dtype="float32")


class Batch:
    """Runs the command in a folder; `loads` counts how often a model was needed."""

    def __init__(self) -> None:
        self.loads = 0
        self.output = Path("out.jsonl")

    def __call__(self, *args: str) -> Outcome:
        return Command(lambda: None)("batch", *args, *ASK)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        lines = self.output.read_text("utf-8").splitlines()
        found = {row["custom_id"]: row for row in map(json.loads, lines)}
        assert len(found) == len(lines)
        return found


@pytest.fixture
def batch(tiny: mmchat.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Batch:
    monkeypatch.chdir(tmp_path)
    found = Batch()

    def load(*_: object) -> mmchat.Model:
        found.loads += 1
        return tiny

    monkeypatch.setattr(model_choice, "load", load)
    return found


def copy(name: str, to: str) -> None:
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    Path(to).write_bytes((ASSETS / name).read_bytes())


def test_a_folder_is_answered_and_a_bad_picture_is_a_row(batch):
    copy("dog.jpg", "in/dog.jpg")
    copy("fish.jpg", "in/Fisch ü.jpg")
    Path("in/bad.jpg").write_bytes(b"")
    done = batch("in", "-p", "What's in this image?")
    assert (done.exit_code, done.stdout, done.stderr) == (8, "", "")
    rows = batch.rows
    assert rows["in/dog.jpg"]["text"] == "A brown dog."
    assert rows["in/Fisch ü.jpg"]["text"] == "Three blue fish."
    assert rows["in/bad.jpg"]["error"] == {
        "code": "ImageError",
        "message": "'in/bad.jpg' is empty",
    }
    dog = rows["in/dog.jpg"]
    assert (dog["error"], dog["finish_reason"], dog["model"]) == (None, "stop", "tiny")
    assert dog["usage"]["image_count"] == 1
    assert dog["timings"]["prefill_seconds"] > 0


def test_a_rerun_loads_nothing_and_new_or_changed_rows_are_asked(batch):
    copy("dog.jpg", "in/a.jpg")
    copy("fish.jpg", "in/b.jpg")
    Path("in/bad.jpg").write_bytes(b"")
    assert batch("in").exit_code == 8
    before = batch.output.read_bytes()
    assert batch("in").exit_code == 8
    assert (batch.output.read_bytes(), batch.loads) == (before, 1)
    copy("fish.jpg", "in/a.jpg")
    copy("dog.jpg", "in/bad.jpg")
    copy("street.jpg", "in/new.jpg")
    assert batch("in").exit_code == 0
    texts = {name: row["text"] for name, row in batch.rows.items()}
    assert texts["in/a.jpg"] == texts["in/b.jpg"] == "Three blue fish."
    assert texts["in/bad.jpg"] == "A brown dog."
    assert len(texts) == 4


@pytest.mark.parametrize(
    "other", [("-p", "Who?"), ("-s", "Be short."), ("--seed", "1"), ("--dtype", "bfloat16")]
)
def test_other_options_are_other_answers(batch, other):
    draw("in/a.png")
    assert batch("in").exit_code == 0
    done = batch("in", *other)
    assert done.exit_code == 2
    assert "answers from other options; --force writes it anew" in done.stderr
    assert batch("in", *other, "--force").exit_code == 0
    assert len(batch.rows) == 1


def test_requests_of_openai_get_answers_in_their_form(batch):
    data = base64.b64encode((ASSETS / "dog.jpg").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    text = {"type": "text", "text": "What's in this image?"}
    content = [text, picture]
    message = {"role": "user", "content": content}
    bodies = {
        "good": {"model": "x", "messages": [message], "max_tokens": 2, "temperature": 0},
        "tools": {"messages": [message], "tools": [{}]},
        "mine": {"messages": [{"role": "assistant", "content": "Hi"}]},
        "none": {"messages": []},
    }
    Path("r.jsonl").write_text(
        "".join(
            json.dumps({"custom_id": i, "method": "POST", "url": "/v1/chat/completions", "body": b})
            + "\n"
            for i, b in bodies.items()
        )
    )
    assert batch("r.jsonl").exit_code == 8
    rows = batch.rows
    answered = rows["good"]["response"]
    assert answered["status_code"] == 200
    choice = answered["body"]["choices"][0]
    assert choice["message"]["content"] == rows["good"]["text"] == "A brown"
    assert choice["finish_reason"] == "length"
    assert answered["body"]["usage"]["completion_tokens"] == 2
    errors = {i: rows[i]["error"] for i in ("tools", "mine", "none")}
    assert "'tools' of a request is not known" in errors["tools"]["message"]
    assert {error["code"] for error in errors.values()} == {"UsageError"}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": 5},
        {"messages": [5]},
        {"messages": [{"role": ["user"], "content": "Hi"}]},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": "Hi"}], "stop": 5},
        {"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": -1},
        {"messages": [{"role": "user", "content": "Hi " * 150_000}]},
    ],
)
def test_a_body_that_is_wrong_is_a_row_with_an_error(batch, body):
    Path("r.jsonl").write_text(json.dumps({"custom_id": "x", "body": body}))
    assert batch("r.jsonl").exit_code == 8
    error = batch.rows["x"]["error"]
    assert error["code"] in ("UsageError", "ContextLengthExceeded"), error


def test_a_bug_in_one_row_does_not_end_the_job(batch, monkeypatch):
    draw("a.png")
    draw("b.png")
    request = mmchat.Model.request

    def fails_once(self: mmchat.Model, *args: Any) -> Any:
        monkeypatch.setattr(mmchat.Model, "request", request)
        raise KeyError("x")

    monkeypatch.setattr(mmchat.Model, "request", fails_once)
    assert batch("a.png", "b.png", "--rows", "1").exit_code == 8
    errors = [row["error"] for row in batch.rows.values()]
    assert sorted(error is None for error in errors) == [False, True]
    assert batch("a.png", "b.png").exit_code == 0  # it is tried again


def test_rows_have_their_own_prompts(batch):
    copy("dog.jpg", "dog.jpg")
    rows = [
        {"image": "dog.jpg", "prompt": "What colour is the dog?", "custom_id": "colour"},
        {"image": "dog.jpg"},
        {"image": ["dog.jpg", "gone.jpg"], "custom_id": "gone"},
    ]
    Path("r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert batch("r.jsonl", "-p", "What's in this image?").exit_code == 8
    found = batch.rows
    assert found["colour"]["text"] == "It is brown."
    assert found["dog.jpg"]["text"] == "A brown dog."
    assert "does not exist" in found["gone"]["error"]["message"]


def test_more_errors_than_are_allowed_end_the_job(batch):
    for number in range(60):
        Path(f"bad{number}.png").write_bytes(b"")
    done = batch("bad*.png", "--max-errors", "2", "--json")
    assert done.exit_code == 8
    assert json.loads(done.stdout) == {"rows": 60, "answered": 0, "failed": 3, "missing": 57}
    assert batch("bad*.png", "--max-errors", "0", "--json").exit_code == 8
    assert len(batch.rows) == 4


def test_the_first_failures_are_said_and_how_many_there_are(batch):
    for number in range(60):
        Path(f"bad{number:02}.png").write_bytes(b"")
    said = Command(lambda: None)("batch", "bad*.png", "-o", "out.jsonl").stderr.splitlines()
    assert sum(line.endswith(".png' is empty") for line in said) == 3
    assert "and 57 more failed" in said


def test_check_counts_and_writes_nothing(batch):
    for number in range(4):
        draw(f"in/{number}.png")
    done = batch("in", "--check")
    assert (done.exit_code, batch.output.exists(), batch.loads) == (8, False, 0)
    assert done.stdout.split() == ["rows", "4", "answered", "0", "failed", "0", "missing", "4"]
    assert batch("in").exit_code == 0
    draw("in/4.png")
    with batch.output.open("a") as file:
        file.write('{"custom_id": "torn')
    before = batch.output.read_bytes()
    done = batch("in", "--check", "--json")
    assert json.loads(done.stdout) == {"rows": 5, "answered": 4, "failed": 0, "missing": 1}
    assert batch.output.read_bytes() == before


def test_shards_join_to_the_whole(batch):
    for number in range(7):
        draw(f"in/{number}.png")
    for number in range(3):
        assert batch("in", "--shard", f"{number}/3", "-o", f"out-{number}.jsonl").exit_code == 0


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "0/0", "1/3/5"])
def test_a_shard_that_is_none_is_refused(batch, shard):
    draw("a.png")
    done = batch("a.png", f"--shard={shard}")
    assert done.exit_code == 2
    assert "write I/N with I from 0 to N - 1" in done.stderr


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("none",), "'none' does not exist"),
        (("r.jsonl", "-o", "r.jsonl"), "would replace the input"),
        (("a.png", "-p", " "), "the prompt is empty"),
        (("a.png", "-o", "a.png"), "would replace the input"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(batch, args, reason):
    draw("a.png")
    Path("r.jsonl").write_text('{"image": "a.png"}\n')
    done = Command(lambda: None)("batch", *ASK, *args)
    assert (done.exit_code, batch.loads) == (2, 0)
    assert reason in done.stderr


@pytest.mark.parametrize("more", [(), ("--check",)])
def test_answers_go_to_no_stdout(batch, more):
    draw("a.png")
    done = Command(lambda: None)("batch", "a.png", *ASK[1:-1], "-", *more)
    assert (done.exit_code, done.stdout, batch.loads) == (7, "", 0)
    assert "cannot write '-': stdout is not possible here" in done.stderr


@pytest.mark.parametrize("inputs", [("in", "in/a.png", "in/*.png"), ("r.jsonl", "r.jsonl")])
def test_what_is_named_twice_is_asked_once(batch, inputs):
    draw("in/a.png")
    Path("r.jsonl").write_text('{"image": "in/a.png"}\n')
    done = Command(lambda: None)("batch", *inputs, *ASK[1:])
    assert done.exit_code == 0
    assert len(batch.rows) == 1
    assert "1 row, 1 answered, 0 failed, 0 missing" in done.stderr


BODY = '{"custom_id": "x", "body": {"messages": [{"role": "user", "content": [%s]}]}}'
URL = '{"type": "image_url", "image_url": {"url": "%s"}}'


@pytest.mark.parametrize(
    ("rows", "output"),
    [
        ("in", "in/a.png"),
        ("in/*.png", "in/a.png"),
        ("in", "link.png"),
        ("in", "in/../in/a.png"),
        ("in/paper.pdf#1", "in/paper.pdf"),
        ('{"prompt": "no picture"}\n{"image": ["b.png", "in/a.png"]}', "in/a.png"),
        ('{"image": "in/a.png"}', "link.png"),
        ('{"image": "FOLDER/in/a.png"}', "in/a.png"),
        ('{"image": "file://FOLDER/in/a.png"}', "in/a.png"),
        (BODY % (URL % "in/a.png"), "in/a.png"),
        ("image\nin/a.png\n", "in/a.png"),
    ],
)
@pytest.mark.parametrize("more", [("--force",), (), ("--force", "--shard", "0/9")])
def test_no_picture_that_is_asked_about_is_replaced(batch, rows, output, more, tmp_path):
    for name in ("in/a.png", "b.png"):
        draw(name)
    Path("in/paper.pdf").write_bytes(b"%PDF-1.4\n")
    Path("link.png").symlink_to("in/a.png")
    ending = {"{": "jsonl", "i": "csv"}[rows[0]] if "\n" in rows or "{" in rows else ""
    if ending:
        Path(f"rows.{ending}").write_text(rows.replace("FOLDER", str(tmp_path)))
    before = Path(output).read_bytes()
    done = Command(lambda: None)("batch", f"rows.{ending}" if ending else rows, "-o", output, *more)
    assert (done.exit_code, batch.loads) == (2, 0)
    assert f"-o '{Path(output)}' would replace" in done.stderr
    assert Path(output).read_bytes() == before


def test_the_file_of_a_schema_is_not_replaced(batch):
    draw("a.png")
    Path("s.json").write_text('{"type": "object"}')
    done = Command(lambda: None)("batch", "a.png", "--schema", "s.json", "-o", "s.json", "--force")
    assert (done.exit_code, Path("s.json").read_text()) == (2, '{"type": "object"}')
    assert "would replace the schema" in done.stderr


def test_stdout_is_refused_for_a_rerun_could_not_read_it(batch):
    draw("a.png")
    done = Command(lambda: None)("batch", "a.png", "-o", "-")
    assert (done.exit_code, batch.loads, Path("-").exists()) == (7, 0, False)
    assert "'-': stdout is not possible here; give the name of a file" in done.stderr


def test_lines_of_rows_that_are_gone_stay_and_are_told(batch):
    for name in ("in/a.png", "in/b.png"):
        draw(name)
    batch("in")
    Path("in/a.png").unlink()
    for more in ((), ("--check",)):
        done = Command(lambda: None)("batch", "in", *ASK[1:], *more)
        assert done.exit_code == 0
        assert "'out.jsonl' has 1 line of rows that are not asked any more" in done.stderr
    assert set(batch.rows) == {"in/a.png", "in/b.png"}


def test_check_counts_as_the_run_did(batch):
    """A row whose failure may pass has failed, though it is asked again; none is missing."""
    Path("bad.png").write_bytes(b"")
    draw("a.png")
    Path("r.jsonl").write_text(
        '{"image": "http://127.0.0.1:9/a.png"}\n{"image": "bad.png"}\n{"image": "a.png"}\n'
    )
    counts = {"rows": 3, "answered": 1, "failed": 2, "missing": 0}
    assert json.loads(batch("r.jsonl", "--json").stdout) == counts
    assert json.loads(batch("r.jsonl", "--json", "--check").stdout) == counts
    draw("a.png", (0, 0, 9))
    missing = {**counts, "answered": 0, "missing": 1}
    assert json.loads(batch("r.jsonl", "--json", "--check").stdout) == missing


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(batch, monkeypatch):
    for number in range(6):
        draw(f"in/{number}.png")
    record, seen = run.Outcome.record, []

    def third(self: run.Outcome, model: str) -> dict[str, Any]:
        seen.append(self)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return record(self, model)

    monkeypatch.setattr(run.Outcome, "record", third)
    done = batch("in")
    assert done.exit_code == 130
    assert "the same command goes on from here" in done.stderr
    assert len(batch.rows) == 2
    assert batch("in").exit_code == 0
    assert len(batch.rows) == 6


def test_a_job_that_a_cluster_refuses_leaves_the_file_as_it_was(batch, monkeypatch):
    Path("bad.png").write_bytes(b"")
    batch("bad.png")
    before = batch.output.read_text("utf-8").replace("ImageError", "NetworkError")  # may pass
    batch.output.write_text(before, "utf-8")

    def refused(*_: object):
        raise NetworkError("no Ray cluster")
        yield

    monkeypatch.setattr(cluster, "check_address", lambda *_: None)
    monkeypatch.setattr(cluster, "answer_lines", refused)
    done = batch("bad.png", "--ray", "auto")
    assert (done.exit_code, done.stderr) == (6, "mmchat: error: no Ray cluster\n")
    assert batch.output.read_text("utf-8") == before


def test_notes_say_what_was_asked_and_done(batch):
    draw("a.png")
    Path("bad.png").write_bytes(b"")
    done = Command(lambda: None)("batch", "a.png", "bad.png", *ASK[1:])
    assert 'no question is given; asking "What\'s in this image?"' in done.stderr
    assert "'bad.png' is empty" in done.stderr
    assert "2 rows, 1 answered, 1 failed, 0 missing" in done.stderr
    assert "failed before" not in done.stderr


def test_a_rerun_names_the_rows_that_it_leaves_failed(batch):
    draw("a.png")
    for name in "vwxyz":
        Path(f"{name}.png").write_bytes(b"")
    files = [f"{name}.png" for name in "avwxyz"]
    Command(lambda: None)("batch", *files, *ASK[1:])
    for more in ([], ["--check"]):
        done = Command(lambda: None)("batch", *files, *ASK[1:], *more)
        said = "failed before, not asked again: 'v.png', 'w.png', 'x.png' and 2 more"
        assert said in done.stderr
        assert done.exit_code == 8


def test_answers_obey_a_schema(batch):
    pytest.importorskip("llguidance")
    copy("dog.jpg", "dog.jpg")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    batch("dog.jpg", "--schema", json.dumps({**schema, "additionalProperties": False}))
    assert batch.rows["dog.jpg"]["text"].startswith("{")


class Rounded(Packing):
    label, scheme = "rounded", "int8"


def test_other_weights_are_other_answers():
    source = LoadOptions().find()
    packed = replace(source.spec, packing=Rounded())
    other = [
        (replace(source, adapters=(AdapterSource(Path("a")),)), LoadOptions()),
        (replace(source, adapters=(AdapterSource(Path("a"), 0.5),)), LoadOptions()),
        (replace(source, adapters=(AdapterSource(Path("b")),)), LoadOptions()),
        (replace(source, companion=Path("clip")), LoadOptions()),
        (source, LoadOptions(params_path="other.json")),
        (replace(source, spec=packed), LoadOptions(device="cpu")),
    ]
    names = [
        _run_name(one, options, SamplingOptions(), "What?", None)
        for one, options in ((source, LoadOptions()), *other)
    ]
    assert len(set(names)) == len(names)
