"""Connections: those of slow, silent and dead clients end by themselves, and the server stops within a bound."""

import asyncio
import math
import socket
import time
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fulgurite.errors import FulguriteError

HEAD_SECONDS = 20.0  # that a client has for a request's first lines
SILENT_SECONDS = 60  # after which who reads nothing, or answers nothing to the system's probes, is taken for dead
SEND_SECONDS = 2.0  # that the last answers are given to be sent when the server stops
BACKLOG = 2048  # connections that the system keeps until they are taken


class Connection(HttpToolsProtocol):
    """Uvicorn's connection, which alone would wait for ever for a request that never comes or never ends."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # At anything that comes, uvicorn ends its own time for a next request, though it begin none: an empty line, or
        # a body that was answered unread. More of the same does not give more time.
        if not self._late and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()

    def on_message_begin(self) -> None:
        self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._waits_no_longer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waits_no_longer()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._waits_no_longer()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _waits_no_longer(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None


def seconds_left(app: FastAPI, most: float) -> float:
    """Of the time to stop within, of which ``most`` is left before the signal."""
    stop_by: float | None = getattr(app.state, "stop_by", None)
    return most if stop_by is None else max(0.0, stop_by - time.monotonic())


def time_is_up(app: FastAPI) -> bool:
    """Whether the server was told to stop, and the time to do so within is over."""
    return seconds_left(app, math.inf) <= 0


class Server(uvicorn.Server):
    """Tells the app, at the signal to stop, by when: ``app.state.stop_by``, in the monotonic clock's seconds."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        app.state.stop_by = time.monotonic() + self.seconds_left()
        await super().shutdown(sockets)
        sent_by = time.monotonic() + (0 if self.force_exit else SEND_SECONDS)
        while self.server_state.connections and time.monotonic() < sent_by:  # they end when all of an answer has left
            await asyncio.sleep(0.02)
        if self.force_exit:  # by a second Ctrl-C: uvicorn leaves out that the app ends what it does, answering for it
            app.state.stop_by = time.monotonic()
            await self.lifespan.shutdown()

    def seconds_left(self) -> float:
        """As ``seconds_left`` of its app."""
        app: Any = self.config.app
        return seconds_left(app, self.config.timeout_graceful_shutdown or 0)


def allow_many_files() -> None:
    """Asks for all files that the system gives: a connection is one, and often only a thousand are allowed unasked."""
    try:
        import resource
    except ImportError:  # Windows, which has no such bound
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says that there is no bound, and takes no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_for(app: FastAPI, shutdown_seconds: int) -> Server:
    """A server, to be run on what ``listen`` gives."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=shutdown_seconds,
        log_config=None,
        log_level="warning",
        access_log=False,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on, which takes connections from now on: who is early waits for the server to run.

    Raises FulguriteError where it cannot have the address.
    """
    allow_many_files()
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = str(error.strerror).partition(" (while attempting to bind")[0]  # Python repeats the address
        raise FulguriteError(f"Cannot listen on {host}, port {port}: {why}.") from None
    # Connections have these from their listener.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
    return listener
