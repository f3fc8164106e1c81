"""A fake Hugging Face Hub and its CDN on two ports of this machine, with faults to switch on.

It answers what mmchat and `hf` ask: revision, tree, HEAD and GET of resolve, whoami-v2. Large files
redirect to the CDN, as on the Hub. `requests` holds one Seen for each request.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"
REPO = "acme/Tiny-Vision"
LARGE = 4_000  # bytes from which a file is stored as LFS


@dataclass(frozen=True)
class Seen:
    """A request: which server, its method, its path, and headers in lower case."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Faults:
    """What goes wrong; `once` faults are used up."""

    gated: bool = False
    good_tokens: tuple[str, ...] = ("hf_good",)
    known_tokens: tuple[str, ...] = ("hf_good", "hf_pending")
    cut_after: int | None = None  # bytes of every large body, then the connection breaks
    cut_once: int | None = None
    ignores_range: bool = False
    etag_changed: bool = False
    wrong_bytes: bool = False
    too_long: bool = False
    status_once: dict[str, list[int]] = field(default_factory=dict)  # part of a path -> statuses
    drip: float = 0.0  # seconds after each 4 KiB
    hangs: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # what the list says instead


class FakeHub:
    """Serves `files` as the repository `repo` at COMMIT; a context manager."""

    def __init__(self, files: dict[str, bytes], repo: str = REPO) -> None:
        self.files = files
        self.repo = repo
        self.faults = Faults()
        self.requests: list[Seen] = []
        self.large_bytes = 0  # of large bodies, as far as they were sent
        self.lock = threading.Lock()
        self.commits = {"main": COMMIT, COMMIT: COMMIT}

    def __enter__(self) -> FakeHub:
        self._servers = []
        for name in ("hub", "cdn"):
            handler = type(name, (_Handler,), {"hub": self, "name": name})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # a client that goes away is no news
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        # Two names of this machine, so that the CDN is another host.
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn_url = f"http://localhost:{self._servers[1].server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def sent(self, method: str, part: str = "") -> list[Seen]:
        return [seen for seen in self.requests if seen.method == method and part in seen.path]

    def entry(self, path: str) -> dict:
        """An item of the tree."""
        data, size = self.files[path], self.faults.sizes.get(path, len(self.files[path]))
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        item = {"type": "file", "path": path, "size": size, "oid": blob}
        if len(data) >= LARGE:
            item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 9}
        return item

    def sibling(self, path: str) -> dict:
        """A file in the answer to `revision/…?blobs=True`."""
        entry = self.entry(path)
        item = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
        if lfs := entry.get("lfs"):
            item["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 9}
        return item


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    name: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms behind its head

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, is_head: bool) -> None:
        faults, path = self.hub.faults, unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Seen(self.name, self.command, path, headers))
        token = headers.get("authorization", "").removeprefix("Bearer ")
        try:
            for part, statuses in faults.status_once.items():
                if part in path and statuses:
                    return self._send(statuses.pop(0), b"", {"Retry-After": "0"})
            if faults.hangs:
                time.sleep(30)
            if self.name == "cdn":
                return self._send_body(path[1:], self.hub.files[path[1:]], is_head)
            if path == "/api/whoami-v2":
                known = token in faults.known_tokens
                return self._json({"name": "ann", "orgs": []}) if known else self._send(401, b"")
            return self._hub_answer(path, token, is_head)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _hub_answer(self, path: str, token: str, is_head: bool) -> None:
        hub, api = self.hub, f"/api/models/{self.hub.repo}/"
        if token and token not in hub.faults.known_tokens:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if hub.repo not in path:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if path.startswith(api + "revision/"):
            commit = hub.commits.get(path.removeprefix(api + "revision/"))
            if commit is None:
                return self._refuse(404, "RevisionNotFound", "Invalid rev id")
            with_facts = "blobs" in parse_qs(urlsplit(self.path).query)
            names = sorted(hub.files)
            files = [hub.sibling(n) if with_facts else {"rfilename": n} for n in names]
            return self._json({"id": hub.repo, "sha": commit, "siblings": files})
        if path.startswith(api + "tree/"):
            return self._json([hub.entry(name) for name in sorted(hub.files)])
        name = path.split("/resolve/")[1].split("/", 1)[1]
        if hub.faults.gated and token not in hub.faults.good_tokens:
            return self._refuse(403 if token else 401, "GatedRepo", "Access is restricted")
        return self._resolve(name, is_head)

    def _resolve(self, name: str, is_head: bool) -> None:
        entry, faults = self.hub.entry(name), self.hub.faults
        etag = entry.get("lfs", entry)["oid"]
        etag = etag[::-1] if faults.etag_changed else etag
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if "lfs" not in entry:
            return self._send_body(name, self.hub.files[name], is_head, headers)
        linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        return self._send(302, b"", headers | linked | {"Location": f"{self.hub.cdn_url}/{name}"})

    def _send_body(
        self, name: str, data: bytes, is_head: bool, headers: dict[str, str] | None = None
    ) -> None:
        faults, is_large, status = self.hub.faults, len(data) >= LARGE, 200
        headers = dict(headers or {})
        if faults.wrong_bytes and is_large:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if faults.too_long and is_large:
            data += b"more"
        span = self.headers.get("Range", "")
        if span and not faults.ignores_range:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        limit = len(data)
        if is_large and not is_head:
            if faults.cut_after is not None:
                limit = faults.cut_after
            elif faults.cut_once is not None and len(data) > faults.cut_once:
                limit, faults.cut_once = faults.cut_once, None
        self._send(status, data, headers, None if is_head else limit)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, limit: int | None = 0
    ) -> None:
        """The head, and the first `limit` bytes of `data`; fewer than all break the connection."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if limit is None or self.command == "HEAD":
            return
        for start in range(0, min(limit, len(data)), 4096):
            self.wfile.write(data[start : min(start + 4096, limit)])
            if self.name == "cdn":
                with self.hub.lock:
                    self.hub.large_bytes += min(4096, limit - start)
            if self.hub.faults.drip:
                time.sleep(self.hub.faults.drip)
        if limit < len(data):
            self.close_connection = True

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self._send(200, data, {"Content-Type": "application/json"}, len(data))

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"", headers)
