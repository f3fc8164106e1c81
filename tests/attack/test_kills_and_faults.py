"""A kill, or a failing system call, at each call that changes a file.

After it the content is old or new and whole; after a failure nothing else is there; and the next
run completes and leaves nothing of the earlier one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmchat.catalog.find import find_model
from tests.attack.conftest import Figures, rounds
from tests.attack.scenarios import FAIL, KILL_AFTER, KILL_BEFORE, SCENARIOS, Scenario
from tests.cli.hub_fixtures import FILES
from tests.hub_server import FakeHub
from tests.loading.test_loader import small_config, write_hf_folder
from tests.meta_checkpoint import weights_for, write_meta_folder

HERE = Path(__file__).parent
KILLS = {"-o": 100, "chat": 150, "cache": 100, "export": 300, "export hf": 150, "download": 250}
FAULTS = {"-o": 30, "chat": 60, "cache": 40, "export": 140, "export hf": 60, "download": 120}
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc"),
]


class Runner:
    """The program of scenarios.py, with the faults preloaded."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, scenario: str, folder: Path, content: str, nth: int = 0, action: int = FAIL,
        error: int = 0,
    ) -> dict:  # fmt: skip
        """nth 0: nothing fails, but the calls are counted."""
        job = {"scenario": scenario, "folder": str(folder), "content": content, "nth": nth}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(job | {"action": action, "error": error}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    work = tmp_path_factory.mktemp("attack")
    library = work / "faults.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", str(HERE / "faults.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    weights = weights_for(small_config())
    model = write_hf_folder(work / "model", small_config(), weights)
    source = find_model(model)
    meta = write_meta_folder(work / "meta", source.spec, weights, source.tokenizer_file())
    for folder in (model, meta):
        (folder / "LICENSE").write_text("be good")
    with FakeHub(dict(FILES)) as hub:
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "MMCHAT_"))}
        own = {
            "LD_PRELOAD": str(library), "ATTACK_MODEL": str(model), "ATTACK_META": str(meta),
            "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "20", "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(work / "cache"), "MMCHAT_NATIVE_KERNELS": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.attack.scenarios"]
        with subprocess.Popen(
            command, cwd=HERE.parents[1], env=clean | own, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            yield Runner(process)
            assert process.stdin
            process.stdin.close()


class Begin:
    """What is there before a run, and how many calls a run makes: a download now and then more."""

    def __init__(self, runner: Runner, name: str, place: Path, *, has_old: bool) -> None:
        self.runner, self.name, self._kept = runner, name, place / "kept"
        self._kept.mkdir(parents=True)
        if has_old:
            assert runner.run(name, self._kept, "old")["outcome"] == "done"
        runs = []
        for number in range(3):
            scenario = self.copy(place / str(number))
            runs.append(runner.run(name, scenario.folder, "new"))
        assert {run["outcome"] for run in runs} == {"done"}
        self.calls = min(run["calls"] for run in runs)

    def copy(self, folder: Path) -> Scenario:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._kept, folder, symlinks=True)
        return SCENARIOS[self.name](folder)

    def kill(self, folder: Path, nth: int, action: int) -> Scenario:
        """At the nth call, or at one before that if this run made fewer."""
        scenario = self.copy(folder)
        killed = self.runner.run(self.name, folder, "new", nth, action)
        if killed["outcome"] == "done" and nth > 1:
            return self.kill(folder, nth - 1, action)
        assert killed["outcome"] == "killed", (nth, killed)
        return scenario


@pytest.fixture
def begins(runner: Runner, name: str, tmp_path: Path) -> dict[bool, Begin]:
    """Whether there is an earlier result -> what a run begins with."""
    cases = (False,) if name == "download" else (False, True)
    return {old: Begin(runner, name, tmp_path / f"begin {old}", has_old=old) for old in cases}


def completes(runner: Runner, name: str, scenario: Scenario) -> None:
    """The next run ends well and leaves nothing that an earlier one made."""
    done = runner.run(name, scenario.folder, "new")
    assert done["outcome"] == "done", done
    assert scenario.read() == "new"
    assert scenario.left() == set()


def has_old(name: str, draw: random.Random) -> bool:
    return name != "download" and draw.random() < 0.6


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_at_any_call_leaves_old_or_new_and_the_next_run_completes(
    runner: Runner, name: str, begins: dict[bool, Begin], tmp_path: Path, figures: Figures
) -> None:
    draw, kills = random.Random(name), rounds(KILLS[name])
    for _ in range(kills):
        old = has_old(name, draw)
        nth, action = draw.randint(1, begins[old].calls), draw.choice((KILL_BEFORE, KILL_AFTER))
        scenario = begins[old].kill(tmp_path / "work", nth, action)
        assert scenario.read() in (("old", "new") if old else (None, "new")), nth
        completes(runner, name, scenario)
    figures(kills=kills)


@pytest.mark.parametrize("name", FAULTS)
def test_a_failing_call_is_an_error_or_no_matter_and_the_next_run_completes(
    runner: Runner, name: str, begins: dict[bool, Begin], tmp_path: Path, figures: Figures
) -> None:
    draw, faults = random.Random(f"{name} 2"), rounds(FAULTS[name])
    said = 0
    for _ in range(faults):
        old = has_old(name, draw)
        scenario, calls = begins[old].copy(tmp_path / "work"), begins[old].calls
        nth, error = draw.randint(1, calls), draw.choice(ERRORS)
        done = runner.run(name, scenario.folder, "new", nth, FAIL, error)
        case = f"call {nth} of {calls}: {errno.errorcode[error]}: {done}"
        assert done["outcome"] in ("done", "DiskError"), case
        said += done["outcome"] != "done"
        assert scenario.read() in (("old", "new") if old else (None, "new")), case
        if done["outcome"] == "done":
            assert scenario.read() == "new", case
        else:
            assert os.strerror(error) in done["message"], case
        completes(runner, name, scenario)
    figures(faults=faults, said=said)
