"""The programs in examples/ run as their docstrings say."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmchat import export
from mmchat.export import ExportPlan, ExportReport
from tests.export.conftest import tiny_aoti  # noqa: F401
from tests.server.serving import serving

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
def test_an_exported_model_is_run_from_its_folder(tiny_aoti, monkeypatch, capsys):  # noqa: F811
    """From the folder that other tests run too: another export would take minutes."""

    def made(plan: ExportPlan) -> ExportReport:
        assert (plan.folder, plan.format) == (tiny_aoti, "aoti")
        return ExportReport(plan.folder, {}, 0.0, seconds=0.0, peak_memory=0, dtype=None)

    monkeypatch.setattr(export, "export_model", made)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [LONG, str(tiny_aoti)])
    runpy.run_path(f"examples/{LONG}", run_name="__main__")
    assert capsys.readouterr().out.splitlines()[1:] == ["A brown dog."]


def test_the_answers_of_a_batch_are_a_page(monkeypatch, tmp_path):
    answer = {"text": "<A & B>", "error": None}
    broken = {"error": {"code": "ImageError", "message": "is empty"}}
    rows = [{"custom_id": "b ü.png", **answer}, {"custom_id": "a.png", **broken}]
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
    )
    [arguments] = commands("contact_sheet.py")
    (tmp_path / "b ü.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments[1:])
    runpy.run_path(str(ROOT / arguments[1]), run_name="__main__")
    page = (tmp_path / "sheet.html").read_text("utf-8")
    assert page.index("is empty") < page.index("&lt;A &amp; B&gt;")
    assert f'<img loading="lazy" alt="" src="{(tmp_path / "b ü.png").as_uri()}">' in page


@pytest.mark.parametrize("is_told", [True, False])
def test_a_row_with_an_id_of_its_own_has_its_picture_or_none(is_told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = [
        {"custom_id": "r1", "image": ["a.png", "b.png"]},
        {"custom_id": "r2", "image": "https://example.org/c.png"},
        {"custom_id": "r3", "prompt": "Hi"},
    ]
    answered = [{"custom_id": row["custom_id"], "text": "A dog.", "error": None} for row in asked]
    for name, rows in (("rows.jsonl", asked), ("answers.jsonl", answered)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    Path("a.png").touch()
    told = ["rows.jsonl"] if is_told else []
    monkeypatch.setattr(sys, "argv", ["contact_sheet.py", "answers.jsonl", "sheet.html", *told])
    runpy.run_path(str(ROOT / "examples/contact_sheet.py"), run_name="__main__")
    page = Path("sheet.html").read_text("utf-8")
    wanted = [(tmp_path / "a.png").as_uri(), "https://example.org/c.png"] if is_told else []
    assert re.findall(r' src="(.*?)"', page) == wanted
    assert page.count("A dog.") == 3


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.process
def test_a_pipe_collects_what_is_found(tmp_path):
    (tmp_path / "photos").mkdir()
    for photo in (ROOT / "assets").glob("*.jpg"):  # on the picture of the page there is a dog too
        (tmp_path / "photos" / photo.name).symlink_to(photo)
    done = shell(f"sh examples/collect.sh {tmp_path}/photos 'a dog' {tmp_path}/dogs", ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/photos/dog.jpg\n", "")
    assert [path.name for path in (tmp_path / "dogs").iterdir()] == ["dog.jpg"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "usage: sh examples/collect.sh FOLDER WHAT INTO"),
        ("assets/dog.jpg 'a fish' {}/fish", "no picture shows a fish by 50 % or more"),
        ("{}/none 'a dog' {}/dogs", "none' does not exist"),
    ],
)
def test_a_pipe_that_collects_nothing_says_why(arguments, said, tmp_path):
    done = shell(f"sh examples/collect.sh {arguments.replace('{}', str(tmp_path))}", ROOT)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_batch_becomes_a_page_by_the_two_commands_of_the_example(tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    text = ast.get_docstring(ast.parse(EXAMPLES["contact_sheet.py"].read_text("utf-8"))) or ""
    lines = [line for line in text.splitlines() if line.startswith(("mmchat ", "python "))]
    done = shell("set -e; " + "; ".join(lines), tmp_path)
    assert (done.returncode, done.stdout) == (0, "sheet.html: 7 pictures\n"), done.stderr
    assert "A brown dog." in (tmp_path / "sheet.html").read_text("utf-8")


@pytest.mark.process
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: NOT TESTED")
def test_nginx_spreads_requests_and_goes_on_without_a_server(tmp_path):
    def ask(port: int) -> str:
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = json.dumps({"model": "tiny", "prompt": "A", "max_tokens": 64}).encode()
        head = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, head), timeout=60) as answer:
            return json.load(answer)["object"]

    def listens(port: int) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    def asked(port: int) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            counts = re.findall(r"generation_tokens_total\S* (\d+)", answer.read().decode())
        return sum(map(int, counts))

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving() as one, serving() as two:
        text = (ROOT / "examples/nginx.conf").read_text("utf-8")
        for old, new in {"5001": one.port, "5002": two.port, "8080": port}.items():
            text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        (tmp_path / "nginx.conf").write_text(text)
        command = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"]
        nginx = subprocess.Popen([*command, "-g", "daemon off;"])
        try:
            end = time.monotonic() + 20
            while not listens(port):
                assert nginx.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            with ThreadPoolExecutor(6) as pool:
                assert list(pool.map(ask, [port] * 12)) == ["text_completion"] * 12
            assert asked(one.port) > 0
            assert asked(two.port) > 0
            one.process.kill()
            one.process.wait()
            assert [ask(port) for _ in range(3)] == ["text_completion"] * 3
        finally:
            nginx.terminate()
            nginx.wait()


def test_every_example_is_listed_and_names_its_own_command():
    page = (ROOT / "examples/README.md").read_text("utf-8")
    for name in EXAMPLES:
        assert f"[{name}]({name})" in page
        assert all(words[1] == f"examples/{name}" for words in commands(name))
        assert commands(name)
