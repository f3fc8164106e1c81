"""`mmchat serve`: the model behind OpenAI's and Ollama's APIs, and a page for a browser."""

from __future__ import annotations

import os
import re
import webbrowser
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmchat.cli import console, model_choice, options
from mmchat.cli.help_page import Command, plain_app
from mmchat.cli.option_groups import with_option_groups
from mmchat.errors import MissingExtra, UsageError, quoted
from mmchat.limits import MOST_ROWS
from mmchat.loading.options import LoadOptions
from mmchat.server.options import CONTEXT, DEFAULT_PORT, OLLAMA_PORT, ServerOptions, read_keys
from mmchat.words import plural, size

if TYPE_CHECKING:
    from mmchat.api import Model
    from mmchat.catalog.find import ModelSource
    from mmchat.server.service import Service

KEY_VARIABLE = "MMCHAT_API_KEY"
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_REMOTE = "--allow-remote-images"
_of_server = partial(typer.Option, rich_help_panel="Server")
_of_access = partial(typer.Option, rich_help_panel="Access")


class ServeCommand(Command):
    """Takes `--allow-remote-images` without hosts, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f"{arg}=" if arg == _REMOTE else arg for arg in args])


def _bytes(text: str | None) -> str | None:
    """Callback of --kv-memory. Raises BadParameter."""
    if text is not None and _read_bytes(text) is None:
        raise typer.BadParameter(f"{quoted(text)} is no size; write 8G, 512M or bytes")
    return text


def _read_bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None


def serve(
    host: Annotated[
        str,
        _of_server(metavar="ADDRESS", help="Where to listen; others than this machine need keys."),
    ] = "127.0.0.1",
    port: Annotated[
        int, _of_server(metavar="N", min=0, max=65_535, help="0 takes any that is free.")
    ] = DEFAULT_PORT,
    ollama: Annotated[
        bool,
        _of_server("--ollama", help=f"Listen on {OLLAMA_PORT} too, where Ollama's programs look."),
    ] = False,
    max_rows: Annotated[
        int | None,
        _of_server(
            metavar="N",
            min=1,
            max=MOST_ROWS,
            help="Answers written at once.",
            show_default="8, on a GPU 64",
        ),
    ] = None,
    kv_memory: Annotated[
        str | None,
        _of_server(
            metavar="SIZE",
            callback=_bytes,
            help="Memory for conversations beside the model: 8G, 512M.",
            show_default="what is free",
        ),
    ] = None,
    queue: Annotated[
        int, _of_server(metavar="N", min=0, help="Requests of one key that may wait.")
    ] = 64,
    drain: Annotated[
        float,
        _of_server(metavar="SECONDS", min=0, help="Time for running answers when it ends."),
    ] = 30,
    strict_model: Annotated[
        bool, _of_server("--strict-model", help="Refuse requests that name another model.")
    ] = False,
    open_page: Annotated[
        bool, _of_server("--open", help="Open the page in a browser when it is ready.")
    ] = False,
    no_page: Annotated[bool, _of_server("--no-page", help="No page for a browser.")] = False,
    api_key_file: Annotated[
        Path | None,
        _of_access(
            metavar="FILE",
            help=f"Keys, one a line, each with a NAME: before it or none; or set {KEY_VARIABLE}.",
        ),
    ] = None,
    allow_remote_images: Annotated[
        str | None,
        _of_access(
            _REMOTE, metavar="[HOST,…]", help="Fetch pictures from https addresses, or these hosts."
        ),
    ] = None,
    media_dir: Annotated[
        Path | None,
        _of_access(metavar="DIR", help="Pictures in this folder may be named by their path."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        _of_access(metavar="NAME", help="A Host under which it is reached; repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        _of_access(metavar="ORIGIN", help="A page that may ask: https://…; repeatable."),
    ] = None,
    log_content: Annotated[
        bool, _of_access("--log-content", help="Log questions and answers. Off for a reason.")
    ] = False,
    *,
    model: LoadOptions,
    offline: options.Offline = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model: OpenAI's API, Ollama's, and a page for a browser.

    Ctrl-C or SIGTERM ends it when the answers that are being written are complete, the second one
    at once.
    """
    _check_extra()
    hosts = None if allow_remote_images is None else allow_remote_images.split(",")
    server = ServerOptions(
        host=host,
        port=port,
        ollama_port=OLLAMA_PORT if ollama else None,
        keys=read_keys(api_key_file, os.environ.get(KEY_VARIABLE)),
        rows=max_rows,
        kv_memory=_read_bytes(kv_memory) if kv_memory else None,
        queue=queue,
        drain_seconds=drain,
        remote_images=None if hosts is None else frozenset(filter(None, map(str.strip, hosts))),
        media_dir=media_dir,
        allowed_hosts=frozenset(allowed_host or ()),
        allowed_origins=frozenset(allow_origin or ()),
        strict_model=strict_model,
        page=not no_page,
        log_content=log_content,
    )
    source = model.find()
    if source.spec.chat_format == "base":
        raise UsageError(
            f"{source.spec.name} is a base model, which cannot chat; serve its Instruct sibling"
        )
    if model.max_seq_len is None:
        most = min(CONTEXT, source.spec.config.max_position_embeddings)
        model = replace(model, max_seq_len=most)
    if not quiet:
        model_choice.say_choice(model, source)
    raise typer.Exit(_serve(server, model, source, quiet, open_page))


serve_app = plain_app()
serve_app.command(cls=ServeCommand)(with_option_groups(serve))


def _serve(
    server: ServerOptions, model: LoadOptions, source: ModelSource, quiet: bool, open_page: bool
) -> int:
    from mmchat.server import log, running

    log.to_stderr(quiet=quiet)
    sockets = running.bind(server)
    address = running.url(sockets[0])

    def load() -> Model:
        with console.Stages(quiet=quiet) as stages:
            return model_choice.load(model, source, stages)

    def ready(service: Service) -> None:
        if open_page:
            webbrowser.open(address)
        if server.log_content:
            console.note("every question and answer is written to stderr (--log-content)")
        if not quiet:
            room = f" in {size(service.memory)}" if service.memory else ""
            also = f" and {running.url(sockets[1])}" if len(sockets) > 1 else ""
            rows = plural(service.rows, "answer")
            console.note(
                f"serving {service.model.spec.name} at {address}{also}:"
                f" {rows} at once{room}; Ctrl-C ends it"
            )

    return running.serve(server, sockets, load, ready)


def _check_extra() -> None:
    """Raises MissingExtra."""
    missing = [name for name in ("starlette", "uvicorn", "h11") if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"a server needs {' and '.join(missing)}: pip install 'mmchat[server]'")
