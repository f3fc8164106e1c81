"""`mmchat batch` killed in the middle, and begun again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch.drawn import draw

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

ROWS = 30


def start(folder: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmchat", "batch", "in", "-o", "out.jsonl", "-n", "16", *args]
    return subprocess.Popen(
        [*command, "-t", "0", "--rows", "4"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_a_killed_run_loses_no_line_and_the_next_goes_on(tmp_path, signal):
    for number in range(ROWS):
        draw(tmp_path / f"in/{number}.png", (number, 4 * number, 90))
    output = tmp_path / "out.jsonl"
    process = start(tmp_path)
    end = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill() if signal == "KILL" else process.terminate()
    process.communicate()
    assert process.returncode == (-9 if signal == "KILL" else 143)
    *whole, torn = output.read_bytes().split(b"\n")
    assert 3 <= len(whole) < ROWS
    assert all(json.loads(line)["error"] is None for line in whole)
    with output.open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"custom_id": "in/7.png", "text": "A' if not torn else b"")
    again = start(tmp_path, "--json")
    out, error = again.communicate()
    assert again.returncode == 0, error
    assert json.loads(out) == {"rows": ROWS, "answered": ROWS, "failed": 0, "missing": 0}
    lines = output.read_bytes().splitlines()
    assert lines[: len(whole)] == whole
    assert sorted(json.loads(line)["custom_id"] for line in lines) == sorted(
        f"in/{number}.png" for number in range(ROWS)
    )
