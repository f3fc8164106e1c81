"""What a server is told when it is started."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmchat import limits
from mmchat.errors import UsageError, quoted
from mmchat.strict_json import Where, read_bounded

DEFAULT_PORT, OLLAMA_PORT = 5000, 11434
SHORTEST_KEY = 16  # characters
_NAME = re.compile(r"[\w.-]+|[\da-fA-F:.]+|\[[\da-fA-F:.]+\]")
_ORIGIN = re.compile(r"[a-z][a-z\d+.-]*://[a-z\d.\[\]:-]+")  # also of apps and extensions
CONTEXT = 8_192  # positions of one request, unless --max-seq-len says otherwise


@dataclass(frozen=True)
class ServerOptions:
    """How to serve, and whom.

    ollama_port: where Ollama's programs look, None: nowhere. keys: name -> key; without any, only
    this machine may ask. rows: answers written at once, kv_memory: bytes that they may take, None:
    as the model and the machine allow. queue: requests of one owner that may wait. drain_seconds:
    what running answers get when the server ends. remote_images: hosts whose pictures are fetched,
    empty: all public ones, None: none. media_dir: folder whose pictures may be named by their path.
    strict_model: refuse other names of models. log_content: write what is asked and answered.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    ollama_port: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    rows: int | None = None
    kv_memory: int | None = None
    queue: int = 64
    drain_seconds: float = 30.0
    remote_images: frozenset[str] | None = None
    media_dir: Path | None = None
    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[str] = frozenset()
    strict_model: bool = False
    page: bool = True
    log_content: bool = False

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise UsageError(
                f"{quoted(self.host)} lets other machines ask; give keys with --api-key-file, or"
                " MMCHAT_API_KEY, or leave --host out"
            )
        if self.media_dir is not None and not self.media_dir.is_dir():
            raise UsageError(f"--media-dir: {quoted(self.media_dir)} is no folder; give one")
        for option, names, form, right in (
            ("--allowed-host", self.allowed_hosts, _NAME, "box.example"),
            ("--allow-remote-images", self.remote_images or (), _NAME, "a.example"),
            ("--allow-origin", self.allowed_origins, _ORIGIN, "https://app.example"),
        ):
            for name in names:
                if not form.fullmatch(name):
                    what = f"{option}: {quoted(name)} is never what a request says"
                    raise UsageError(f"{what}; write it as {right}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(file: Path | None, key: str | None) -> dict[str, str]:
    """Keys by name. file: lines of KEY or NAME: KEY; `#` begins a comment. key: one more.

    Raises UsageError.
    """
    keys = {}
    if file is not None:
        where = Where(str(file), error=UsageError)
        lines = read_bounded(file, limits.MIB, where).decode("utf-8", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            name, _, value = line.partition("#")[0].strip().rpartition(":")
            if value.strip():
                place = f"{where.file}: line {number}: "
                _add_key(keys, name.strip() or f"key{number}", value.strip(), place)
        if not keys:
            raise where.fail("there is no key in it; write one a line")
    if key:
        _add_key(keys, "key", key)
    return keys


def _add_key(keys: dict[str, str], name: str, key: str, place: str = "") -> None:
    if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"{place}the key {quoted(name)} must have {SHORTEST_KEY} or more printable ASCII"
            " characters; make one with: openssl rand -hex 24"
        )
    if name in keys:
        raise UsageError(f"{place}two keys are called {quoted(name)}; give each its own name")
    if other := next((known for known, held in keys.items() if held == key), ""):
        raise UsageError(f"{place}{quoted(name)} has the key of {quoted(other)}; give each its own")
    keys[name] = key
