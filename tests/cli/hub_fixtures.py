"""The real command against the fake hub: fixtures for the tests of download and its neighbours."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import COMMIT, REPO, FakeHub

ROOT = Path(__file__).parents[2]
WEIGHTS = random.Random(5).randbytes(300_000)
FILES = {
    "config.json": b'{"model_type": "mllama"}',
    "generation_config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"a": "' + b"x" * 5000 + b'"}',
    "LICENSE.txt": b"be good",
    "README.md": b"# A model",
    "original/consolidated.pth": WEIGHTS[:200_000],
    "original/params.json": b'{"dim": 8}',
    "original/tokenizer.model": b"YQ== 0\n",
}
USUAL = {n: d for n, d in FILES.items() if "/" not in n and n != "README.md"}


@dataclass
class Outcome:
    stdout: str
    stderr: str
    exit_code: int


@dataclass
class Machine:
    """A machine with its own Hugging Face cache, and the fake hub in reach."""

    hub: FakeHub
    home: Path
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.home / "hub" / f"models--{self.hub.repo.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        return self.root / "snapshots" / COMMIT

    @property
    def parts(self) -> list[Path]:
        return sorted(self.root.glob("blobs/*.part"))

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "MMCHAT_"))}
        own = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        return clean | own | extra

    def start(self, *args: str, before: str = "", **extra: str) -> subprocess.Popen:
        """`mmchat …` as a process of its own; `before` is shell that runs first."""
        command = [sys.executable, "-m", "mmchat", *args]
        if before:
            command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
        process = subprocess.Popen(
            command, cwd=self.home.parent, env=self.environment(extra), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, *args: str, before: str = "", **extra: str) -> Outcome:
        """The finished command; the hub's requests are those of this run."""
        self.hub.requests.clear()
        process = self.start(*args, before=before, **extra)
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr, stderr
        return Outcome(stdout, stderr, process.returncode)

    def tree(self) -> dict[str, bytes]:
        """Name -> content of the snapshot."""
        if not self.snapshot.is_dir():
            return {}
        paths = [path for path in self.snapshot.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.snapshot)): path.read_bytes() for path in paths}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with FakeHub(dict(FILES)) as hub:
        machine = Machine(hub, tmp_path / "hf")
        yield machine
        for process in machine.processes:
            process.kill()
            process.communicate()


def wait_until(is_true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def interrupt(process: subprocess.Popen) -> tuple[Outcome, float]:
    """Ctrl-C: how the command ended, and after how many seconds."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return Outcome(stdout, stderr, process.returncode), time.monotonic() - begin


__all__ = ["COMMIT", "FILES", "REPO", "USUAL", "Machine", "interrupt", "machine", "wait_until"]
