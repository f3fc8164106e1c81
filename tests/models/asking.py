"""Asks small models: by command, and behind the server's routes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from typer.testing import CliRunner

from mmchat.api import Model
from mmchat.cli.app import app
from mmchat.engine.events import Event, Finished


def finished(events: Iterable[Event]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


def run(*arguments: str, code: int = 0, typed: str | None = None) -> str:
    """What the command says: its answer, or why it fails."""
    done = CliRunner().invoke(app, list(arguments), input=typed)
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


@contextmanager
def served(model: Model, **options: Any) -> Iterator[Any]:
    """A client of a server of it, without a socket."""
    from starlette.testclient import TestClient

    from mmchat.server.app import make_app
    from mmchat.server.options import ServerOptions
    from mmchat.server.service import Service

    service = Service(ServerOptions(rows=2, **options))
    service.use(model)
    try:
        yield TestClient(make_app(service), base_url="http://localhost")
    finally:
        service.close()
