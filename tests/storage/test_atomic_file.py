import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmchat.errors import DiskError
from mmchat.storage import atomic_file, safe_files


def test_a_file_is_written_and_nothing_else_stays_in_the_folder(tmp_path):
    atomic_file.write_text(tmp_path / "a.txt", "häuser\n")
    assert (tmp_path / "a.txt").read_bytes() == "häuser\n".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"a\.txt': No space left on device"):
        atomic_file.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_the_mode_of_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    atomic_file.write_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == b"new"


def test_a_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to("target.txt")
    atomic_file.write_bytes(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "target.txt").read_bytes() == b"new"


def test_a_device_is_written_directly():
    atomic_file.check_writable(Path("/dev/null"))
    atomic_file.write_bytes(Path("/dev/null"), b"gone")


@pytest.mark.parametrize("name", ["missing/a.txt", "."])
def test_an_unwritable_place_is_named_before_the_work(tmp_path, name):
    with pytest.raises(DiskError, match="cannot write"):
        atomic_file.check_writable(tmp_path / name)


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path):
    atomic_file.write_text(tmp_path / "a.txt", "\udc80")
    assert (tmp_path / "a.txt").read_bytes() == b"\\udc80"


KILLED = """
import os, sys
from pathlib import Path
from mmchat.storage import atomic_file
os.fsync = lambda _: os.kill(os.getpid(), 9)
atomic_file.write_text(Path(sys.argv[1]), "half")
"""
WRITER = """
import sys
from pathlib import Path
from mmchat.storage import atomic_file
atomic_file.write_text(Path(sys.argv[1]), "whole")
"""


def run(script, path):
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode


@pytest.mark.process
def test_what_a_killed_run_left_goes_with_the_next_write(tmp_path):
    assert run(KILLED, tmp_path / "a.txt") == -9
    assert run(KILLED, tmp_path / "b.txt") == -9
    (tmp_path / ".mmchat-notes.tmp").write_text("mine")
    assert run(WRITER, tmp_path / "c.txt") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".mmchat-notes.tmp", "c.txt"]


@pytest.mark.process
def test_the_file_that_another_run_writes_now_stays(tmp_path):
    with safe_files.temporary_file(tmp_path) as (temporary, _):
        assert run(WRITER, tmp_path / "c.txt") == 0
        assert temporary.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


@pytest.mark.process
@pytest.mark.timeout(20)
def test_links_and_pipes_with_a_temporary_name_are_let_be(tmp_path):
    (tmp_path / "mine").write_text("mine")
    link, pipe = (tmp_path / f".mmchat-{digit * 16}.tmp" for digit in "01")
    link.symlink_to("mine")
    os.mkfifo(pipe)
    assert run(WRITER, tmp_path / "c.txt") == 0
    assert (tmp_path / "mine").read_text() == "mine"
    assert link.is_symlink()
    assert pipe.is_fifo()


def test_a_write_that_may_not_follow_replaces_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    atomic_file.write_bytes(tmp_path / "link", b"new", follow=False)
    assert (tmp_path / "target").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def test_a_folder_that_cannot_be_made_durable_is_said(tmp_path, monkeypatch):
    sync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DiskError, match="Input/output error"):
        atomic_file.write_text(tmp_path / "a.txt", "new")


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}/a", "loop", "loop/a", "a\0b"])
@pytest.mark.parametrize(
    "write", [atomic_file.check_writable, lambda p: atomic_file.write_text(p, "")]
)
def test_what_is_no_possible_name_is_a_disk_error(tmp_path, name, write):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DiskError, match="cannot write"):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
