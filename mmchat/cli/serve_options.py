"""How a model is served, and to whom: the options of `mmchat serve`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mmchat.errors import UsageError, quoted
from mmchat.limits import MOST_ROWS
from mmchat.server.options import DEFAULT_PORT, OLLAMA_PORT, ServerOptions, read_keys

KEY_VARIABLE = "MMCHAT_API_KEY"
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_of_server = partial(typer.Option, rich_help_panel="Server")
_of_access = partial(typer.Option, rich_help_panel="Access")


def _bytes(text: str | None) -> str | None:
    """Callback of --kv-memory. Raises BadParameter."""
    if text is not None and not _read_bytes(text):
        raise typer.BadParameter(f"{quoted(text)} is no size; write 8G, 512M or bytes")
    return text


def _read_bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None


@dataclass(frozen=True)
class ServeOptions:
    """What was asked for; `server` says what it means."""

    host: Annotated[
        str,
        _of_server(metavar="ADDRESS", help="Where to listen; others than this machine need keys."),
    ] = "127.0.0.1"
    port: Annotated[int, _of_server(min=0, max=65_535, help="0 takes any that is free.")] = (
        DEFAULT_PORT
    )
    ollama: Annotated[
        bool,
        _of_server(help=f"Listen on {OLLAMA_PORT} too, where Ollama's programs look."),
    ] = False
    max_rows: Annotated[
        int | None,
        _of_server(
            min=1,
            max=MOST_ROWS,
            help="Answers written at once.",
            show_default="8; on a GPU what memory allows, up to 64",
        ),
    ] = None
    kv_memory: Annotated[
        str | None,
        _of_server(
            metavar="SIZE",
            callback=_bytes,
            help="Memory for conversations beside the model: 8G, 512M.",
            show_default="what is free",
        ),
    ] = None
    queue: Annotated[int, _of_server(min=0, help="Requests of one key that may wait.")] = 64
    drain: Annotated[
        float, _of_server(metavar="SECONDS", min=0, help="Time for running answers when it ends.")
    ] = 30
    strict_model: Annotated[bool, _of_server(help="Refuse requests that name another model.")] = (
        False
    )
    open_page: Annotated[
        bool, _of_server("--open", help="Open the page in a browser when it is ready.")
    ] = False
    no_page: Annotated[bool, _of_server(help="No page for a browser.")] = False
    api_key_file: Annotated[
        Path | None,
        _of_access(
            metavar="FILE",
            help=f"Keys, one a line, each with a NAME: before it or none; or set {KEY_VARIABLE}.",
        ),
    ] = None
    allow_remote_images: Annotated[
        str | None,
        _of_access(metavar="[HOST,…]", help="Fetch pictures from https addresses, or these hosts."),
    ] = None
    media_dir: Annotated[
        Path | None,
        _of_access(metavar="DIR", help="Pictures in this folder may be named by their path."),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        _of_access(metavar="NAME", help="A Host under which it is reached; repeatable."),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        _of_access(metavar="ORIGIN", help="A page that may ask: https://…; repeatable."),
    ] = None
    log_content: Annotated[
        bool, _of_access(help="Log questions and answers. Off for a reason.")
    ] = False

    def server(self) -> ServerOptions:
        """With the keys that the file and the environment hold. Raises UsageError."""
        if self.open_page and self.no_page:
            raise UsageError("with --no-page there is no page to --open; leave one of them out")
        remote = self.allow_remote_images
        hosts = None if remote is None else remote.split(",")
        return ServerOptions(
            host=self.host,
            port=self.port,
            ollama_port=OLLAMA_PORT if self.ollama else None,
            keys=read_keys(self.api_key_file, os.environ.get(KEY_VARIABLE)),
            rows=self.max_rows,
            kv_memory=_read_bytes(self.kv_memory) if self.kv_memory else None,
            queue=self.queue,
            drain_seconds=self.drain,
            remote_images=None if hosts is None else frozenset(filter(None, map(str.strip, hosts))),
            media_dir=self.media_dir,
            allowed_hosts=frozenset(self.allowed_host or ()),
            allowed_origins=frozenset(self.allow_origin or ()),
            strict_model=self.strict_model,
            page=not self.no_page,
            log_content=self.log_content,
        )
