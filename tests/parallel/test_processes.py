"""Ranks as processes: what is said, and what is left, when one of them ends or is silent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.models.llava.folders import SPARE_ROWS, with_vocabulary, write_hub_folder
from tests.models.llava.oracle import random_weights as llava_weights

pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
DOG = str(ROOT / "assets" / "dog.jpg")
LONG = ("bench", "--rounds", "99999", "--seconds", "9999", "--parallel-timeout", "10")
ASK = ("generate", "What is this?", "-i", DOG, "--json", "-q", "--seed", "1")
SPACE = f"mmchat{os.getpid()}"  # of names of network namespaces
SECONDS = 300  # for anything, on a machine that has other work

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `mmchat ARGS`; what is left of it at the end is a failure."""
    started: list[subprocess.Popen] = []

    def start_one(*args: str, before: tuple[str, ...] = (), **settings: Any) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings.pop("env", {})}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*before, sys.executable, "-m", "mmchat", *args]
        settings = {"cwd": ROOT, "text": True, **pipes, **settings}
        started.append(subprocess.Popen(command, env=environment, **settings))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        with process:
            pass


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def followers(process: subprocess.Popen, count: int = 1) -> list[psutil.Process]:
    """The ranks that the command has started, once they share a model."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1]
        found = [
            one
            for one in psutil.Process(process.pid).children()
            if any("mmchat.loading.follower" in word for word in one.cmdline())
        ]
        if len(found) == count and all(has_joined(one, count) for one in found):
            return found
        time.sleep(0.1)
    raise TimeoutError


def has_joined(process: psutil.Process, others: int) -> bool:
    """Whether it is in both groups, each a connection to every other rank, beside the store's."""
    return len(process.net_connections("tcp")) >= 1 + 2 * others


def ended(process: subprocess.Popen) -> tuple[int, list[str]]:
    _, errors = process.communicate(timeout=SECONDS)
    lines = [line for line in errors.splitlines() if not line.startswith("using the built-in")]
    return process.returncode, lines


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


def answer(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return json.loads(out)["text"]


@pytest.fixture(scope="module")
def alone() -> str:
    """What one process answers to ASK."""
    done = subprocess.run(
        [sys.executable, "-m", "mmchat", *ASK], cwd=ROOT, capture_output=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)["text"]


def test_an_answer_about_a_picture_is_that_of_one_process(start, alone):
    assert answer(start(*ASK, "--parallel", "2")) == alone


def test_a_chat_through_pipes_is_that_of_one_process(start):
    lines = f"{DOG} What is here?\nHow many?\n\\undo\nWhat colour is it?\n"

    def said(*more: str) -> str:
        chat = start("chat", "-q", "--temperature", "0", *more, stdin=subprocess.PIPE)
        out, errors = chat.communicate(lines, timeout=SECONDS)
        assert chat.returncode == 0, errors
        return out

    assert said("--parallel", "2") == said()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "was ended by SIGKILL"),
        (signal.SIGSTOP, "no answer for 10 s (--parallel-timeout)"),
    ],
)
def test_a_follower_that_is_gone_or_silent_ends_all_in_one_line(number, reason, start):
    process = start(*LONG, "--parallel", "4")
    ranks = followers(process, 3)
    ranks[1].send_signal(number)
    code, errors = ended(process)
    assert code == 1
    [line] = errors
    assert line.startswith("mmchat: error: rank ")
    assert f"(pid {ranks[1].pid} on " in line
    assert line.endswith(reason)
    assert_gone(ranks)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_followers_end_with_the_command_however_it_ends(number, code, start):
    process = start(*LONG, "--parallel", "2")
    ranks = followers(process)
    process.send_signal(number)
    assert ended(process) == (code, [])
    assert_gone(ranks)


def asked(port: int) -> httpx.Response:
    question = {"model": "tiny", "messages": [{"role": "user", "content": "Who are you?"}]}
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    return httpx.post(address, json=question, timeout=SECONDS)


def answered(port: int) -> str:
    """What a server says, once it has loaded its model."""
    until = time.monotonic() + SECONDS
    while (said := asked(port)).status_code == 503:
        assert time.monotonic() < until
        time.sleep(0.2)
    return said.json()["choices"][0]["message"]["content"]


def test_a_server_shares_its_model_on_the_loopback_alone(start, port):
    process = start("serve", "-q", "--port", str(port), "--parallel", "2")
    [rank] = followers(process)
    for one in (rank, psutil.Process(process.pid)):
        listening = {c.laddr.ip for c in one.net_connections("tcp") if c.status == "LISTEN"}
        assert listening <= {"127.0.0.1"}
    assert answered(port)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, [])
    assert_gone([rank])


@pytest.mark.parametrize("busy", [True, False])
def test_a_server_ends_with_a_follower_and_says_so_to_who_waits(busy, start, port):
    process = start("serve", "-q", "--port", str(port), "--parallel", "4")
    ranks = followers(process, 3)
    assert answered(port)
    if busy:
        ranks[1].suspend()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(asked, port)
            time.sleep(1)  # until it has been told to the others
            ranks[1].kill()
            assert waiting.result().status_code in (500, 503)
    else:
        ranks[1].kill()
    code, errors = ended(process)
    assert code == 1
    assert errors[-1].startswith(f"mmchat: error: rank 2 (pid {ranks[1].pid} on ")
    assert errors[-1].endswith("was ended by SIGKILL")
    assert_gone(ranks)


def test_a_batch_and_an_evaluation_are_those_of_one_process(start, tmp_path):
    def texts(*more: str) -> dict[str, str]:
        output = tmp_path / f"{len(more)}.jsonl"
        done = start("batch", "assets/s*.jpg", "-o", str(output), "-q", *more, "-p", "What is it?")
        assert ended(done) == (0, [])
        rows = map(json.loads, output.read_text().splitlines())
        return {row["custom_id"]: row["text"] for row in rows}

    def right(*more: str) -> dict[str, Any]:
        out, errors = start("eval", "scenes", "--limit", "3", "--json", "-q", *more).communicate()
        assert not errors
        return {**json.loads(out), "seconds": 0}

    assert texts("--parallel", "2") == texts() != {}
    assert right("--parallel", "2") == right()


# ---- as launchers start them


def launched(rank: int, port: int, **more: str) -> dict[str, Any]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return {"env": {**place, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", **more}}


def test_ranks_of_a_launcher_share_the_model_of_one_command(start, port, alone):
    first, second = start(*ASK, **launched(0, port)), start(*ASK, **launched(1, port))
    assert answer(first) == alone
    assert second.communicate(timeout=SECONDS) == ("", "")
    assert second.returncode == 0


def test_what_the_first_rank_refuses_ends_the_others(start, port):
    first = start("generate", "hi", "-i", "nowhere.png", **launched(0, port))
    second = start("generate", "hi", **launched(1, port))
    assert ended(first)[0] == 4
    assert ended(second) == (0, [])


def test_a_rank_that_never_comes_is_told_with_what_to_set(start, port):
    process = start("generate", "hi", "-q", "--parallel-timeout", "3", **launched(0, port))
    code, [line] = ended(process)
    assert code == 1
    assert "1 of 2 ranks came within 3 s (--parallel-timeout); missing: 1." in line
    assert "GLOO_SOCKET_IFNAME" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_an_address_that_does_not_answer_is_told_in_one_line(rank, start, port):
    place = launched(rank, port, MASTER_ADDR="no.such.host.invalid")
    code, [line] = ended(start("generate", "hi", "-q", "--parallel-timeout", "2", **place))
    assert code == 1
    assert f"rank {rank}: 'no.such.host.invalid:{port}' cannot be reached." in line


def test_other_weights_on_another_machine_are_refused(start, port, tmp_path):
    weights = dict(llava_weights(with_vocabulary(SPARE_ROWS)))
    places = [tmp_path / "one", tmp_path / "two"]
    write_hub_folder(places[0] / "model", weights)
    weights["language_model.model.norm.weight"] = weights["language_model.model.norm.weight"] + 1
    write_hub_folder(places[1] / "model", weights)
    ask = ("generate", "hi", "-q", "-m", "./model")
    first = start(*ask, cwd=places[0], **launched(0, port, PYTHONPATH=str(ROOT)))
    second = start(*ask, cwd=places[1], **launched(1, port, PYTHONPATH=str(ROOT)))
    code, [line] = ended(first)
    assert code == 3
    assert "rank 1 (pid" in line
    assert "has other weights than rank 0, or other options" in line
    assert ended(second) == (0, [])


def test_torchrun_starts_two_nodes_and_a_chat_is_refused_there(start, port):
    def node(rank: int, *command: str) -> subprocess.Popen:
        run = (
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
            str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port),
            "--nproc-per-node", "1", "--max-restarts", "0", "-m", "mmchat",
        )  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen([*run, *command], cwd=ROOT, env=env, text=True, **pipes)

    nodes = [node(rank, *ASK) for rank in (0, 1)]
    assert answer(nodes[0])
    assert nodes[1].communicate(timeout=SECONDS)[0] == ""
    refused = [node(rank, "chat") for rank in (0, 1)]
    for one in refused:
        assert "chat has no terminal of its own under a launcher" in one.communicate()[1]


# ---- two machines


@pytest.fixture
def pull() -> Iterator[Callable[[], None]]:
    """Two network namespaces with a cable between them, which this pulls."""

    def ip(line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)

    try:
        try:
            ip(f"netns add {SPACE}-0")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            pytest.skip(f"NOT TESTED: two machines and a pulled cable, which need root: {reason}")
        ip(f"netns add {SPACE}-1")
        ip(f"link add cable0 netns {SPACE}-0 type veth peer name cable1 netns {SPACE}-1")
        for rank in (0, 1):
            ip(f"-n {SPACE}-{rank} addr add 10.77.0.{1 + rank}/24 dev cable{rank}")
            ip(f"-n {SPACE}-{rank} link set lo up")
            ip(f"-n {SPACE}-{rank} link set cable{rank} up")
        yield lambda: ip(f"-n {SPACE}-1 link set cable1 down")
    finally:
        for rank in (0, 1):
            subprocess.run(["ip", "netns", "del", f"{SPACE}-{rank}"], capture_output=True)


def on_machine(rank: int) -> dict[str, Any]:
    place = launched(rank, 29500, MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME=f"cable{rank}")
    return {"before": ("ip", "netns", "exec", f"{SPACE}-{rank}"), **place}


def test_two_machines_share_a_model_and_both_end_when_the_cable_is_pulled(pull, start, alone):
    nodes = [start(*ASK, **on_machine(rank)) for rank in (0, 1)]
    assert answer(nodes[0]) == alone
    assert nodes[1].communicate(timeout=SECONDS) == ("", "")
    nodes = [start(*LONG, **on_machine(rank)) for rank in (0, 1)]
    until = time.monotonic() + SECONDS
    while any(psutil.Process(node.pid).cpu_times().user < 8 for node in nodes):  # beyond loading
        assert time.monotonic() < until
        assert not any(node.poll() for node in nodes), [node.communicate() for node in nodes]
        time.sleep(0.2)
    pull()
    begin = time.monotonic()
    for node, other in zip(nodes, (1, 0), strict=True):
        code, [line] = ended(node)
        assert code == 1
        assert f"rank {other} (pid {nodes[other].pid} on " in line
        assert line.endswith("no answer for 10 s (--parallel-timeout)")
    assert time.monotonic() - begin < 2 * (10 + 2)  # twice what is promised, on a busy machine
