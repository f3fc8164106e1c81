"""Each reader under a fuzzer that follows which lines an input reaches, where it installs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.conftest import Figures, rounds
from tests.attack.readers import Reader
from tests.attack.test_readers import NAMES, all_readers  # noqa: F401

ROOT = Path(__file__).parents[2]
SHARE = 10  # of the rounds of random changes, one in so many
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The program of guided.py."""
    pytest.importorskip("atheris", reason="needs atheris, which is not built for this Python")
    command = [sys.executable, "-m", "tests.attack.guided", str(tmp_path_factory.mktemp("readers"))]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_reach_new_lines_are_read_or_refused(
    fuzzer: subprocess.Popen[str],
    all_readers: dict[str, Reader],  # noqa: F811
    name: str,
    tmp_path: Path,
    figures: Figures,
) -> None:
    runs = rounds(all_readers[name].rounds // SHARE)
    assert fuzzer.stdin
    assert fuzzer.stdout
    fuzzer.stdin.write(json.dumps([name, runs, str(tmp_path)]) + "\n")
    fuzzer.stdin.flush()
    exit_code = int(fuzzer.stdout.readline())
    said = (tmp_path / "said").read_text()
    assert exit_code == 0, said[-3000:]
    ended = re.search(r"Done (\d+) runs", said)
    assert ended is not None
    assert int(ended[1]) >= runs
    figures(guided=runs)
