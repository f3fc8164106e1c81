"""What the README and the pages of docs/ say works as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmchat.batch import cluster
from mmchat.evals import harness
from tests.cli.conftest import mmchat_command  # noqa: F401
from tests.server.serving import serving

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, *_ = TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]
EVERYTHING = "\n".join(TEXTS)
BENCHMARKS = ROOT / "benchmarks" / "README.md"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def blocks(info: str, text: str = EVERYTHING) -> list[str]:
    """The contents of the fenced blocks with this info string, each once."""
    found = re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", text, re.M | re.S)
    return list(dict.fromkeys(found))


def commands(info: str) -> list[str]:
    """The lines of those blocks, without installing and without pytest itself."""
    lines = [line for block in blocks(info) for line in block.splitlines()]
    lines = [line.removeprefix("pip install -e . && ") for line in lines]
    lines = [line for line in lines if "mmchat" in line and not line.startswith("pip ")]
    return list(dict.fromkeys(lines))  # the README's are on a page, too


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_first_command_is_the_quick_start():
    assert blocks("sh", README)[0].splitlines() == [
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
@pytest.mark.parametrize("command", blocks("sh", BENCHMARKS.read_text(encoding="utf-8")))
def test_the_benchmark_works(command):
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "**" in done.stdout  # a ratio


@pytest.mark.slow
@pytest.mark.timeout(1500)  # an export compiles for minutes
@pytest.mark.parametrize("block", blocks("sh slow"))
def test_the_long_commands_work(block, tmp_path):
    for command in block.splitlines():  # one may go on with what the last one wrote
        done = run(command, TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in commands("sh real") if c.startswith("mmchat ")])
def test_the_command_for_real_weights_is_understood(mmchat_command, monkeypatch, command):  # noqa: F811
    monkeypatch.chdir(ROOT)
    done = mmchat_command(*shlex.split(command)[1:])
    assert (done.stdout, done.exit_code) == ("A brown dog.\n", 0), done.stderr


@pytest.mark.parametrize("command", [*commands("sh eval"), *commands("sh ray")])
def test_the_command_names_the_extra_that_it_needs(mmchat_command, monkeypatch, command):  # noqa: F811
    monkeypatch.chdir(ROOT)
    for module in (harness, cluster):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    done = mmchat_command(*shlex.split(command)[1:])
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(r"mmchat: error: .* pip install 'mmchat\[\w+\]'.*\n", done.stderr)


@pytest.mark.process
@pytest.mark.parametrize("command", commands("sh terminal"))
def test_the_terminal_command_starts_and_leaves(command):
    done = run(f"echo '\\quit' | {command}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, marks=[] if program in README else pytest.mark.slow)
        for program in blocks("python")
    ],
)
def test_the_python_program_answers(program):
    done = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.process
@pytest.mark.parametrize("command", commands("sh serve"))
def test_the_server_starts_and_ends(command):
    with serving(*shlex.split(command)[2:]) as served:
        assert served.end() == 0


@pytest.mark.process
@pytest.mark.parametrize("task", ["0", "1"])
def test_a_task_of_the_job_array_answers_its_shard(tmp_path, task):
    [script] = blocks("bash slurm")
    changes = {"photos": "assets/*.jpg", "llama3.2-11B": "tiny -n 4", "answers-": f"{tmp_path}/"}
    for old, new in {**changes, "/64": "/2"}.items():
        assert old in script
        script = script.replace(old, new)
    done = run(script, SLURM_ARRAY_TASK_ID=task)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / f"{task}.jsonl").read_text().count("assets/") in range(1, 7)


@pytest.fixture(scope="module")
def port():
    """Of a server that may read the pictures of the repository."""
    with serving("--media-dir", str(ROOT / "assets")) as served:
        yield served.port


@pytest.mark.process
@pytest.mark.parametrize("kind", ["sh server", "python server"])
def test_the_server_is_asked_as_the_page_says(port, kind, tmp_path):
    assert blocks(kind)
    for block in blocks(kind):
        block = block.replace("5000", str(port)).replace("11434", str(port))
        python = f"{shlex.quote(sys.executable)} -c {shlex.quote(block)}"
        command = python if kind.startswith("python") else f"set -e; {block}"
        done = run(command.replace("curl ", "curl -sS "), TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stdout
        assert done.stdout.strip()


def test_every_block_of_commands_is_of_a_kind_that_is_run():
    kinds = set(re.findall(r"^```((?:sh|bash|console|python).*)$", EVERYTHING, re.M))
    assert kinds == {
        "sh", "sh slow", "sh real", "sh terminal", "sh export", "sh native", "sh serve",
        "sh server", "python", "python server", "bash slurm", "bash lm_eval", "sh eval", "sh ray",
        "sh deploy",  # needs Docker, systemd, an hour: tests/test_deploy.py runs what it can
    }  # fmt: skip


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.split()) < 1500


def test_the_readme_names_every_page_and_every_part_of_the_package():
    pages = {f"docs/{page.name}" for page in PAGES[1:]}
    parts = {f"mmchat/{file.parent.name}" for file in (ROOT / "mmchat").glob("*/*.py")}
    assert pages | parts <= set(re.findall(r"\]\(([^)]+)\)", README))


def test_every_named_test_exists():
    named = re.findall(r"(?:`|^)pytest (tests/\S+\.py)(?: -k (\w+))?", EVERYTHING, re.M)
    assert named
    for path, word in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def test_\w*{word}\w*\(", source, re.M), (path, word)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_linked_file_and_heading_exists():
    others = [ROOT / "assets" / "tiny" / "README.md", ROOT / "examples" / "README.md"]
    for page in (*PAGES, *ROOT.glob("*.md"), BENCHMARKS, *others):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
            path, _, anchor = "".join(link).partition("#")
            if ":" in path:
                continue
            target = page.parent / path if path else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in anchors(target), (page.name, link)


def test_every_option_in_a_table_or_in_code_exists():
    from typer.main import get_command

    from mmchat.cli.app import COMMANDS, app, load

    known = {"--help", "--install-completion"}
    waiting: list[Any] = [get_command(app), *map(load, COMMANDS)]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            known.update(parameter.opts)
    tables = [line for line in EVERYTHING.splitlines() if line.startswith("|")]
    code = re.findall(r"`(?:mmchat |--)[^`]+`", EVERYTHING)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(tables + code))) <= known


def test_exit_codes_are_those_of_the_errors():
    from mmchat import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.MmchatError)}
    page = (ROOT / "docs" / "scripts.md").read_text(encoding="utf-8")
    listed = {int(n) for n in re.findall(r"^\| (\d+)(?:, \d+)? \|", page, re.M)}
    assert codes <= listed
