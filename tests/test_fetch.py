import contextlib
import io
import ipaddress
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image as PILImage

from mmchat import fetch as fetch_module
from mmchat import limits
from mmchat.errors import ImageError, NetworkError, NotFoundError
from mmchat.fetch import fetch
from mmchat.fetch.ip_rules import is_metadata, is_public
from mmchat.images import load_image


def picture() -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (9, 7), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; `server.seen` keeps each request's path and headers."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        name = self.path.partition("?")[0].strip("/").partition("/")[0]
        with contextlib.suppress(ConnectionError):
            getattr(self, f"answer_{name}", self.answer_missing)()
        self.close_connection = True

    def reply(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_missing(self):
        self.reply(404, b"no such picture \x1b[31m")

    def answer_picture(self):
        self.reply(body=PICTURE, Content_Type="image/png")

    def answer_named(self):
        self.reply(body=PICTURE, Content_Type="text/plain")

    def answer_chunked(self):
        body = b"".join(
            b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (PICTURE[:5], PICTURE[5:])
        )
        self.reply(body=body + b"0\r\n\r\n", Transfer_Encoding="chunked")

    def answer_page(self):
        self.reply(body=b"<!doctype html><html>hello</html>", Content_Type="text/html")

    def answer_status(self):
        self.reply(int(self.path.rpartition("/")[2]))

    def answer_cut(self):
        self.reply(body=PICTURE[:20], Content_Length="4000")

    def answer_cutchunk(self):
        self.reply(body=b"ff\r\nabc", Transfer_Encoding="chunked")

    def answer_gzip(self):
        self.reply(body=b"\x1f\x8b", Content_Encoding="gzip")

    def answer_huge(self):
        self.reply(body=b"", Content_Length=str(10**12))

    def answer_endless(self):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(65536))

    def answer_drip(self):
        self.send_response(200)
        self.end_headers()
        while not self.server.is_over.wait(0.02):
            self.wfile.write(b"x")

    def answer_dripheader(self):
        while not self.server.is_over.wait(0.02):
            self.wfile.write(b"H")

    def answer_silent(self):
        self.server.is_over.wait(10)

    def answer_nonsense(self):
        self.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")

    def answer_go(self):
        self.reply(302, Location=self.path.partition("?")[2])

    def answer_nowhere(self):
        self.reply(302)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen = []
        self.is_over = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture(scope="module")
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.is_over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running):
    running.seen.clear()
    return running


def refuse(url: str, kind=NetworkError, **options) -> str:
    with pytest.raises(kind) as caught:
        fetch(url, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    return message


@pytest.mark.parametrize("path", ["/picture", "/chunked", "/go?/picture", "/go?/go?/go?/picture"])
def test_a_picture_is_fetched(server, path):
    assert fetch(server.url + path) == PICTURE


def test_load_image_fetches_and_names_the_address(server):
    image = load_image(server.url + "/picture")
    assert (image.width, image.height) == (9, 7)
    assert image.source == server.url + "/picture"


def test_a_web_page_is_named_as_such(server):
    with pytest.raises(ImageError, match="is a web page, not a picture"):
        load_image(server.url + "/page")


def test_the_request_tells_nothing_about_the_user(server, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    fetch(server.url + "/picture")
    [(_, headers)] = server.seen
    assert headers == {
        "Host": server.url.removeprefix("http://"),
        "User-Agent": "mmchat",
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def test_the_path_is_sent_as_written_and_the_fragment_is_not(server):
    fetch(server.url + "/named/h\u00fcnd%20a.png?q=\u00e4&b=%2F#part")
    assert server.seen[0][0] == "/named/h%C3%BCnd%20a.png?q=%C3%A4&b=%2F"


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/missing", NotFoundError, "answered 404 (Not Found)"),
        ("/status/403", NetworkError, "answered 403 (Forbidden)"),
        ("/status/500", NetworkError, "answered 500"),
        ("/status/204", NetworkError, "answered 204"),
        ("/status/206", NetworkError, "answered 206"),
        ("/status/799", NetworkError, "answered 799 (unknown status)"),
        ("/cut", NetworkError, "broke off"),
        ("/cutchunk", NetworkError, "broke off"),
        ("/gzip", NetworkError, "compressed"),
        ("/nonsense", NetworkError, "did not speak HTTP"),
        ("/huge", ImageError, "larger than 64 MiB"),
        ("/nowhere", NetworkError, "redirects more than 3 times"),
        ("/go?/go?/go?/go?/picture", NetworkError, "redirects more than 3 times"),
        ("/go?ftp://example.com/", NetworkError, "redirects to an invalid address"),
        ("/go?file:///etc/passwd", NetworkError, "redirects to an invalid address"),
        ("/go?http://user@example.com/", NetworkError, "redirects to an invalid address"),
        ("/go?http://a\\@b/", ImageError, "backslash"),
    ],
)
def test_answers_that_cannot_be_used_say_why(server, path, kind, words):
    assert words in refuse(server.url + path, kind)


def test_a_redirect_loop_ends(server):
    refuse(server.url + "/go?/nowhere")
    assert len(server.seen) == 4


def test_the_query_stays_out_of_messages(server):
    assert "secret" not in refuse(server.url + "/missing?signature=secret")


def test_a_body_without_end_stops_at_the_cap(server):
    started = time.monotonic()
    assert "larger than 1 MiB" in refuse(server.url + "/endless", ImageError, max_bytes=limits.MIB)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", ["/drip", "/dripheader"])
def test_a_slow_drip_meets_the_total_limit(server, path, monkeypatch):
    monkeypatch.setattr(limits, "FETCH_TOTAL_SECONDS", 0.3)
    assert "took longer than 0.3 s" in refuse(server.url + path)


def test_a_silent_server_meets_the_idle_limit(server, monkeypatch):
    monkeypatch.setattr(limits, "FETCH_IDLE_SECONDS", 0.1)
    assert "sent nothing for 0.1 s" in refuse(server.url + "/silent")


def test_a_closed_port_and_an_unknown_host_are_told_apart(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "no connection to" in refuse(f"http://127.0.0.1:{port}/x.png")

    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert "cannot be found; is it spelled right?" in refuse("http://dog.example/x.png")


def test_a_look_up_that_hangs_is_left(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(limits, "FETCH_CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10) and [])
    assert "looking up the host" in refuse("http://dog.example/x.png")
    over.set()


def test_https_to_a_server_without_it_fails_cleanly(server):
    assert "no connection" in refuse(server.url.replace("http:", "https:") + "/picture")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://a b/", "space"),
        ("http://a\\b/", "backslash"),
        ("http://a/\r\nX: y", "control character"),
        ("http://a/\x1b[31m", "control character"),
        ("http://user:secret@example.com/", "user name"),
        ("http://example.com@127.0.0.1/", "user name"),
        ("http://", "no valid host"),
        ("http:///x.png", "no valid host"),
        ("http://a%2eb/", "no valid host"),
        ("http://a:99999/", "not a valid"),
        ("http://a:b/", "not a valid"),
        ("http://[::1/", "not a valid"),
        ("http://[v1.x]/", "not a valid"),
        ("http://[fe80::1%25eth0]/", "valid"),
        ("http://" + "\u00fc" * 300 + "/", "not a valid"),
        ("http://a/" + "x" * 3000, "longer than 2048"),
        ("gopher://a/", "not an http or https"),
    ],
)
def test_addresses_that_are_not_valid_are_refused(url, words, monkeypatch):
    def look_up(*_, **__):
        raise AssertionError("looked up")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    message = refuse(url, ImageError)
    assert words in message
    assert "secret" not in message


# ---- private networks


@pytest.fixture
def names(server, monkeypatch):
    """Names that resolve to chosen addresses; connections all go to the test server."""
    table = {"public.example": "93.184.215.14", "other.example": "1.1.1.1"}

    def look_up(host, port, **_):
        try:
            ip = ipaddress.ip_address(table.get(host, host))
        except ValueError:
            raise socket.gaierror from None
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        return [(family, socket.SOCK_STREAM, 6, "", (str(ip), port))]

    real_connect = fetch_module._connect
    connected = []

    def connect(address, sockaddrs, deadline):
        connected.append(sockaddrs[0][1][0])
        here = [(socket.AF_INET, server.server_address)]
        return real_connect(address, here, deadline)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(fetch_module, "_connect", connect)
    return connected


@pytest.mark.parametrize(
    "target", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.1.1", "[::1]", "[::ffff:10.0.0.1]"]
)
def test_a_redirect_from_public_to_private_is_refused(names, target):
    message = refuse(f"http://public.example/go?http://{target}/picture")
    assert "leads to a private network" in message
    assert names == ["93.184.215.14"]


def test_a_redirect_from_public_to_public_is_followed(names):
    assert fetch("http://public.example/go?http://other.example/picture") == PICTURE
    assert names == ["93.184.215.14", "1.1.1.1"]


def test_a_private_host_that_the_user_names_may_redirect_at_home(names):
    assert fetch("http://192.168.1.5/go?http://10.0.0.7/picture") == PICTURE


def test_a_detour_over_public_does_not_lead_home(names):
    refuse("http://10.0.0.7/go?http://public.example/go?http://10.0.0.7/picture")
    assert names == ["10.0.0.7", "93.184.215.14"]


def test_private_hosts_can_be_refused_altogether(names):
    refuse("http://127.0.0.1/picture", allow_private=False)
    assert names == []
    assert fetch("http://public.example/picture", allow_private=False) == PICTURE


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"])
def test_metadata_services_are_never_asked(names, host):
    assert "metadata" in refuse(f"http://{host}/picture")
    assert names == []


def test_a_redirect_from_https_to_http_is_refused():
    address = fetch_module._parse("https://public.example/x")
    with pytest.raises(NetworkError, match="from https to http"):
        fetch_module._redirected(address, "http://public.example/x")
    assert fetch_module._redirected(address, "//other.example/y?a").url == (
        "https://other.example/y?a"
    )


@pytest.mark.parametrize(
    "ip",
    [
        *("127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.0.1", "169.254.0.1", "100.64.0.1"),
        *("0.0.0.0", "192.0.0.8", "198.18.0.1", "224.0.0.1", "255.255.255.255", "203.0.113.9"),
        *("::1", "::", "::127.0.0.1", "fe80::1", "fe80::1%lo", "fec0::1", "fc00::1", "ff02::1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1"),
        *("::ffff:192.168.0.1", "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:10.0.0.1"),
    ],
)
def test_private_addresses_in_all_their_guises(ip):
    assert not is_public(ipaddress.ip_address(ip))


@pytest.mark.parametrize(
    "ip",
    [
        *("1.1.1.1", "93.184.215.14", "172.32.0.1", "2606:4700:4700::1111"),
        *("64:ff9b::101:101", "::ffff:1.1.1.1", "2a00:1450:4001::5efe:8.8.8.8"),
    ],
)
def test_public_addresses(ip):
    assert is_public(ipaddress.ip_address(ip))


def test_metadata_addresses_inside_ipv6():
    assert is_metadata(ipaddress.ip_address("64:ff9b::a9fe:a9fe"))
    assert not is_metadata(ipaddress.ip_address("169.254.169.253"))
