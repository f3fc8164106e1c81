"""A server as a process: its lines, its ports, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from threading import Thread

import pytest

from mmchat.server import running
from mmchat.server.options import ServerOptions
from tests.server.serving import serving

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]
LONG = {  # so random that hardly any answer comes to its end by itself
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 100, "top_p": 1, "max_tokens": 2_000, "stream": True,
}  # fmt: skip


def post(url, body, *, keep=None):
    """(status, body); keep: a list that gets the lines as they come."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = []
            for line in answer:
                lines.append(line)
                if keep is not None:
                    keep.append(line)
            return answer.status, b"".join(lines)
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def begin(served, count):
    """So many long answers, each in a thread of its own, with the lines that came."""
    answers = [[] for _ in range(count)]
    threads = [
        Thread(target=post, args=(served.url, {**LONG, "seed": i}), kwargs={"keep": lines})
        for i, lines in enumerate(answers)
    ]
    for thread in threads:
        thread.start()
    return answers, threads


def wait_for_text(served, answers, count):
    while sum(b'"content":"' in b"".join(lines[1:]) for lines in answers) < count:
        assert served.process.poll() is None


def test_sigterm_lets_answers_end_and_refuses_others():
    """L4: those that run get their time, then what they have; nobody is begun."""
    with serving("--drain", "1") as served:
        assert re.search(r"tiny at \S+: 8 answers at once in [\d.]+ .iB;", served.lines[-1])
        answers, threads = begin(served, 16)
        wait_for_text(served, answers, 8)
        served.process.send_signal(signal.SIGTERM)
        refused = (0, b"")
        while refused[0] != 503:
            refused = post(served.url, {**LONG, "max_tokens": 1, "stream": False})
        assert json.loads(refused[1])["error"]["code"] == "draining"
        assert served.process.wait(60) == 0
        for thread in threads:
            thread.join()
        begun = [b"".join(lines) for lines in answers if lines]
        assert len(begun) >= 8
        assert all(text.endswith(b"data: [DONE]\n\n") for text in begun)
        assert "Traceback" not in "".join(served.lines)


def test_the_second_signal_ends_it_at_once():
    with serving("--max-rows", "1", "--drain", "60") as served:
        answers, threads = begin(served, 2)
        wait_for_text(served, answers, 1)
        served.process.send_signal(signal.SIGTERM)
        while post(served.url, {**LONG, "max_tokens": 1, "stream": False})[0] != 503:
            pass
        assert served.end(signal.SIGTERM) == 143
        for thread in threads:
            thread.join()


def test_a_signal_while_it_loads_ends_it():
    with serving(ready=False) as served:
        while not served.lines:
            time.sleep(0.02)
        assert served.end(signal.SIGINT) in (0, 130)


def test_a_model_that_cannot_be_loaded_is_said(tmp_path):
    with serving(str(tmp_path / "nothing"), ready=False) as served:
        assert served.process.wait(60) == 3
    with serving("--host", "0.0.0.0", ready=False) as served:
        assert served.process.wait(60) == 2
        assert "--api-key-file" in "".join(served.lines)


def test_the_log_has_a_line_for_each_request_and_no_word_of_it():
    """S10."""
    with serving(MMCHAT_API_KEY="the-key-of-the-tests") as served:
        headers = {"X-Api-Key": "the-key-of-the-tests", "X-Canary": "canary5"}
        body = {"model": "canary1", "messages": [{"role": "user", "content": "canary2\n200"}],
                "user": "canary3", "max_tokens": 3}  # fmt: skip
        url = f"{served.url}/v1/chat/completions?x=canary4"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        assert urllib.request.urlopen(request).status == 200
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{served.url}/canary6")
        assert served.end() == 0
    text = "".join(served.lines)
    assert "key POST /v1/chat/completions 200 3 tokens" in text
    assert " - GET (refused) 401 0 tokens" in text
    assert "canary" not in text
    assert "the-key" not in text


DIES = """
import sys
from mmchat.api import load_model
from mmchat.engine.engine import Engine
from mmchat.loading.options import LoadOptions
from mmchat.server import log, running
from mmchat.server.options import ServerOptions

def ready(service):
    print(f"tiny at {running.url(sockets[0])}: 1 answer at once", file=sys.stderr, flush=True)

def fails(self):
    raise RuntimeError("canary")

Engine.step = fails
log.to_stderr(quiet=True)
options = ServerOptions(port=0)
sockets = running.bind(options)
sys.exit(running.serve(options, sockets, lambda: [load_model(LoadOptions())], ready))
"""


def test_a_body_does_not_wait_until_its_head_is_acknowledged():
    """On a connection that stays open, that took 40 ms of each answer."""
    [listening] = running.bind(ServerOptions(port=0))
    with listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_end_of_the_engine_ends_the_server():
    """vLLM's engine died and its health stayed green; here a supervisor sees it."""
    command = [sys.executable, "-c", DIES]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        status, body = post(line.split()[2].rstrip(":"), {**LONG, "stream": False})
        assert (status, json.loads(body)["error"]["code"]) == (500, "server_error")
        assert process.wait(60) == 1
        rest = process.stderr.read()
    assert "RuntimeError in fails" in rest
    assert "canary" not in rest


HANGS = """
import sys, time
from mmchat.api import load_model
from mmchat.loading.options import LoadOptions
from mmchat.server import log, running
from mmchat.server.options import ServerOptions

def ready(service):
    service._workers.submit(time.sleep, 60)
    print("ready", file=sys.stderr, flush=True)

log.to_stderr(quiet=True)
options = ServerOptions(port=0)
sockets = running.bind(options)
sys.exit(running.serve(options, sockets, lambda: [load_model(LoadOptions())], ready))
"""


def test_a_picture_that_is_still_decoded_holds_up_no_end():
    with subprocess.Popen([sys.executable, "-c", HANGS], stderr=subprocess.PIPE) as process:
        assert process.stderr.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
