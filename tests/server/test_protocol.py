"""Raw requests on a real socket: what HTTP clients never send, and what attackers do."""

import re
import signal
import socket
import time

import pytest

from tests.server.serving import exchange, serving, statuses

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]
HEAD = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def port():
    with serving() as served:
        yield served.port


def get(path: bytes = b"/health", *lines: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\n" + HEAD + b"".join(lines) + CLOSE + b"\r\n"


def post(body: bytes, *lines: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"".join(lines) + b"\r\n" + body


HIDDEN = b"GET /v1/models HTTP/1.1\r\n" + HEAD + b"\r\n"
REQUESTS = {
    # name: (request, statuses of the answers)
    "plain": (get(), [200]),
    "old, without a host": (b"GET /health HTTP/1.0\r\n\r\n", [200]),
    "smuggled behind both lengths": (
        post(b"0\r\n\r\n" + HIDDEN, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), [400]),
    "smuggled behind a GET": (
        b"GET /v1/models HTTP/1.1\r\n" + HEAD
        + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN, [400]),
    "body of a GET": (
        b"GET /health HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\n{}" + HIDDEN, [400]),
    "lengths in the other order": (
        post(b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), [400]),
    "two lengths": (post(b"{}", b"Content-Length: 2\r\nContent-Length: 3\r\n"), [400]),
    "negative length": (post(b"{}", b"Content-Length: -1\r\n"), [400]),
    "length with a sign": (post(b"{}", b"Content-Length: +2\r\n"), [400]),
    "length in words": (post(b"{}", b"Content-Length: two\r\n"), [400]),
    "coded and chunked": (post(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked\r\n"), [400, 501]),
    "unknown coding": (post(b"{}", b"Transfer-Encoding: identity\r\n"), [400, 501]),
    "bad size of a chunk": (post(b"zz\r\n", b"Transfer-Encoding: chunked\r\n"), [400]),
    "bad end of a chunk": (
        post(b"2\r\n{}XX0\r\n\r\n", b"Transfer-Encoding: chunked\r\n"), [400]),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", [400]),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", [400]),
    "absolute form": (b"GET http://localhost/health HTTP/1.1\r\n" + HEAD + CLOSE + b"\r\n", [400]),
    "absolute form of others": (b"GET http://evil/ HTTP/1.1\r\n" + HEAD + CLOSE + b"\r\n", [400]),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HEAD + CLOSE + b"\r\n", [400]),
    "connect": (b"CONNECT evil:443 HTTP/1.1\r\n" + HEAD + CLOSE + b"\r\n", [405]),
    "trace": (b"TRACE / HTTP/1.1\r\n" + HEAD + CLOSE + b"\r\n", [405]),
    "no version": (b"GET /health\r\n\r\n", [400]),
    "version 2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [405]),
    "upgrade": (get(b"/health", b"Upgrade: websocket\r\n"), [200]),
    "expect": (post(b"{}", b"Expect: 100-continue\r\nContent-Length: 2\r\n", CLOSE), [100, 400]),
    "space before the colon": (get(b"/health", b"X : y\r\n"), [400]),
    "null byte": (get(b"/health", b"X: \0\r\n"), [400]),
    "null in the path": (get(b"/hea\0lth"), [400]),
    "long header": (get(b"/health", b"X: " + b"y" * 70_000 + b"\r\n"), [431]),
    "many headers": (get(b"/health", b"X: y\r\n" * 500), [431]),
    "path that climbs": (get(b"/../../etc/passwd"), [404]),
    "path that climbs in code": (get(b"/%2e%2e/%2e%2e/etc/passwd"), [404]),
    "pipelined": (
        b"GET /health HTTP/1.1\r\n" + HEAD + b"\r\n" + get(b"/nothing"), [200, 404]),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", None),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_raw_request_gets_one_clear_answer(port, name):
    request, wanted = REQUESTS[name]
    came = exchange(port, request, end=name == "no HTTP")
    found = statuses(came)
    if wanted is None:
        assert found in ([], [400])
    elif len(wanted) == 2 and wanted[0] >= 400:
        assert len(found) == 1
        assert found[0] in wanted
    else:
        assert found == wanted
    assert b"Traceback" not in came
    assert not re.search(rb"0x[0-9a-f]{6}|site-packages|/home", came)
    assert b"\r\nserver:" not in came.lower()
    assert statuses(exchange(port, get())) == [200]


def test_the_body_is_not_asked_for_with_a_wrong_key(port):
    with serving(MMCHAT_API_KEY="the-key-of-the-tests") as served:
        lines = b"Expect: 100-continue\r\nContent-Length: 30000000\r\nX-Api-Key: wrong\r\n"
        assert statuses(exchange(served.port, post(b"", lines))) == [401]


def test_slow_clients_are_ended_and_good_ones_are_not(port):
    """Slowloris: half a head, half a body, nothing at all, and what drips."""
    begun = [
        b"",
        b"GET /health HTTP/1.1\r\nHo",
        post(b'{"mess', b"Content-Length: 100\r\n"),
    ]
    connections = []
    for data in begun * 5:
        connection = socket.create_connection(("127.0.0.1", port), 60)
        connection.sendall(data)
        connections.append(connection)
    dripping = connections[1]
    deadline = time.monotonic() + 11
    while time.monotonic() < deadline:
        assert statuses(exchange(port, get())) == [200]
        try:
            dripping.sendall(b"x")
        except OSError:
            break
        time.sleep(0.25)
    for i, connection in enumerate(connections):
        if i % 3 != 2:  # a body has longer
            assert _is_closed(connection)
        connection.close()


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(2)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_sigterm_ends_with_0_and_a_taken_port_with_2():
    with serving() as served:
        with serving("--port", str(served.port), ready=False) as other:
            assert other.process.wait(60) == 2
            taken = f"port {served.port} of 127.0.0.1 cannot be had (Address already in use);"
            assert taken in "".join(other.lines)
            assert "--port" in "".join(other.lines)
        assert served.end(signal.SIGTERM) == 0
