"""A server for the crash test: the real one, over an engine that takes a moment, in a process made to be killed."""

import os
import random
import signal
import socket
import threading
from concurrent.futures import Future
from typing import Literal

import uvicorn
from conftest import drawn

from fulgurite import Picture, Request
from fulgurite.ledger import Ledger
from fulgurite.records import Answer, Entry
from fulgurite.server import create_app
from fulgurite.settings import read_settings

Dies = Literal["never", "before settling", "after settling"]


class SlowEngine:
    """Gives each picture after a few milliseconds; fails for every seventh seed."""

    def submit(self, model: str, request: Request, on_step: object = None, key: str = "") -> Future[Picture]:
        job: Future[Picture] = Future()
        threading.Timer(random.uniform(0, 0.02), self._draw, (job, model, request)).start()
        return job

    def _draw(self, job: Future[Picture], model: str, request: Request) -> None:
        if not job.set_running_or_notify_cancel():
            return
        if (request.seed or 0) % 7 == 0:
            job.set_exception(RuntimeError("no picture"))
        else:
            job.set_result(drawn(model, request))

    def cancel(self, job: Future[Picture]) -> None:
        job.cancel()

    def stats(self) -> dict[str, int]:
        return {"queued": 0, "running": 0, "done": 0, "failed": 0}


class Dying(Ledger):
    """Takes the process with it at the worst moments there are."""

    dies: Dies = "never"

    def settle(self, entry: Entry, answer: Answer | None = None) -> Future[Answer | None]:
        if self.dies == "before settling":
            os.kill(os.getpid(), signal.SIGKILL)
        settlement = super().settle(entry, answer)
        if self.dies == "after settling":
            settlement.result()
            os.kill(os.getpid(), signal.SIGKILL)
        return settlement


def serve(url: str, listener: socket.socket, dies: Dies) -> None:
    ledger = Dying(url)
    ledger.dies = dies
    app = create_app(SlowEngine(), ledger, read_settings())
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listener])
