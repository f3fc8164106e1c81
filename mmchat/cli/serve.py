"""`mmchat serve`: the model behind OpenAI's and Ollama's APIs, and a page for a browser."""

from __future__ import annotations

import os
import re
import webbrowser
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmchat.catalog.adapters import AdapterSource, find_adapters
from mmchat.cli import console, model_choice, options
from mmchat.cli.prompt_input import check_model
from mmchat.errors import MissingExtra, UsageError, quoted
from mmchat.limits import MOST_ROWS
from mmchat.loading.options import LoadOptions
from mmchat.server.options import CONTEXT, DEFAULT_PORT, OLLAMA_PORT, ServerOptions, read_keys
from mmchat.words import plural, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmchat.catalog.source import ModelSource
    from mmchat.loading.loader import LoadedModel
    from mmchat.server.service import Service

KEY_VARIABLE = "MMCHAT_API_KEY"
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_of_server = partial(typer.Option, rich_help_panel="Server")
_of_access = partial(typer.Option, rich_help_panel="Access")


def _bytes(text: str) -> int:
    """Raises BadParameter for what is no size, and for none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    number = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not number:
        raise typer.BadParameter(f"{quoted(text)} is no size; write 8G, 512M or bytes")
    return number


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
        int | None,
        _of_server(
            metavar="SIZE",
            parser=_bytes,
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
            kv_memory=self.kv_memory,
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


def serve(
    *,
    given: ServeOptions,
    model: LoadOptions,
    offline: options.Offline = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model: OpenAI's API, Ollama's, and a page for a browser.

    Each --adapter is a model too, by its own name, beside the one that it changes.

    Ctrl-C or SIGTERM ends it when the answers that are being written are complete, the second one
    at once.
    """
    missing = [name for name in ("starlette", "uvicorn", "h11") if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"a server needs {' and '.join(missing)}: pip install 'mmchat[server]'")
    server = given.server()
    source = model.find()
    check_model(source.spec, has_pictures=False, chats=True)
    if model.max_seq_len is None:
        most = min(CONTEXT, source.spec.config.max_position_embeddings)
        model = replace(model, max_seq_len=most)
    source, apart = _apart(model, source)
    model_choice.say_choice(model, source)
    raise typer.Exit(_serve(server, model, source, apart, quiet, given.open_page))


def _apart(
    model: LoadOptions, source: ModelSource
) -> tuple[ModelSource, tuple[AdapterSource, ...]]:
    """What MODEL is by itself, and the adapters that are served beside it.

    Raises UsageError if clients could not tell them apart, or ranks are to share them.
    """
    from mmchat.server.service import names_of

    apart = find_adapters(model.adapter)
    if apart and model.ranks > 1:
        raise UsageError(
            "one model is served with --parallel; name the adapter as MODEL to have it alone, or"
            " leave out --parallel"
        )
    own = source.adapters[: len(source.adapters) - len(apart)]
    names_of(source.spec, [own, *((*own, one) for one in apart)])
    return replace(source, adapters=own), apart


def _serve(
    server: ServerOptions,
    model: LoadOptions,
    source: ModelSource,
    apart: Sequence[AdapterSource],
    quiet: bool,
    open_page: bool,
) -> int:
    from mmchat.server import log, running

    log.to_stderr(quiet=quiet)
    sockets = running.bind(server)
    address = running.url(sockets[0])

    def load() -> list[LoadedModel]:
        with console.Stages() as stages:
            models: list[LoadedModel] = [model_choice.load(model, source, stages)]
            for adapter in apart:
                from mmchat.loading.loader import load_with

                stages.show(f"merging {adapter.name}")
                wanted = (*source.adapters, adapter)
                models.append(load_with(models[0], wanted, model.compile))
            return models

    def ready(service: Service) -> None:
        if open_page:
            webbrowser.open(address)
        if server.log_content:
            console.say("every question and answer is written to stderr (--log-content)")
        room = f" in {size(service.memory)}" if service.memory else ""
        names = " and ".join(served.names.listed[0] for served in service.all)
        rows_of = " of each" if apart else ""
        also = f" and {running.url(sockets[1])}" if len(sockets) > 1 else ""
        rows = plural(service.rows, "answer")
        console.note(
            f"serving {names} at {address}{also}: {rows} at once{rows_of}{room}; Ctrl-C ends it"
        )

    return running.serve(server, sockets, load, ready)
