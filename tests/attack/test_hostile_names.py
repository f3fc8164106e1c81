"""Every command with names that are escape sequences, lies or nonsense, on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from mmchat.cli import app
from tests.attack.conftest import Figures, rounds

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "\x1b]52;c;aGk=\x07x", "\x1b[2J\x1b[Hx", "\x9b31mx", "a\nmmchat: forged", "a\rmmchat: forged",
    "\u202egpj.x", "x\U000e0041", "[bold red]x[/]", "-rf", "--help=x", "~nosuch/x", "~", "/", ".",
    "..", "", " ", "x" * 300, "/dev/zero", "/dev/full", "fifo", "a%s%n", "$(touch x)", "café",
    "\udce9\udcff", "owner/../x", "http://[::1", "http://u:secret@h/", "data:,x", "\u200b",
]  # fmt: skip
# @ is the name; what stands before it as it is.
COMMANDS = [
    "@", "generate @ -p x", "generate -p @ -n 1", "generate -p x -i @", "generate -p x -o @ -n 1",
    "generate -p x -s @ -n 1", "generate -p x --stop @ -n 1", "generate -p x --device @",
    "generate -p x --dtype @", "generate -p x --quantize @", "generate -p x --seed @",
    "generate -p x --checkpoint-path @", "generate -p x --tokenizer-path @",
    "generate -p x --params-path @", "generate --@", "chat @", "chat --resume @", "chat -i @",
    "chat -s @ --device @", "tiles @", "tiles assets/dog.jpg -o @", "tiles --model @ x.png",
    "inspect @", "inspect tiny --params-path @", "where @", "remove @ -y", "verify @",
    "verify @ --repair --offline", "verify @ --values", "download @ --offline",
    "download a/b --revision @ --offline", "download a/b --local-dir @ --offline",
    "download a/b --include @ --offline", "export @ --format hf", "export tiny --format hf -o @",
    "export tiny --format hf --dtype @", "export @ --format safetensors", "export tiny --format @",
    "bench @ --seconds 0.1", "bench --quantize @", "bench tiny --context @", "eval @",
    "eval scenes @", "list @", "doctor @", "list --color @",
]  # fmt: skip
SECONDS = 120.0
OURS = re.compile(r"\x1b\[(\??[0-9;]*[mKJAGhlHC])")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux terminal"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """The exit code and all that a terminal got; the command is forked from this process."""
    child, master = pty.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            sys.stdin, sys.stdout, sys.stderr = (
                open(number, mode, closefd=False)  # noqa: SIM115
                for number, mode in ((0, "r"), (1, "w"), (2, "w"))
            )
            sys.argv = ["mmchat", *words]
            from mmchat.__main__ import main

            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(code)
    said, begun = b"", time.monotonic()
    while time.monotonic() < begun + SECONDS:
        if not select.select([master], [], [], 0.5)[0]:
            continue
        try:
            more = os.read(master, 65536)
        except OSError:  # how Linux says end of file here
            break
        said += more
        if b"\x1b[6n" in more or b"\x1b[c" in more:  # asks the terminal, which is dumb
            os.write(master, b"\x04")
        if said.endswith(b"> ") or (b"\n" in more and b">" in said):  # a chat with what -o made
            os.write(master, b"\x04")
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(master)
    return os.waitstatus_to_exitcode(status), said.decode("utf-8", "surrogateescape")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "dog.jpg", tmp_path / "assets")
    os.mkfifo(tmp_path / "fifo")
    for name, value in (
        ("HOME", str(tmp_path / "home")), ("XDG_DATA_HOME", str(tmp_path / "data")),
        ("XDG_CONFIG_HOME", str(tmp_path / "config")), ("HF_HOME", str(tmp_path / "hf")),
        ("TERM", "dumb"), ("OMP_NUM_THREADS", "1"), ("COLUMNS", "200"),
        ("MMCHAT_NATIVE_KERNELS", "0"),  # whose cache is in the other home
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    return tmp_path


def check(words: list[str], code: int, said: str) -> None:
    case = f"{words!r} -> {code}: {said[-2000:]!r}"
    assert 0 <= code <= 7, case
    assert "Traceback" not in said, case
    assert "this is a bug" not in said, case
    left = OURS.sub("", said)
    assert not set(left) & {"\x1b", "\x07", "\x9b", "\u202e", "\U000e0041"}, case
    lines = re.split(r"[\r\n]+", left)
    assert not any(line.startswith("mmchat: forged") for line in lines), case


def test_no_command_crashes_hangs_or_lets_a_name_act(place: Path, figures: Figures) -> None:
    import torch  # noqa: F401  before the forks, as what the commands import

    for command in app.COMMANDS:
        app.load(command)
    cases = [(command, name) for command in COMMANDS for name in HOSTILE]
    chosen = random.Random(1).sample(cases, rounds(len(cases)))
    for command, name in chosen:
        words = [word.replace("@", name) for word in command.split(" ")]
        if any("\0" in word for word in words):
            continue
        if words[0] == "generate" and name == "fifo" and "-o" in words:
            continue  # waits for who reads it, as every program does
        code, said = run(words, place)
        check(words, code, said)
    figures(commands=len(chosen))
