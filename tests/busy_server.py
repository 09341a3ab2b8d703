"""A server in a process of its own: the real one and the real engine, over a pipeline that only takes its time."""

import logging
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from conftest import Blank, engine_of

from fulgurite.ledger import Ledger
from fulgurite.pipeline import Row
from fulgurite.server import create_app, listen, server_for
from fulgurite.settings import read_settings


def serve(url: str, step_seconds: float, shutdown_seconds: int, log: Path, tell: Connection) -> None:
    """Tells its port. Every picture takes ``step_seconds`` a step."""
    logging.basicConfig(filename=log)

    def take_time(stage: str, rows: Sequence[Row]) -> None:
        if stage == "step":
            time.sleep(step_seconds)

    engine, ledger = engine_of(Blank(take_time), queue_size=64), Ledger(url)
    app = create_app(engine, ledger, read_settings(shutdown_seconds=shutdown_seconds))
    server, listener = server_for(app, shutdown_seconds), listen("127.0.0.1", 0)
    tell.send(listener.getsockname()[1])
    try:
        server.run([listener])
    finally:
        engine.close(server.seconds_left())
        ledger.close()
