"""The file of answers: whole lines, whatever ended the run before, and nobody else's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmchat.batch.output import Output
from mmchat.errors import DiskError, UsageError

ANSWER = {"text": "A dög.", "error": None}
BROKEN = {"error": {"code": "ImageError", "message": "is empty"}}
PASSING = {"error": {"code": "NetworkError", "message": "no answer"}}


def row(custom_id, asked, record):
    return {"custom_id": custom_id, **record, "input": asked}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Output(tmp_path / "out.jsonl", "r") as out:
        out.add(row("a", "1", ANSWER))
        out.add(row("b", "2", BROKEN))
        out.add(row("c", "3", PASSING))
    return tmp_path / "out.jsonl"


def test_a_rerun_knows_what_is_done_and_what_may_pass(path):
    with Output(path, "r") as out:
        assert (out.answered, out.failed) == ({"a": "1"}, {"b": "2", "c": ""})
        out.add(row("d", "4", ANSWER))
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [one["custom_id"] for one in found] == ["a", "b", "c", "d"]
    assert found[0] == {"custom_id": "a", **ANSWER, "input": "1", "run": "r"}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_line_is_cut_off(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Output(path, "r") as out:
        assert set(out.failed) == {"b"}
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


@pytest.mark.parametrize("left", ["", "{", '{"custom_id": "a", "te'])
def test_a_torn_first_line_is_cut_off(tmp_path, left):
    path = tmp_path / "out.jsonl"
    path.write_text(left)
    Output(path, "r").close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"a": 1}\n', "[]\n", "7"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"holds something else \(line 1\); --force"):
        Output(path, "r")
    assert path.read_text() == content
    with Output(path, "r", force=True) as out:
        out.add(row("a", "1", ANSWER))
    assert path.read_text("utf-8").count("\n") == 1


def test_answers_from_other_options_are_refused(path):
    with pytest.raises(UsageError, match="answers from other options; --force"):
        Output(path, "other")
    with Output(path, "other", force=True) as out:
        assert not out.answered
    assert path.read_bytes() == b""


def test_what_is_asked_again_leaves_no_second_line(path):
    path.chmod(0o640)
    with Output(path, "r") as out:
        out.forget(["b", "c", "new"])
        with pytest.raises(UsageError, match="another run is writing"):
            Output(path, "r")  # the lock is that of the new file
        out.add(row("c", "3", ANSWER))
    assert path.stat().st_mode & 0o777 == 0o640
    with Output(path, "r", read_only=True) as out:
        assert (out.answered, out.failed) == ({"a": "1", "c": "3"}, {})
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_one_run_at_a_time_writes(path):
    with Output(path, "r"):
        with pytest.raises(UsageError, match=r"another run is writing .* wait for it"):
            Output(path, "r")
        assert Output(path, "r", read_only=True).answered
    Output(path, "r").close()


def test_a_link_is_followed_and_kept(path):
    link = path.with_name("link.jsonl")
    link.symlink_to(path)
    with Output(link, "r") as out:
        out.forget(["c"])
        out.add(row("c", "3", ANSWER))
    assert link.is_symlink()
    assert path.read_text("utf-8").count("\n") == 3


def test_a_name_that_is_no_text_comes_back_the_same(path):
    with Output(path, "r") as out:
        out.add(row("\udcff.png", "5", ANSWER))
    assert "\udcff.png" in Output(path, "r", read_only=True).answered


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    before = path.read_bytes()
    out = Output(path, "r")

    class Full:
        def write(self, data: memoryview) -> int:
            if len(data) < 60:
                raise OSError(28, "No space left on device")
            return real.write(data[:40])

        def __getattr__(self, name: str):
            return getattr(real, name)

    real, out._file = out._file, Full()
    with pytest.raises(DiskError, match="No space left"):
        out.add(row("d", "4", ANSWER))
    out.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "none/out.jsonl"])
def test_what_cannot_be_a_file_is_refused(tmp_path, name):
    with pytest.raises(DiskError, match="cannot write"):
        Output(tmp_path / name, "r")
