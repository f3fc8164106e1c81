"""`python -m benchmarks.peers`: what is left out, what is kept, and the script for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, linears, llama_cpp, peers, transformers_mllama
from mmchat.errors import MissingExtra

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_installed(monkeypatch):
    def missing(*_):
        raise MissingExtra("install it with: npm install")

    monkeypatch.setattr(transformers_mllama, "version", missing)
    monkeypatch.setattr(llama_cpp, "version", missing)
    monkeypatch.setattr(linears, "version_of", missing)


@pytest.mark.slow
def test_what_is_not_installed_is_said_and_left_out(
    nothing_installed, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(linears, "integer_ceiling", lambda: None)
    path = tmp_path / "found.json"
    path.write_text('{"llama.cpp": {"kept": 1}}')
    peers.main(["--shapes", "tiny", "--rounds", "2", "--seconds", "1", "-o", str(path)])
    out, err = capsys.readouterr()
    assert err.count("left out: install it with: npm install") == 4
    found = json.loads(path.read_text())
    assert list(found) == ["llama.cpp", "linears"]
    assert found["llama.cpp"] == {"kept": 1}
    assert found["linears"]["contestants"] == ["mmchat"]
    assert "| int4, 64 rows |" in out


def test_each_part_is_understood(monkeypatch, tmp_path, capsys):
    asked = []

    def run(plan, *_):
        asked.append((plan.peer, plan.dtype, plan.shapes.name, plan.threads))
        return {"contestants": [], "workloads": []}

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(peers, "installed", lambda: {"transformers": "5", "llama.cpp": "0.5"})
    monkeypatch.setattr(peers.table, "section", lambda record: "a table")
    peers.main([*peers.ARGUMENTS])
    assert asked == [
        ("transformers", "float32", "11B", 1),
        ("transformers", "bfloat16", "11B", 1),
        ("llama.cpp", "bfloat16", "11B", 1),
    ]


def test_an_unknown_part_ends_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        peers.main(["llama"])
    assert ended.value.code == 2
    assert "'llama' is none of transformers float32" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)  # two compilers, on one core
@pytest.mark.parametrize(
    ("part", "written"),
    [("eager", ["none", "int8", "int4"]), ("graphs", ["graphs", "graphs-rounded"])],
)
def test_the_script_for_a_gpu_runs_dry(part, written, tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", part, "--dry-run"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / f"gpu-{name}.json").read_text()) for name in written]
    assert all(record["workloads"] and record["bandwidth"] for record in records)
    if part == "graphs":
        assert records[0]["contestants"][1] == "transformers float32 compiled"


@pytest.mark.process
def test_the_script_without_a_part_says_how_it_is_used():
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "eager|graphs" in done.stderr
