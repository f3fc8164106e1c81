"""`mmchat batch --ray`: each row once, whatever is lost; other versions are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmchat
from mmchat.batch import cluster
from mmchat.batch.rows import Asked, Row
from mmchat.batch.run import Defaults
from mmchat.errors import MissingExtra, NetworkError, UsageError
from mmchat.loading.options import LoadOptions
from tests.batch.drawn import draw

ROWS = 96
COUNTS = {"rows": ROWS, "answered": ROWS, "failed": 0, "missing": 0}


def test_rows_travel_as_they_are():
    rows = [
        Row("a", Asked(("a.png", "b.png"), "What?", "Be short.")),
        Row("b\udcff", Asked(body={"messages": [{"role": "user", "content": "é"}]})),
        Row("c", file=Path("rows.jsonl"), line=(3, 100, 20)),
    ]
    assert pickle.loads(pickle.dumps(rows)) == rows  # as Ray does


def test_there_is_an_actor_for_each_gpu_or_each_node():
    cpus = [{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}]
    gpus = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}]
    assert cluster.actors(cpus, "auto") == (2, {"num_cpus": 4})
    assert cluster.actors(gpus, "auto") == (4, {"num_gpus": 1, "num_cpus": 1})
    assert cluster.actors(gpus, "cpu") == (2, {"num_cpus": 8})
    for nodes, device in ((cpus, "cuda"), ([{}], "auto")):
        with pytest.raises(UsageError, match="the cluster has no"):
            cluster.actors(nodes, device)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (("3.9.1", mmchat.__version__), "has Python 3.9.1 and mmchat"),
        ((sys.version.split()[0], "0.0.9"), "and mmchat 0.0.9, this machine Python"),
        ((sys.version.split()[0], None), "and no mmchat, this machine"),
    ],
)
def test_a_node_with_other_versions_is_refused(theirs, said):
    ours = ("10.0.0.1", sys.version.split()[0], mmchat.__version__)
    cluster.check_nodes([ours, ours])
    with pytest.raises(UsageError, match=f"the node 10.0.0.2 .*{said}"):
        cluster.check_nodes([ours, ("10.0.0.2", *theirs)])


@pytest.mark.parametrize("address", ["", "local", "ray://a:1", "a", ":1", "a:b", "http://a:1"])
def test_an_address_that_is_none_starts_nothing(address, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda _: True)
    with pytest.raises(UsageError, match="is no address; write HOST:PORT"):
        cluster.check_address(address)


def test_where_no_cluster_answers_is_said_at_once(monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda _: True)
    with pytest.raises(NetworkError, match=r"no Ray cluster answers at '127.0.0.1:1': Connection"):
        cluster.check_address("127.0.0.1:1")
    with pytest.raises(NetworkError, match="no Ray cluster answers"):
        cluster.check_address("127.0.0.1:99999")
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmchat\[ray\]'"):
        cluster.check_address("127.0.0.1:1")


class Nodes:
    """A cluster of three nodes, each with one processor."""

    def __init__(self, tries: int = 3) -> None:
        command = [sys.executable, str(Path(__file__).parent / "ray_cluster.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for left in reversed(range(tries)):  # on a busy machine a node may miss Ray's own deadline
            self.process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
            try:
                self.address = self._told().split()[1]
                return
            except AssertionError:
                if not left:
                    raise

    def _told(self) -> str:
        while not (line := self.process.stdout.readline()).startswith(("at ", "done")):
            assert self.process.poll() is None
        return line

    def do(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self._told()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray.data", reason="Ray is not installed: mmchat[ray] is NOT TESTED")
    found = Nodes()
    yield found
    found.process.stdin.close()
    found.process.wait(60)


def begin(folder: Path, nodes: Nodes) -> subprocess.Popen[str]:
    for number in range(ROWS):
        draw(folder / f"in/{number}.png", (number, 2 * number, 90))
    return ask(folder, nodes)


def ask(folder: Path, nodes: Nodes) -> subprocess.Popen[str]:
    options = ["-n", "12", "-t", "0", "--rows", "4", "-q", "--json", "--ray", nodes.address]
    return subprocess.Popen(
        [sys.executable, "-m", "mmchat", "batch", "in", "-o", "out.jsonl", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(lines: int, output: Path, process: subprocess.Popen[str]) -> None:
    while not output.exists() or output.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def of_ours(error: str) -> list[str]:
    """The lines of stderr that are not the one that Ray's C++ writes about its own log."""
    return [line for line in error.splitlines() if "logging.cc" not in line]


def check_all_there_once(output: Path) -> None:
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted(f"in/{n}.png" for n in range(ROWS))
    assert all(row["error"] is None for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_is_lost_costs_no_row_and_doubles_none(nodes, tmp_path):
    process = begin(tmp_path, nodes)
    wait_for(20, tmp_path / "out.jsonl", process)
    nodes.do("kill")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert json.loads(out) == COUNTS
    check_all_there_once(tmp_path / "out.jsonl")
    assert not of_ours(error)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_driver_is_killed_goes_on(nodes, tmp_path):
    process = begin(tmp_path, nodes)
    wait_for(10, tmp_path / "out.jsonl", process)
    process.kill()
    process.communicate()
    *whole, _ = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert 10 <= len(whole) < ROWS
    again = ask(tmp_path, nodes)
    out, error = again.communicate()
    assert again.returncode == 0, error
    assert json.loads(out) == COUNTS
    check_all_there_once(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes().splitlines()[: len(whole)] == whole


def test_what_fails_in_an_actor_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which it changes
    options = LoadOptions()
    defaults = Defaults("What?", None, mmchat.SamplingParams())
    for identity, folder, said in (
        (["other"], tmp_path, "there are other weights of tiny than where the job was begun"),
        (options.identity(options.find()), tmp_path / "none", "is not there (No such file"),
    ):
        actor = cluster.Replica(options, identity, defaults, None, str(folder))
        [told] = actor({"row": [Row("a.png", Asked(("a.png",)))]})["told"]
        error = json.loads(told)
        assert "custom_id" not in error
        assert error["code"] == "UsageError"
        assert said in error["message"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_with_another_mmchat_is_refused(nodes, tmp_path):
    fake = tmp_path / "fake/mmchat"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text('__version__ = "0.0.9"\n')
    nodes.do(f"other {fake.parent}")
    process = begin(tmp_path, nodes)
    out, error = process.communicate()
    assert (process.returncode, out) == (2, "")
    [line] = of_ours(error)
    assert line.startswith("mmchat: error: the node ")
    assert line.endswith("install the same on all")
    assert "and mmchat 0.0.9, this machine" in line
    assert not (tmp_path / "out.jsonl").read_bytes()
