import contextlib
import gzip
import io
import ipaddress
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image as PILImage

import mmchat
from mmchat import limits
from mmchat.errors import ImageError, MissingExtra, NetworkError, NotFoundError
from mmchat.images import load_image
from mmchat.images.web import fetch
from mmchat.images.web.ip_rules import is_metadata, is_public

pytestmark = pytest.mark.process


def picture() -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (9, 7), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
CERTIFICATES = Path(__file__).parents[1] / "certificates"


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

    def answer_coded(self):
        coding = self.path.rpartition("/")[2].replace("+", ", ")
        body = {"gzip": gzip.compress, "deflate": zlib.compress}.get(coding, bytes)(PICTURE)
        self.reply(body=body, Content_Encoding=coding)

    def answer_bomb(self):
        self.reply(body=gzip.compress(bytes(20 * limits.MIB)), Content_Encoding="gzip")

    def answer_notgzip(self):
        self.reply(body=PICTURE, Content_Encoding="gzip")

    def answer_busy(self):
        """Busy for the first requests, as many as the path says; wants to be asked again."""
        status, seconds, times = self.path.split("/")[2:]
        if sum(path == self.path for path, _ in self.server.seen) > int(times):
            self.answer_picture()
        else:
            self.reply(int(status), Retry_After=seconds)

    def answer_cookie(self):
        self.reply(302, Location="/picture", Set_Cookie="session=1")

    def answer_ninety(self):
        self.wfile.write(PICTURE)  # as HTTP/0.9 had it: no status, no headers

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

    def answer_where(self):
        """Redirect to what stands behind the ?, spelled with Python's escapes, byte by byte."""
        location = urllib.parse.unquote_to_bytes(self.path.partition("?")[2])
        self.wfile.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: ")
        self.wfile.write(location + b"\r\n\r\n")

    def answer_times(self):
        count = int(self.path.rpartition("/")[2])
        self.reply(302, Location=f"/times/{count - 1}" if count > 1 else "/picture")

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


@pytest.mark.parametrize("path", ["/picture", "/chunked", "/go?/picture", "/times/20"])
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
    fetch(server.url + "/cookie")
    [(_, first), (_, headers)] = server.seen
    assert first == headers
    assert headers == {
        "Host": server.url.removeprefix("http://"),
        "User-Agent": f"mmchat/{mmchat.__version__}",
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
        ("/coded/br", NetworkError, "compressed as 'br'"),
        ("/coded/gzip+gzip", NetworkError, "compressed as 'gzip, gzip'"),
        ("/notgzip", NetworkError, "damaged answer"),
        ("/ninety", NetworkError, "did not speak HTTP"),
        ("/status/300", NetworkError, "answered 300 (Multiple Choices)"),
        ("/busy/429/60/9", NetworkError, "answered 429 (Too Many Requests); try again later"),
        ("/nonsense", NetworkError, "did not speak HTTP"),
        ("/huge", ImageError, "larger than 64 MiB"),
        ("/nowhere", NetworkError, "answered 302 (Found)"),
        ("/times/21", NetworkError, "is the end of 20 redirects, and redirects again"),
        ("/go?ftp://example.com/", NetworkError, "redirects to an invalid address"),
        ("/go?file:///etc/passwd", NetworkError, "redirects to an invalid address"),
        ("/go?http://user@example.com/", NetworkError, "redirects to an invalid address"),
        ("/where?/a%01b", NetworkError, "redirects to an invalid address"),
        ("/where?http://a:99999/", NetworkError, "redirects to an invalid address"),
        ("/go?http://a\\@b/", ImageError, "backslash"),
    ],
)
def test_answers_that_cannot_be_used_say_why(server, path, kind, words):
    assert words in refuse(server.url + path, kind)


def test_a_redirect_loop_ends(server):
    refuse(server.url + "/times/99")
    assert len(server.seen) == limits.FETCH_REDIRECTS + 1


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("/picture?a b", "/picture?a%20b"),
        ("/picture?%C3%A9", "/picture?%C3%A9"),
        ("/named/h%FCnd.png", "/named/h%C3%BCnd.png"),
        ("picture", "/picture"),
        ("../picture#part", "/picture"),
        ("/picture?a=%2525", "/picture?a=%25"),
        ("  /picture  ", "/picture"),
    ],
)
def test_locations_are_read_as_servers_write_them(server, location, asked):
    quoted = urllib.parse.quote(location, safe="/%")
    assert fetch(f"{server.url}/where?{quoted}") == PICTURE
    assert server.seen[-1][0] == asked


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity"])
def test_an_answer_that_is_compressed_all_the_same_is_unpacked(server, coding):
    assert fetch(f"{server.url}/coded/{coding}") == PICTURE


def test_a_compressed_answer_is_capped_as_it_is_unpacked(server):
    assert "larger than 2 MiB" in refuse(server.url + "/bomb", ImageError, max_bytes=2 * limits.MIB)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_wants_to_be(server, status):
    assert fetch(f"{server.url}/busy/{status}/0/2") == PICTURE
    assert len(server.seen) == 3


def test_a_server_that_stays_busy_is_left_alone(server):
    assert "answered 503" in refuse(server.url + "/busy/503/0/9")
    assert len(server.seen) == 3


def test_a_server_is_told_whom_to_contact(server, monkeypatch):
    monkeypatch.setenv("MMCHAT_CONTACT", "me@example.com")
    fetch(server.url + "/picture")
    assert server.seen[0][1]["User-Agent"] == f"mmchat/{mmchat.__version__} (+me@example.com)"
    monkeypatch.setenv("MMCHAT_CONTACT", "me\r\nX-Evil: 1")
    fetch(server.url + "/picture")
    assert server.seen[1][1]["User-Agent"] == f"mmchat/{mmchat.__version__}"


def test_a_space_in_the_path_is_sent_as_browsers_send_it(server):
    fetch(server.url + "/named/my dog.png?a b")
    assert server.seen[0][0] == "/named/my%20dog.png?a%20b"


def test_the_query_stays_out_of_messages(server):
    assert "secret" not in refuse(server.url + "/missing?signature=secret")


def test_a_body_without_end_stops_at_the_cap(server):
    started = time.monotonic()
    assert "larger than 1 MiB" in refuse(server.url + "/endless", ImageError, max_bytes=limits.MIB)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", ["/drip", "/dripheader"])
def test_a_slow_drip_meets_the_total_limit(server, path):
    assert "took longer than 0.6 s" in refuse(server.url + path, seconds=0.6)


def test_a_silent_server_meets_the_idle_limit(server, monkeypatch):
    monkeypatch.setattr(limits, "FETCH_IDLE_SECONDS", 0.1)
    assert "sent nothing for 0.1 s" in refuse(server.url + "/silent")


def test_a_closed_port_and_an_unknown_host_are_told_apart(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "no connection could be made" in refuse(f"http://127.0.0.1:{port}/x.png")

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
    assert "no connection could be made" in refuse(
        server.url.replace("http:", "https:") + "/picture"
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://a b/", "no valid host"),
        ("http://a\\b/", "backslash"),
        ("http://a/\r\nX: y", "control character"),
        ("http://a/\x1b[31m", "control character"),
        ("http://user:secret@example.com/", "user name"),
        ("http://example.com@127.0.0.1/", "user name"),
        ("http://", "no valid host"),
        ("http:///x.png", "no valid host"),
        ("http://a%2eb/", "no valid host"),
        ("http://a:99999/", "no valid port"),
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
    """Names that resolve to chosen addresses; connections to the web go to the test server."""
    table = {"public.example": "93.184.215.14", "other.example": "1.1.1.1"}

    def look_up(host, port, *_, **__):
        try:
            ip = ipaddress.ip_address(table.get(host, host))
        except ValueError:
            raise socket.gaierror from None
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        return [(family, socket.SOCK_STREAM, 6, "", (str(ip), port))]

    connected = []
    real_connect = socket.create_connection

    def connect(address, *args, **options):
        connected.append(address[0])
        is_web = address[1] in (80, 443)
        return real_connect(server.server_address if is_web else address, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
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


@pytest.fixture
def secure(server, names, monkeypatch):
    """A server with TLS and a certificate for public.example; all connections lead to it.

    The certificate is valid for a hundred years: openssl req -x509 -newkey ec -pkeyopt
    ec_paramgen_curve:P-256 -nodes -days 36500 -subj "/CN=mmchat test" -addext
    subjectAltName=DNS:public.example,DNS:localhost -keyout localhost.key -out localhost.pem
    """
    pem = CERTIFICATES / "localhost.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, CERTIFICATES / "localhost.key")
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    asked = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    with Server() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        monkeypatch.setattr(server, "server_address", secure.server_address)
        thread = threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        secure.asked = asked
        yield secure
        secure.shutdown()
        thread.join()


def test_https_goes_to_the_checked_address_under_the_name_of_the_host(secure, names):
    assert fetch("https://public.example/picture") == PICTURE
    assert names == ["93.184.215.14"]
    assert secure.asked == ["public.example"]
    assert secure.seen[0][1]["Host"] == "public.example"


def test_a_certificate_of_another_host_is_refused(secure):
    assert "has no valid certificate" in refuse("https://other.example/picture")


def test_a_certificate_of_nobody_who_is_trusted_is_refused(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "has no valid certificate" in refuse("https://public.example/picture")


def test_a_redirect_from_https_to_http_is_refused(secure):
    message = refuse("https://public.example/go?http://public.example/picture")
    assert "from https to http" in message
    assert fetch("https://public.example/go?//public.example/picture") == PICTURE


def test_a_host_with_several_addresses_is_reached_by_one_that_answers(server, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.2", server.server_address[1]))  # listens to nobody

        def look_up(host, port, *_, **__):
            ips = ["127.0.0.2", "127.0.0.1"] if host == "dog.example" else [host]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        port = server.server_address[1]
        assert fetch(f"http://dog.example:{port}/picture") == PICTURE


def test_a_name_is_looked_up_once(names, monkeypatch):
    answers = iter(["1.1.1.1", "127.0.0.1"])  # a name server that changes its mind

    def look_up(host, port, *_, **__):
        ip = next(answers) if host == "rebinding.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert fetch("http://rebinding.example/picture", allow_private=False) == PICTURE
    assert names == ["1.1.1.1"]


# ---- proxies


class ProxyHandler(Handler):
    """Answers http itself, whatever the host, and tunnels https to `server.target`."""

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        self.path = "/" + self.path.split("/", 3)[3]
        name = self.path.partition("?")[0].strip("/").partition("/")[0]
        if self.server.status == 200:
            getattr(self, f"answer_{name}", self.answer_missing)()
        else:
            self.reply(self.server.status)
        self.close_connection = True

    def do_CONNECT(self):
        self.server.seen.append((self.path, dict(self.headers)))
        if self.server.status != 200:
            self.reply(self.server.status)
            return
        self.send_response(200)
        self.end_headers()
        with socket.socket() as behind:
            behind.connect(self.server.target)
            pump = threading.Thread(target=forward, args=(behind, self.connection))
            pump.start()
            forward(self.connection, behind)
            pump.join()
        self.close_connection = True


def forward(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as proxy:
        proxy.RequestHandlerClass = ProxyHandler
        proxy.status = 200
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:secret@"))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.removeprefix("http://"))
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield proxy
        proxy.is_over.set()
        proxy.shutdown()
        thread.join()


def test_http_goes_through_the_proxy_of_the_environment(proxy, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **o: (real if host[0] == "1" else unknown)(host, *a, **o),
    )
    assert fetch("http://only.the.proxy.knows.example/picture?a") == PICTURE
    [(asked, headers)] = proxy.seen
    assert asked == "http://only.the.proxy.knows.example/picture?a"
    assert headers["Proxy-Authorization"] == "Basic bWU6c2VjcmV0"
    assert headers["Host"] == "only.the.proxy.knows.example"


def test_https_is_tunnelled_through_the_proxy(secure, proxy):
    proxy.target = secure.server_address
    assert fetch("https://public.example/picture") == PICTURE
    assert [asked for asked, _ in proxy.seen] == ["public.example:443"]
    assert "Proxy-Authorization" not in secure.seen[0][1]


@pytest.mark.parametrize(
    "bypassed", ["127.0.0.1", "localhost, 127.0.0.0/8", "*", "10.0.0.1,127.0.0.1:{port}", "0.0.1"]
)
def test_no_proxy_names_what_is_asked_directly(server, proxy, monkeypatch, bypassed):
    port = server.server_address[1]
    monkeypatch.setenv("NO_PROXY", bypassed.format(port=port))
    assert fetch(server.url + "/picture") == PICTURE
    assert proxy.seen == []


@pytest.mark.parametrize("other", ["127.0.0.2", "10.0.0.0/8", "example.com", "127.0.0.1:1"])
def test_no_proxy_of_others_changes_nothing(server, proxy, monkeypatch, other):
    monkeypatch.setenv("NO_PROXY", other)
    assert fetch(server.url + "/picture") == PICTURE
    assert len(proxy.seen) == 1


@pytest.mark.parametrize("target", ["127.0.0.1", "10.0.0.1", "[::1]", "169.254.169.254"])
def test_a_proxy_is_not_asked_for_private_addresses_by_others(names, proxy, target):
    message = refuse(f"http://public.example/go?http://{target}/picture")
    assert "leads to a " in message
    assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    ("status", "words"), [(403, "answered 403"), (407, "answered 407"), (502, "answered 502")]
)
def test_a_proxy_that_refuses_is_named(secure, proxy, status, words):
    proxy.status = status
    assert words in refuse("http://public.example/picture")
    message = refuse("https://public.example/picture")
    assert f"the proxy 'http://127.0.0.1:{proxy.server_address[1]}' says '{status}" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://me:secret@127.0.0.1:{port}", "through the proxy 'http://127.0.0.1:{port}'"),
        ("gopher://me:secret@127.0.0.1:1", "the proxy 'gopher://127.0.0.1:1' of the environment"),
        ("http://me:secret@[::1", "of the environment is no valid address"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    proxy, monkeypatch, value, words
):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("HTTP_PROXY", value.format(port=port))
        message = refuse("http://127.0.0.1/picture")
    assert words.format(port=port) in message
    assert "secret" not in message


def test_a_socks_proxy_without_its_package_names_it(proxy, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1")
    assert "pip install socksio" in refuse("http://127.0.0.1/picture", MissingExtra)


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
