"""Standard streams that are closed, full or of no use: the rest works, and exit codes stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmchat.catalog.known import data_path
from mmchat.cli import console

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
DOG = data_path("assets", "dog.jpg")
FAKE = 'tests.cli.fake_program \'{"answer": "A brown dog."}\''
CHAT = 'tests.repl.fake_chat \'{"answers": ["A brown dog."]}\''


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command of a shell, where `fake` and `chat` are scripted."""
    start = f"{sys.executable} -m"
    prelude = (
        f'mmchat() {{ {start} mmchat "$@"; }}\n'
        f'fake() {{ {start} {FAKE} "$@"; }}\n'
        f'chat() {{ {start} {CHAT} chat "$@"; }}\n'
    )
    return subprocess.run(
        ["bash", "-c", prelude + command], cwd=folder, stdin=subprocess.DEVNULL, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("mmchat --version >&-", 0, b"", b""),
        ("mmchat --help >&-", 0, b"", b""),
        (f"mmchat tiles {DOG} >&-", 0, b"", b""),
        ("mmchat tiles nope.jpg 2>&-", 4, b"", b""),
        ("mmchat tiles --nope 2>&-", 2, b"", b""),
        (f"fake generate -i {DOG} -p x 2>&-", 0, b"A brown dog.\n", b""),
        ("fake generate -p x <&- >&- 2>&-", 0, b"", b""),
        ("fake generate -q -i - -p x <&-", 4, b"", b"mmchat: error: stdin is empty; pipe the"),
        ("chat -q --no-history <&-", 0, b"", b""),
        ("fake generate -q -p x 0>file", 2, b"", b"mmchat: error: stdin cannot be read: Bad fil"),
        ("fake generate -p x 2> >(true)", 0, b"A brown dog.\n", b""),
    ],
)
def test_a_missing_stream_is_as_dev_null(command, code, out, err, tmp_path):
    done = shell(command, tmp_path)
    assert (done.stdout, done.returncode) == (out, code), done.stderr
    assert done.stderr.startswith(err)
    assert done.stderr.count(b"\n") == bool(err)


def test_an_output_file_is_written_though_stdout_is_closed(tmp_path):
    done = shell("fake generate -q -p x -o out.txt >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out.txt").read_text() == "A brown dog.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("fake generate -p x 2>/dev/full", 0, b"A brown dog.\n", b""),
        ("mmchat tiles nope.jpg 2>/dev/full", 4, b"", b""),
        ("mmchat --help >/dev/full", 7, b"", b"mmchat: error: No space left on device; free som"),
    ],
)
def test_a_full_disk_behind_stderr_loses_notes_alone(command, code, out, err, tmp_path):
    done = shell(command, tmp_path)
    assert (done.stdout, done.returncode) == (out, code), done.stderr
    assert done.stderr.startswith(err)


def test_a_path_is_one_line_on_a_terminal_and_every_byte_in_a_pipe(monkeypatch, capsys):
    path = Path("a\nmmchat: forged")
    console.print_path(path)
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    console.print_path(path)
    assert capsys.readouterr().out == "a\nmmchat: forged\na\\nmmchat: forged\n"
