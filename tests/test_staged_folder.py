import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmchat import staged_folder as staging
from mmchat.errors import DiskError, UsageError
from mmchat.staged_folder import staged_folder

FILES = 5
ROOT = Path(__file__).parents[1]
WRITER = f"""
import sys
from pathlib import Path
from mmchat.staged_folder import staged_folder

folder = Path(sys.argv[1])
for content in range(1000):
    with staged_folder(folder, replace=folder.exists()) as work:
        for number in range({FILES}):
            (work / str(number)).write_text(str(content))
    sys.stdout.write("x")
    sys.stdout.flush()
"""


def make(folder: Path, content: str, *, replace: bool = False) -> None:
    with staged_folder(folder, replace=replace) as work:
        for number in range(FILES):
            (work / str(number)).write_text(content)


def content_of(folder: Path) -> str:
    """What all files of a whole folder say."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == [str(number) for number in range(FILES)]
    (content,) = {path.read_text() for path in folder.iterdir()}
    return content


def test_the_folder_appears_when_the_block_ends(tmp_path):
    with staged_folder(tmp_path / "new") as work:
        (work / "0").write_text("a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "0").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_another_folder_takes_its_place_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    folder = tmp_path / "new"
    make(folder, "old")
    (folder / "extra").write_text("")
    make(folder, "new", replace=True)
    assert content_of(folder) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no such call")
def test_two_folders_are_exchanged_in_one_step(tmp_path):
    make(tmp_path / "a", "a")
    make(tmp_path / "b", "b")
    assert staging._exchange(tmp_path / "a", tmp_path / "b") == (
        sys.platform in ("linux", "darwin")
    )
    assert (content_of(tmp_path / "a"), content_of(tmp_path / "b")) == ("b", "a")


def test_a_failure_leaves_what_was_there(tmp_path):
    folder = tmp_path / "new"
    make(folder, "old")

    def fail():
        with staged_folder(folder, replace=True) as work:
            (work / "0").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content_of(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_stands_there_is_not_replaced_unasked(tmp_path):
    folder = tmp_path / "new"
    make(folder, "old")
    with pytest.raises(DiskError, match="cannot write"):
        make(folder, "new")
    assert content_of(folder) == "old"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "new").mkdir()
    make(tmp_path / "new", "a")
    assert content_of(tmp_path / "new") == "a"


def test_two_runs_do_not_write_one_folder_at_once(tmp_path):
    with staged_folder(tmp_path / "new") as work:
        with pytest.raises(UsageError, match="another run"):
            make(tmp_path / "new", "second")
        (work / "0").write_text("first")
    assert (tmp_path / "new" / "0").read_text() == "first"


def test_a_folder_that_a_killed_run_moved_away_comes_back(tmp_path):
    folder = tmp_path / "new"
    make(folder, "old")
    outside = tmp_path / ".mmchat-new-new"
    outside.mkdir()
    folder.rename(outside / "old")
    with pytest.raises(ZeroDivisionError), staged_folder(folder):
        raise ZeroDivisionError
    assert content_of(folder) == "old"


def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    folder = tmp_path / "new"
    make(folder, "before")
    chance = random.Random(3)
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        ) as run:
            assert run.stdout is not None
            assert run.stdout.read(1) == b"x"
            time.sleep(chance.random() * 0.02)
            os.kill(run.pid, signal.SIGKILL)
        content_of(folder)
    make(folder, "after", replace=True)
    assert content_of(folder) == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
