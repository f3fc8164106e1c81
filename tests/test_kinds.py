"""A test that leaves its process is seen to, whichever way it goes."""

import multiprocessing
import os
import pty
import socket
import subprocess
import sys

import pytest

from tests import kinds


def forks() -> None:
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)


def forks_on_a_terminal() -> None:
    child, terminal = pty.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    os.close(terminal)


def opens_a_terminal() -> None:
    for end in os.openpty():
        os.close(end)


def serves() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))


def starts_another_python() -> None:
    child = multiprocessing.get_context("spawn").Process(target=len, args=("",))
    child.start()
    child.join()


WAYS = {
    "subprocess.Popen": lambda: subprocess.run([sys.executable, "-S", "-c", ""], check=True),
    "os.system": lambda: os.system("true"),
    "os.fork": forks,
    "os.forkpty": forks_on_a_terminal,
    "os.kill": lambda: os.kill(os.getpid(), 28),  # SIGWINCH, which does nothing
    "openpty": opens_a_terminal,
    "socket.bind": serves,
    "fork_exec": starts_another_python,
}


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # fork, as of Python 3.12
@pytest.mark.parametrize("event", WAYS)
def test_each_way_out_of_the_process_is_noted(event):
    WAYS[event]()
    assert any(seen.startswith(event + "(") for seen in kinds._seen), kinds._seen


def test_what_stays_within_the_process_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the names of such sockets are short
    with socket.socket(socket.AF_UNIX) as local:
        local.bind("local")
    os.kill(os.getpid(), 0)
    assert kinds._seen == []


def test_values_that_are_not_usual_are_slow():
    one, two = kinds.some(["a", "b"], ["a"])
    assert one == "a"
    assert two == pytest.param("b", marks=pytest.mark.slow)
