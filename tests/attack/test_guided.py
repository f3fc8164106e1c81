"""Each reader under a fuzzer that follows which lines an input reaches, where it installs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.conftest import Figures, rounds
from tests.attack.readers import readers
from tests.attack.test_readers import NAMES

ROOT = Path(__file__).parents[2]
SHARE = 10  # of the rounds of random changes, one in so many
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def guided(name: str, runs: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.attack.guided", name, str(runs), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_reach_new_lines_are_read_or_refused(
    name: str, tmp_path: Path, figures: Figures
) -> None:
    pytest.importorskip("atheris", reason="needs atheris, which is not built for this Python")
    (tmp_path / "wholes").mkdir()
    runs = rounds(readers(tmp_path / "wholes")[name].rounds // SHARE)
    (tmp_path / "run").mkdir()
    done = guided(name, runs, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    ended = re.search(r"Done (\d+) runs", done.stderr)
    assert ended is not None
    assert int(ended[1]) >= runs
    figures(guided=runs)
