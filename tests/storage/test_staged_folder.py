import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmchat.errors import DiskError, UsageError
from mmchat.storage import staged_folder as staging
from mmchat.storage.staged_folder import staged_folder

FILES = 5
ROOT = Path(__file__).parents[2]
WRITER = f"""
import sys
from pathlib import Path
from mmchat.storage.staged_folder import staged_folder

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
    with pytest.raises(UsageError, match="was written by another run of mmchat meanwhile; it is w"):
        make(folder, "new")
    assert content_of(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


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


@pytest.fixture
def precious(tmp_path):
    """A folder elsewhere; all that is in it must stay."""
    folder = tmp_path / "precious"
    (folder / "photos").mkdir(parents=True)
    (folder / "new").mkdir()
    (folder / "photos" / "1.jpg").write_text("irreplaceable")
    yield folder
    assert (folder / "photos" / "1.jpg").read_text() == "irreplaceable"
    assert sorted(path.name for path in folder.iterdir()) == ["new", "photos"]


def test_a_link_at_the_place_of_the_staging_folder_is_refused(tmp_path, precious):
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / ".mmchat-new-tiny"
    link.symlink_to("../precious")
    with pytest.raises(DiskError, match=r"'.*\.mmchat-new-tiny' is in the way"):
        make(tmp_path / "out" / "tiny", "a")
    assert [path.name for path in link.parent.iterdir()] == [link.name]


def test_links_in_what_a_killed_run_left_are_not_followed(tmp_path, precious):
    staged = tmp_path / "out" / ".mmchat-new-tiny"
    staged.mkdir(parents=True)
    for name in ("new", "x"):
        (staged / name).symlink_to("../../precious")
    make(tmp_path / "out" / "tiny", "a")
    assert content_of(tmp_path / "out" / "tiny") == "a"
    assert not staged.exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["file", "fifo", "dangling"])
def test_what_is_no_folder_at_its_place_ends_in_an_error_or_goes(tmp_path, kind):
    path = tmp_path / ".mmchat-new-tiny"
    if kind == "file":
        path.write_text("left")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    if kind == "file":
        make(tmp_path / "tiny", "a")
    else:
        with pytest.raises(DiskError, match="in the way"):
            make(tmp_path / "tiny", "a")
        assert path.is_symlink() or path.is_fifo()


def test_the_folder_of_another_user_is_not_taken_over(tmp_path, monkeypatch):
    staged = tmp_path / ".mmchat-new-tiny"
    staged.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(DiskError, match="another user"):
        make(tmp_path / "tiny", "a")
    assert list(tmp_path.iterdir()) == [staged]


def test_a_file_system_without_locks_is_written_to_and_nothing_stays(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    make(tmp_path / "tiny", "a")
    make(tmp_path / "tiny", "b", replace=True)
    assert content_of(tmp_path / "tiny") == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    (tmp_path / ".mmchat-new-tiny").mkdir()  # of a run that may be running
    with pytest.raises(UsageError, match="if none is, remove"):
        make(tmp_path / "tiny", "c", replace=True)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_cannot_keep_it_is_said(tmp_path, monkeypatch, number):
    def failing(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DiskError, match="cannot write"):
        make(tmp_path / "tiny", "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    folder = tmp_path / "new"
    make(folder, "before")
    chance = random.Random(3)
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        ) as run:
            assert run.stdout is not None
            assert run.stdout.read(1) == b"x"
            time.sleep(chance.random() * 0.02)
            os.kill(run.pid, signal.SIGKILL)
        content_of(folder)
    make(folder, "after", replace=True)
    assert content_of(folder) == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_name_without_room_for_that_of_the_staging_folder_is_refused(tmp_path):
    name = 250 * "n"
    refused = pytest.raises(UsageError, match="nnn' is too long for a folder's name")
    with refused, staged_folder(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []
