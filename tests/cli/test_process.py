"""The command as a real process: pipes, terminals, signals, a reader that goes away."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from tests.repl.screens import Terminal

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]  # long: begun early

ROOT = Path(__file__).parents[2]
HOSTILE = "red \x1b[31mrose \x1b]52;c;aGk=\x07and \u202eback"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the command with a model that says `answer`, `delay` seconds a token."""
    started: list[subprocess.Popen] = []

    def start_one(
        *args: str, answer: str = "A brown dog.", delay: float = 0.0, **streams: Any
    ) -> subprocess.Popen:
        script = json.dumps({"answer": answer, "delay": delay})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        streams = {"stdin": subprocess.DEVNULL, "stdout": -1, "stderr": -1, **streams}
        command = [sys.executable, "-m", "tests.cli.fake_program", script, *args]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **streams))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        with process:  # closes its pipes and waits
            pass


def read_terminal(terminal: int) -> str:
    """All that was written to a pseudo terminal until its other end closed."""
    data = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # how Linux says end of file here
            break
        if not more:
            break
        data += more
    os.close(terminal)
    return data.decode()


def test_a_pipe_gets_every_byte_as_the_model_said_it(start):
    out, err = start("generate", "-q", "-p", "x", answer=HOSTILE).communicate(timeout=120)
    assert out == (HOSTILE + "\n").encode()
    assert err == b""


def test_a_terminal_gets_no_escape_sequence_from_the_model(start):
    terminal, inner = pty.openpty()
    process = start("generate", "-q", "-p", "x", answer=HOSTILE, stdout=inner)
    os.close(inner)
    written = read_terminal(terminal)
    assert process.wait(60) == 0
    screen = Terminal()
    screen.write(written)
    assert screen.lines() == ["red \N{SYMBOL FOR ESCAPE}rose \N{SYMBOL FOR ESCAPE}and back"]
    assert set(re.findall(r"\x1b\W*\w", written)) <= {"\x1b[J"}  # our own


def test_stderr_on_a_terminal_shows_stages_and_cleans_up(start):
    terminal, inner = pty.openpty()
    process = start("generate", "-p", "x", delay=0.02, stderr=inner)
    os.close(inner)
    written = read_terminal(terminal)
    assert process.communicate(timeout=60)[0] == b"A brown dog.\n"
    assert "reading the prompt" in written
    screen = pyte.Screen(100, 5)
    pyte.Stream(screen).feed(written)
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert lines == ["using the built-in model 'Llama-3.2-11B-Vision-Instruct'; see 'mmchat list'"]
    assert not screen.cursor.hidden


def test_json_on_a_terminal_is_pure_ascii(start):
    terminal, inner = pty.openpty()
    process = start("generate", "-q", "-p", "x", "--json", answer=HOSTILE, stdout=inner)
    os.close(inner)
    written = read_terminal(terminal)
    assert process.wait(60) == 0
    assert written.isascii()
    assert "\x1b" not in written
    assert json.loads(written)["text"] == HOSTILE


def test_tokens_come_through_a_pipe_as_they_are_made(start):
    process = start("generate", "-q", "-p", "x", answer="abc", delay=0.5)
    assert process.stdout is not None
    first = process.stdout.read(1)
    assert (first, process.poll()) == (b"a", None)
    assert process.communicate(timeout=60)[0] == b"bc\n"


def said_so_far(process: subprocess.Popen, count: int = 2) -> bytes:
    assert process.stdout is not None
    return process.stdout.read(count)


def test_sigint_ends_the_answer_within_a_token_and_exits_130(start):
    process = start("generate", "-q", "-p", "x", answer="a" * 400, delay=0.05)
    said = said_so_far(process)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (said + rest).strip(b"a") == b"\n"
    assert len(rest) < 40
    assert err == b""


def test_sigterm_exits_143_without_a_traceback(start):
    process = start("generate", "-q", "-p", "x", answer="a" * 400, delay=0.05)
    said_so_far(process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, b"")


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_within_an_import_that_catches_everything_ends_the_command(sent, code, tmp_path):
    (tmp_path / "greedy.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{sent})\n    sum(range(10**5))\n"
        "except BaseException:\n    pass\n"
    )
    program = (
        "import time, mmchat.cli.app\nfrom mmchat.__main__ import main\n"
        "def app(prog_name):\n    import greedy\n    time.sleep(5)\n    print('went on')\n"
        "mmchat.cli.app.app = app\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_while_a_chat_loads_leaves_the_terminal_as_it_was(sent, code, tmp_path):
    program = (
        "import sys, time\nfrom mmchat.cli import model_choice\n"
        "from tests.cli.fake_loading import install\nfrom tests.cli.fake_program import scripted\n"
        "install(scripted(''), setattr)\n"
        "def load(*_):\n    print('LOADING', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "model_choice.load = load\nfrom mmchat.__main__ import main\nmain()\n"
    )
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, "chat", "-q"], cwd=tmp_path, stdin=inner, stdout=inner,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.read(8) == b"LOADING\n"
    assert not termios.tcgetattr(inner)[3] & termios.ECHO
    process.send_signal(sent)
    assert process.wait(60) == code
    assert termios.tcgetattr(inner)[3] & termios.ECHO
    assert process.stderr.read() == b""
    process.stderr.close()
    os.close(inner)
    os.close(terminal)


@pytest.mark.parametrize("kib", [300_000, 750_000, 800_000])
def test_a_small_address_space_is_exit_code_5(kib):
    command = f'ulimit -v {kib}; exec "$0" -m mmchat generate -q -p x'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], cwd=ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (5, b"", 1), done.stderr


def test_a_reader_that_goes_away_ends_the_command_quietly(start):
    process = start("generate", "-q", "-p", "x", answer="a" * 400, delay=0.02)
    said_so_far(process)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_stdout_is_exit_code_7(start):
    with Path("/dev/full").open("wb") as full:
        process = start("generate", "-q", "-p", "x", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert err == b"mmchat: error: cannot write the output: No space left on device\n"


def test_without_a_prompt_on_a_terminal_nothing_is_awaited(start):
    terminal, inner = pty.openpty()
    process = start("generate", stdin=inner)
    _, err = process.communicate(timeout=60)
    os.close(inner)
    os.close(terminal)
    assert process.returncode == 2
    assert err == (
        b"mmchat: error: no prompt is given; use --prompt TEXT or pipe the text into stdin\n"
    )


def test_a_silent_stdin_is_named_after_a_while(start):
    process = start("generate", "-p", "x", stdin=subprocess.PIPE)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line == b"reading stdin until it ends (write '< /dev/null' to give none)\n"
    out, _ = process.communicate(timeout=60)
    assert out == b"A brown dog.\n"


# Of mmchat.cli, and libraries that take long.
COMMAND_MODULES = {
    "bench", "chat", "chats", "convert", "doctor", "download", "eval", "export", "generate",
    "inspect", "keeping", "list_models", "tiles", "verify",
}  # fmt: skip
HEAVY = {"torch", "numpy", "PIL", "tiktoken", "prompt_toolkit", "huggingface_hub", "pydantic"}


def loaded_by(arguments: list[str], **environment: str) -> tuple[str, set[str], set[str]]:
    """What the command prints, and which of HEAVY and of COMMAND_MODULES it has imported."""
    program = (
        "import json, sys\nfrom mmchat.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(json.dumps(list(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=60, check=True,
    )  # fmt: skip
    modules = set(json.loads(done.stderr))
    commands = {name for name in COMMAND_MODULES if f"mmchat.cli.{name}" in modules}
    return done.stdout, HEAVY & modules, commands


@pytest.mark.parametrize(
    ("arguments", "own"),
    [(["--help"], set()), (["--version"], set()), (["generate", "--help"], {"generate"})],
)
def test_help_and_version_load_nothing_heavy_and_no_other_command(arguments, own):
    shown, heavy, commands = loaded_by(arguments)
    assert shown
    assert (heavy, commands) == (set(), own)


@pytest.mark.parametrize(
    ("words", "word", "offered", "own"),
    [
        ("mmchat gen", "1", "generate", set()),
        ("mmchat generate llama3.2-9", "2", "llama3.2-90B", {"generate"}),
        ("mmchat generate --quan", "2", "--quantize", {"generate"}),
        ("mmchat generate --quantize ", "3", "int4-g32", {"generate"}),
    ],
)
def test_completion_offers_commands_and_models_and_loads_no_other_command(
    words, word, offered, own
):
    shown, heavy, commands = loaded_by(
        [], _MMCHAT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=word
    )
    assert offered in shown.split()
    assert (heavy, commands) == (set(), own)


def test_the_help_reads_no_options_of_loading():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mmchat", "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "mmchat.cli.app" in imported
    unneeded = {"mmchat.loading.options", "mmchat.cli.defaults", "tomllib"}
    assert not imported & unneeded


def test_an_answer_leaves_out_what_torch_has_for_its_compiler_which_can_be_had_later():
    program = (
        "import sys\nfrom mmchat.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "later = {'torch._meta_registrations', 'torch._decomp', 'torch._refs', 'torch._native'}\n"
        "assert not later & set(sys.modules), later & set(sys.modules)\n"
        "import torch, torch._meta_registrations\n"  # and then all of it can be had
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]\n"
        "assert 'torch._decomp' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "generate", "hi", "-n", "1", "--seed", "1", "-t", "1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_list_of_models_loads_nothing_heavy():
    assert loaded_by(["list"])[1:] == ({"pydantic"}, {"list_models"})


def test_no_python_that_a_library_starts_imports_from_the_working_folder(tmp_path):
    (tmp_path / "ctypes.py").write_text("raise SystemExit('taken from the folder')")
    program = (
        "import os, subprocess, sys\n"
        "from mmchat.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "paths = {'PYTHONPATH': os.pathsep.join(sys.path)}\n"  # as torch's compiler does it
        "command = [sys.executable, '-c', 'import ctypes']\n"
        "sys.exit(subprocess.run(command, env={**os.environ, **paths}).returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bad_picture_is_one_line_even_while_torch_is_imported(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((ROOT / "assets" / "dog.jpg").read_bytes()[:4000])
    command = [sys.executable, "-m", "mmchat", "generate", "-q", "-p", "x", "-i", str(bad)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 4
    assert done.stderr.count(b"\n") == 1
    assert b"bad.jpg' is cut short" in done.stderr
