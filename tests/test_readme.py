"""What the README says works as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import mmchat_command  # noqa: F401

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def blocks(info: str, text: str = README) -> list[str]:
    """The contents of the fenced blocks with this info string."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", text, re.M | re.S)


def commands(info: str) -> list[str]:
    """The lines of those blocks, without installing and without pytest itself."""
    lines = [line for block in blocks(info) for line in block.splitlines()]
    lines = [line.removeprefix("pip install -e . && ") for line in lines]
    return [line for line in lines if "mmchat" in line and not line.startswith("pip ")]


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_first_command_is_the_quick_start():
    assert blocks("sh")[0].splitlines() == [
        'pip install -e . && mmchat generate --prompt "What\'s in this image?"'
        " --image-prompt assets/dog.jpg",
        "pip install -e '.[test]' && pytest",
    ]


def is_quick(command: str) -> bool:
    """The quick start, and what loads no model, belong to the default run."""
    loads = re.search(r" (generate|bench) ", command) and "--dry-run" not in command
    return not loads or "--prompt " in command


def with_marks(lines: list[str]) -> list[Any]:
    return [pytest.param(line, marks=[] if is_quick(line) else pytest.mark.slow) for line in lines]


@pytest.mark.process
@pytest.mark.parametrize("command", with_marks(commands("sh")))
def test_the_command_works(command):
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "-o /dev/null" in command
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", blocks("sh", BENCHMARKS))
def test_the_benchmark_works(command):
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "**" in done.stdout  # a ratio


@pytest.mark.slow
@pytest.mark.timeout(1500)  # an export compiles for minutes
@pytest.mark.parametrize("command", commands("sh slow"))
def test_the_long_command_works(command, tmp_path):
    done = run(command, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in commands("sh real") if c.startswith("mmchat ")])
def test_the_command_for_real_weights_is_understood(mmchat_command, monkeypatch, command):  # noqa: F811
    monkeypatch.chdir(ROOT)
    done = mmchat_command(*shlex.split(command)[1:])
    assert (done.stdout, done.exit_code) == ("A brown dog.\n", 0), done.stderr


@pytest.mark.process
@pytest.mark.parametrize("command", commands("sh terminal"))
def test_the_terminal_command_starts_and_leaves(command):
    done = run(f"echo '\\quit' | {command}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.process
@pytest.mark.parametrize("program", blocks("python"))
def test_the_python_program_answers(program):
    done = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_named_test_exists():
    named = re.findall(r"`pytest (tests/\S+\.py)(?: -k (\w+))?`", README)
    assert named
    for path, word in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def test_\w*{word}\w*\(", source, re.M), (path, word)


def test_every_linked_file_exists():
    for folder, text in ((ROOT, README), (ROOT / "benchmarks", BENCHMARKS)):
        links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", text)
        assert links
        for link in links:
            assert (folder / "".join(link)).exists(), link


def test_every_option_in_the_table_exists():
    from typer.main import get_command

    from mmchat.cli.app import COMMANDS, app, load

    known = {"--help", "--install-completion"}
    waiting: list[Any] = [get_command(app), *map(load, COMMANDS)]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            known.update(parameter.opts)
    table = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", table)) <= known


def test_exit_codes_are_those_of_the_errors():
    from mmchat import errors

    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    listed = {int(n) for n in re.findall(r"^\| (\d+)(?:, \d+)? \|", README, re.M)}
    assert codes <= listed
