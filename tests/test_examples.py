"""The programs in examples/ run as their docstrings say."""

from __future__ import annotations

import ast
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.py"))}
LONG = "export_and_run.py"


def commands(name: str) -> list[list[str]]:
    """The command lines in the docstring of an example."""
    text = ast.get_docstring(ast.parse(EXAMPLES[name].read_text("utf-8"))) or ""
    return [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ask.py", "A brown dog."),
        ("chat.py", "What colour is it? It is brown. (read 15 of 35 tokens)"),
        ("many_pictures.py", "assets/fish.jpg: Three blue fish."),
    ],
)
def test_the_first_command_of_an_example_answers(name, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    python, *arguments = commands(name)[0]
    assert (python, arguments[0]) == ("python", f"examples/{name}")
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(arguments[0], run_name="__main__")
    assert said in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_exported_model_is_run_from_its_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, f"examples/{LONG}", str(tmp_path / "exported")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["A brown dog."]


def test_every_example_is_listed_and_names_its_own_command():
    page = (ROOT / "examples/README.md").read_text("utf-8")
    for name in EXAMPLES:
        assert f"[{name}]({name})" in page
        assert all(words[1] == f"examples/{name}" for words in commands(name))
        assert commands(name)
