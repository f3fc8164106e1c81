"""From a command line to a server that runs, and its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from mmchat.errors import UsageError
from mmchat.parallel import launch
from mmchat.server import log
from mmchat.server.app import make_app
from mmchat.server.options import ServerOptions
from mmchat.server.protocol import Protocol
from mmchat.server.service import Service

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

Load = Callable[[], Sequence["LoadedModel"]]
Ready = Callable[[Service], None]
BACKLOG = 128  # connections that wait to be accepted
LAST_SECONDS = 2.0  # for what is still to be written when a drain is over
TICK_SECONDS = 0.05


def bind(options: ServerOptions) -> list[socket.socket]:
    """The ports to listen on. Raises UsageError where one is taken."""
    ports = [(options.port, "give another with --port")]
    if options.ollama_port is not None:
        ports.append((options.ollama_port, "end Ollama first, or leave out --ollama"))
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(_bound(options.host, *port)) for port in ports]
        opened.pop_all()  # all of them are had: they stay open
    return sockets


def _bound(host: str, port: int, advice: str) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Connections inherit it. Without it a body waits for who acknowledges its head: 40 ms.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return bound
    except OSError as error:
        raise UsageError(
            # Python adds the address once more
            f"port {port} of {host} cannot be had"
            f" ({(error.strerror or str(error)).partition(' (')[0]}); {advice}"
        ) from None


def url(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    options: ServerOptions, sockets: Sequence[socket.socket], load: Load, ready: Ready
) -> int:
    """Listen at once, load the model meanwhile, and serve until a signal; returns the exit code.

    ready: called when the model is loaded. Raises what loading raises.
    """

    running = _Running(options, load, ready)
    code = asyncio.run(running.run(list(sockets)))
    if running.error is not None:
        raise running.error
    closing = threading.Thread(target=running.service.close, daemon=True)
    closing.start()
    closing.join(LAST_SECONDS)
    # torch survives no end of Python within its import; a step on a CPU may take minutes, and so
    # may a picture, for whose thread Python would wait
    if running.loading.is_alive() or closing.is_alive():
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End the process as it is."""
    sys.stderr.flush()
    os._exit(code)


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again, and wait for streams without end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Running:
    """error: why loading failed."""

    def __init__(self, options: ServerOptions, load: Load, ready: Ready) -> None:
        self.service = Service(options)
        self.error: BaseException | None = None
        self.loading = threading.Thread(target=self._load, args=(load, ready), daemon=True)
        self._code: int | None = None  # how it ends, once that is known

    def _load(self, load: Load, ready: Ready) -> None:
        try:
            self.service.use(*load())
            ready(self.service)
        except BaseException as error:
            self.error = error

    async def run(self, sockets: list[socket.socket]) -> int:
        server = _Server(
            uvicorn.Config(
                make_app(self.service),
                loop="asyncio",
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=16_384,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=int(LAST_SECONDS),
                backlog=BACKLOG,
            )
        )
        loop = asyncio.get_running_loop()
        log.take_failures(loop)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._end, number)
        self.loading.start()
        serving = asyncio.ensure_future(server.serve(sockets))
        await self._until_it_ends(serving)
        await self._drain()
        server.should_exit = True
        await serving
        return self._code or 0

    def _end(self, number: int) -> None:
        """The first signal ends it when all answers are written, the second one at once."""
        if self._code is not None:
            _leave(128 + number)
        self._code = 0

    async def _until_it_ends(self, serving: asyncio.Future[None]) -> None:
        while self._code is None and self.error is None and not serving.done():
            if lost := launch.lost():
                self.error = lost
                break
            if self.service.failure is not None:
                log.bug(self.service.failure)
                self._code = 1
            await asyncio.sleep(TICK_SECONDS)
        self.service.drain()

    async def _drain(self) -> None:
        """Answers that are being written get their time, and are cut then."""
        for seconds in (self.service.options.drain_seconds, LAST_SECONDS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while self.service.is_busy:
                        await asyncio.sleep(TICK_SECONDS)
            self.service.interrupt()
