"""`mmchat serve`: the model behind OpenAI's and Ollama's APIs, and a page for a browser."""

from __future__ import annotations

import webbrowser
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from mmchat.catalog.adapters import AdapterSource, find_adapters
from mmchat.cli import console, model_choice, options
from mmchat.cli.prompt_input import check_model
from mmchat.cli.serve_options import ServeOptions
from mmchat.errors import MissingExtra, UsageError
from mmchat.loading.options import LoadOptions
from mmchat.server.options import CONTEXT, ServerOptions
from mmchat.words import plural, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmchat.catalog.source import ModelSource
    from mmchat.loading.loader import LoadedModel
    from mmchat.server.service import Service


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
