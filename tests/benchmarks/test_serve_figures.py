"""What the server bears, as docs/server.md shows it, is what was measured, and can be again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.serve.figure import PAGE, RESULTS, Figure, section, updated
from benchmarks.serve.server import Said

KEPT = Figure("tokens per second", 2.6, "×", 2.5, at_least=True)
BROKEN = Figure("memory of each", 65, "KiB", 64)
RECORD = {
    "machine": {"cpu": "A 1", "date": "2026-12-01"},
    "figures": {"streams": [vars(KEPT)], "opened": [vars(BROKEN), vars(Figure("told", 1_234))]},
}


def test_the_page_shows_the_committed_figures():
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page, record) == page


def test_figures_become_a_table():
    table = section(RECORD)
    assert "on A 1, one thread for the model, 2026-12-01" in table
    assert "| tokens per second | 2.60× | ≥ 2.50× |\n" in table
    assert "| memory of each | 65 KiB | ≤ 64 KiB |\n| told | 1,234 |  |\n" in table
    page = PAGE.read_text(encoding="utf-8")
    changed = updated(page, RECORD)
    assert table in changed
    assert updated(changed, {}) == updated(page, {})


def test_what_is_not_kept_is_seen():
    assert (KEPT.is_kept, BROKEN.is_kept, Figure("told", 9).is_kept) == (True, False, True)
    assert not Figure("tokens per second", 2.4, "×", 2.5, at_least=True).is_kept


def test_the_longest_gap_is_looked_for_in_its_time():
    said = Said(200, tokens=[1.0, 3.0, 3.5, 4.0, 9.0], begun=0.5)
    assert (said.first, said.longest_gap(3.1, 4.5)) == (0.5, 5.0)
    assert said.longest_gap(3.1, 3.9) == 0.5
    assert Said(200).longest_gap(0, 9) == 0.0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_what_is_not_there_is_not_measured():
    done = run("stream")
    assert done.returncode == 2
    assert "no measure is called stream; there are streams, alone, gaps" in done.stderr
    assert "--short" in run("--short", "--write").stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["streams", "alone", "gaps", "fair", "soak"])
def test_each_measure_gives_figures(name):
    """Of time, which on a machine with other work need not be kept."""
    done = run(name, "--short")
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.startswith(f"{name}: ")
    assert done.stdout.count("\n| ") >= 1, done.stderr
