"""Who may ask: every check holds on every route, those that come later included."""

from __future__ import annotations

import asyncio

import pytest

from mmchat import limits, strict_json
from mmchat.errors import UsageError
from mmchat.server import page
from mmchat.server.app import OPEN_ROUTES, ROUTES, make_app
from mmchat.server.checks import METHODS
from mmchat.server.options import ServerOptions, read_keys
from mmchat.server.service import Service
from tests.server.asgi import ask, call, scope

KEY, OTHER = "a-key-of-somebody-1", "a-key-of-another-22"
EVERY = [(method, path.replace("{id:path}", "tiny")) for method, path, _ in (*OPEN_ROUTES, *ROUTES)]
CLOSED = [(method, path.replace("{id:path}", "tiny")) for method, path, _ in ROUTES]
JSON = [("content-type", "application/json")]
all_routes = pytest.mark.parametrize(("method", "path"), EVERY)


@pytest.fixture(scope="module")
def app(tiny):
    service = Service(ServerOptions(rows=1))
    service.use(tiny)
    yield make_app(service)
    service.close()


@pytest.fixture(scope="module")
def keyed(tiny):
    service = Service(ServerOptions(rows=1, keys={"one": KEY, "two": OTHER}))
    service.use(tiny)
    yield make_app(service)
    service.close()


@pytest.fixture(scope="module")
def shared():
    """For the pages of one other origin."""
    options = ServerOptions(allowed_origins=frozenset({"https://app.example"}))
    return make_app(Service(options))


# ---- S1, S2: keys


def test_other_machines_need_keys():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(UsageError, match="give keys with --api-key-file"):
            ServerOptions(host=host)
        ServerOptions(host=host, keys={"key": KEY})
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        ServerOptions(host=host)


def test_a_file_of_keys_has_names_and_comments(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{KEY}\nphone: {OTHER}  # lost\n")
    assert read_keys(file, "the-key-of-a-variable") == {
        "key3": KEY, "phone": OTHER, "key": "the-key-of-a-variable",
    }  # fmt: skip
    assert read_keys(None, None) == {}
    for text, reason in (
        ("short", "16 or more"),
        ("# none", "no key"),
        (f"a:{KEY}\na:{OTHER}", "two"),
        (f"a:{KEY}\nb:{KEY}", "'b' has the key of 'a'"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_keys(file, None)


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_each_route_wants_a_key(keyed, method, path):
    """CVE-2026-44556: a second route without the check of the first."""
    for headers in (
        [], [("authorization", "Bearer ")], [("authorization", f"Bearer {KEY}x")],
        [("authorization", f"Basic {KEY}")], [("x-api-key", KEY[:-1])],
    ):  # fmt: skip
        refused = ask(keyed, method, path, headers, body={"x": 1})
        assert refused.status == 401, headers
        assert KEY.encode() not in refused.body
    for headers in (
        [("authorization", f"Bearer {KEY}")], [("authorization", f"bearer  {OTHER} ")],
        [("x-api-key", KEY)],
    ):  # fmt: skip
        assert ask(keyed, method, path, headers, body={"x": 1}).status != 401


def test_a_key_in_the_query_is_none(keyed):
    asked = scope("GET", "/v1/models") | {"query_string": f"api_key={KEY}".encode()}
    assert asyncio.run(call(keyed, asked)).status == 401


def test_the_page_and_health_are_open(keyed):
    for method, path, _ in OPEN_ROUTES:
        assert ask(keyed, method, path).status == 200
    for path in page.files():
        assert ask(keyed, "GET", path).status == 200


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_a_wrong_key_is_refused_before_the_body_is_read(keyed, method, path):
    """CVE-2026-100650: the body was read before the limit was checked."""
    chunks = [b"x" * limits.MIB] * 100
    refused = asyncio.run(call(keyed, scope(method, path, [("x-api-key", "wrong")]), chunks))
    assert (refused.status, refused.read) == (401, 0)


# ---- S3: Host

WRONG_HOSTS = (
    "evil.example", "localhost.evil", "localhost.localdomain", "evil.localhost", "127.0.0.1.nip.io",
    "x.local", "x.internal", "mmchat", "[::ffff:127.0.0.1]", "[::]", "0.0.0.0", "127.0.0.2",
    "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost:", "localhost:x", "localhost:-1",
    "localhost:65536", "localhost:5000:5000", "localhost@evil", "evil@localhost", "localhost/evil",
    "localhost?evil", "localhost#evil", "localhost evil", "localhost,evil", "localhost.", "",
    "http://localhost", "local host", "::1", "[::1", "::1]", "[::1]evil", "[localhost]", "*",
    "localhost\t", "LOCALHOST.EVIL", "127.0.0.1.", "127.0.0.1%00", "localhost%2eevil", "null",
)  # fmt: skip
RIGHT_HOSTS = (
    "localhost", "LocalHost", "localhost:5000", "localhost:1", "localhost:65535", "127.0.0.1",
    "127.0.0.1:80", "[::1]", "[::1]:5000", "box.example", "BOX.example:443", "[fd00::5]:5000",
)  # fmt: skip


@pytest.mark.parametrize("host", WRONG_HOSTS)
def test_a_name_that_is_not_ours_is_refused(app, host):
    """CVE-2026-48746 and -48710: no rule by suffix, no trust in what Host says."""
    assert ask(app, "GET", "/v1/models", host=host).status == 403


@pytest.mark.parametrize("host", RIGHT_HOSTS)
def test_our_names_are_served(host):
    options = ServerOptions(allowed_hosts=frozenset({"box.example", "fd00::5"}))
    answer = ask(make_app(Service(options)), "GET", "/health", host=host)
    assert answer.json() == {"status": "loading"}


@all_routes
def test_each_route_looks_at_the_host(app, method, path):
    assert ask(app, method, path, host="evil.example").status == 403
    assert ask(app, method, path, [("host", "localhost")]).status == 400  # a second one
    sites = [("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")]
    assert ask(app, method, path, sites).status == 400


@all_routes
def test_without_a_host_only_programs_of_this_machine_are_served(app, method, path):
    assert ask(app, method, path, host=None).status != 403
    assert ask(app, method, path, host=None, client=("10.0.0.9", 1)).status == 403
    assert ask(app, method, path, [("origin", "http://localhost")], host=None).status == 403


# ---- S4: pages of others


@all_routes
@pytest.mark.parametrize(
    "headers",
    [
        [("origin", "https://evil.example")],
        [("origin", "null")],
        [("origin", "http://localhost:3000")],
        [("origin", "http://localhost.evil")],
        [("origin", "")],
        [("sec-fetch-site", "cross-site")],
        [("sec-fetch-site", "same-site")],
        [("origin", "http://localhost"), ("sec-fetch-site", "cross-site")],
    ],
)
def test_pages_of_others_are_refused(app, method, path, headers):
    refused = ask(app, method, path, [*headers, *JSON], body={"x": 1})
    assert refused.status == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]


@all_routes
def test_our_own_page_and_programs_are_not_refused(app, method, path):
    """npm's clients send Sec-Fetch-Mode: cors without Origin."""
    for headers in (
        [("origin", "http://localhost"), ("sec-fetch-site", "same-origin")],
        [("sec-fetch-mode", "cors")],
        [("sec-fetch-site", "none")],
    ):
        assert ask(app, method, path, [*headers, *JSON], body={"x": 1}).status not in (403, 415)


@pytest.mark.parametrize(("method", "path"), [one for one in EVERY if one[0] == "POST"])
def test_a_form_of_a_page_sends_no_json(app, method, path):
    same = [("origin", "http://localhost")]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(app, method, path, [*same, ("content-type", kind)], body={"x": 1}).status == 415
        assert ask(app, method, path, [("content-type", kind)], body={"x": 1}).status != 415
    assert ask(app, method, path, [("content-encoding", "gzip")], body=b"x").status == 415


@all_routes
def test_a_page_that_is_allowed_may_ask(shared, app, method, path):
    origin = [("origin", "https://app.example"), ("sec-fetch-site", "cross-site")]
    before = ask(shared, "OPTIONS", path, [*origin, ("access-control-request-headers", "x-y, z")])
    assert before.status == 204
    assert before.headers["access-control-allow-headers"] == "x-y, z"
    answer = ask(shared, method, path, [*origin, *JSON], body={"x": 1})
    assert answer.status != 403
    for one in (before, answer):
        assert one.headers["access-control-allow-origin"] == "https://app.example"
        assert one.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in one.headers
    other = [("origin", "https://app.example.evil")]
    refused = ask(shared, "OPTIONS", path, other)
    assert refused.status == 403
    assert "access-control-allow-origin" not in refused.headers
    assert ask(app, "OPTIONS", path).status == 403


# ---- S7, S9, S12: form


@all_routes
def test_what_is_no_plain_request_is_refused(app, method, path):
    both = [("content-length", "1"), ("transfer-encoding", "chunked")]
    assert ask(app, method, path, both, body=b"x").status == 400
    for verb in ("PUT", "DELETE", "PATCH", "CONNECT", "TRACE", "BREW"):
        assert verb not in METHODS
        assert ask(app, verb, path).status == 405
    many = [(f"x-{i}", "1") for i in range(limits.REQUEST_HEADERS)]
    assert ask(app, method, path, many).status == 431
    assert ask(app, method, path, [("x", "1" * limits.REQUEST_HEADER_BYTES)]).status == 431
    assert ask(app, method, f"http://localhost{path}").status == 400


@pytest.mark.parametrize(("method", "path"), [one for one in EVERY if one[0] == "POST"])
def test_a_large_body_is_refused_by_its_length_and_as_it_comes(app, method, path):
    length = [("content-length", str(limits.REQUEST_BYTES + 1))]
    assert ask(app, method, path, length).status == 413
    assert ask(app, method, path, [("content-length", "9" * 50)]).status == 413
    chunks = [b" " * limits.MIB] * 64
    answer = asyncio.run(call(app, scope(method, path), chunks))
    assert answer.status == 413
    assert answer.read <= limits.REQUEST_BYTES + limits.MIB
    for body in (
        b"{",
        b"[]",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 40,
        b'{"a": 1e999}',
        b"\xff",
    ):
        refused = ask(app, method, path, body=body)
        assert refused.status == 400
        assert refused.json()["error"]


@all_routes
def test_each_answer_has_its_headers(app, method, path):
    for answer in (
        ask(app, method, path, JSON, body={"x": 1}),
        ask(app, method, path, host="evil.example"),
        ask(app, method, path + "/nothing"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] in ("no-store", "no-cache")
        assert "server" not in answer.headers


def test_an_unknown_route_answers_in_the_form_of_its_api(app):
    assert ask(app, "GET", "/v1/embeddings").json()["error"]["code"] == "not_found"
    assert ask(app, "GET", "/api/nothing").json() == {"error": "there is no such route"}
    assert ask(app, "GET", "/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(("method", "path"), [one for one in EVERY if one[0] == "GET"])
def test_a_route_that_takes_no_body_parses_none(app, keyed, monkeypatch, method, path):
    """What is open to everybody would else have a parser that is, too."""
    parsed = []
    monkeypatch.setattr(strict_json, "parse_object", lambda data: parsed.append(data) or {})
    for served in (app, keyed):
        for headers in ([], [("x-api-key", KEY)]):
            ask(served, method, path, headers, body=b"{}")
    assert not parsed
    for headers in ([("content-length", "2")], [("transfer-encoding", "chunked")]):
        refused = ask(app, method, path, headers, body=b"{}")
        assert (refused.status, refused.headers["connection"]) == (400, "close")
    assert ask(app, method, path, [("content-length", "0")]).status < 500


@all_routes
def test_nothing_behind_a_body_that_is_not_read_is_taken_for_a_request(app, method, path):
    for headers in (
        [("content-length", "5"), ("transfer-encoding", "chunked")],
        [("content-length", "5"), ("host", "evil")],
        [("transfer-encoding", "chunked"), ("host", "evil")],
    ):
        refused = ask(app, method, path, headers, body=b"0\r\n\r\n")
        assert (refused.status, refused.headers["connection"]) == (400, "close")
