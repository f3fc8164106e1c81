"""--compile as people use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmchat import api
from mmchat.cli import console, model_choice
from mmchat.loading.options import LoadOptions
from mmchat.quant.kernels import native

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [["--compile", "on"], []])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_option_reaches_the_loader(command, given, mmchat_command):
    question = ["-p", "What is it?"] if command == "generate" else []
    assert mmchat_command(command, *question, *given, stdin="").exit_code == 0
    assert mmchat_command.loaded[-1].compile == (given or [None, "auto"])[1]


def load_with_stages(monkeypatch, *, quiet: bool) -> None:
    def load(options: LoadOptions, _: object) -> SimpleNamespace:
        assert options.compile == "on"
        assert options.progress is not None
        options.progress("weights", 1, 1)
        for done in range(3):
            options.progress("compile", done, 2)
        return SimpleNamespace(runtime=SimpleNamespace(notices=["no longer compiled: why"]))

    monkeypatch.setattr(api, "load_model", load)
    console.set_quiet(quiet)
    try:
        with console.Stages() as stages:
            options = LoadOptions(compile="on")
            model_choice.load(options, options.find(), stages)
    finally:
        console.set_quiet(False)


def test_compiling_is_said_before_it_begins_and_when_it_is_done(monkeypatch, capsys):
    load_with_stages(monkeypatch, quiet=False)
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert first == "compiling the layers (once; a later start takes them from a cache)"
    assert second.startswith("compiled the layers in 0.")
    assert third == "no longer compiled: why"
    assert out == ""


@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"dtype": "float32"}, {"text_only": True}]
)
def test_the_kernels_are_prepared_while_a_model_that_takes_them_is_loaded(
    options, monkeypatch, capsys
):
    def prepare(progress) -> None:
        progress("kernels", 0, 1)
        progress("kernels", 1, 1)

    monkeypatch.setattr(native, "prepare", prepare)
    with console.Stages() as stages:
        asked = LoadOptions(device="cpu", **options)
        model_choice.load(asked, asked.find(), stages)
    out, err = capsys.readouterr()
    begun = "compiling the CPU kernels (once; a later start takes them from a cache)\n"
    assert err.count(begun) == err.count("compiled the CPU kernels in ") == 1
    assert out == ""


def test_quiet_says_nothing_of_it(monkeypatch, capsys):
    load_with_stages(monkeypatch, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_answer_is_the_same_and_the_second_start_compiles_nothing(tmp_path):
    def generate(mode: str) -> subprocess.CompletedProcess[str]:
        question = ["-p", "What's in this image?", "-i", "assets/dog.jpg"]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-m", "mmchat", "generate", *question, "--compile", mode, "-v"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )

    plain, first = generate("off"), generate("on")
    programs = {path: path.stat() for path in tmp_path.rglob("*.pt2")}
    second = generate("on")
    assert len(programs) == 2
    assert {path: path.stat() for path in tmp_path.rglob("*.pt2")} == programs
    assert "compiling the layers" in first.stderr
    assert "compiling the layers" not in second.stderr
    assert plain.stdout == first.stdout == second.stdout
    assert ", compiled in " in first.stderr
    assert "compil" not in plain.stderr
