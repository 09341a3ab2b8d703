"""What the HTTP path costs, with an engine that answers at once: python bench/http_path.py [--seconds 5] [--rounds 3]

Ours (a key looked up, its limits, the ledger written to SQLite before each answer, metrics, a line of log) beside a
bare FastAPI app and LitServe, which only read the JSON and encode. All three make the same PNG of the same 256x256
picture, and are asked by the same client in the same run. Each has one core for all of its threads and processes (as
LitServe encodes in a process of its own, more cores would be more machine for it), and the client has the others.
`--cores 0` leaves the cores to the system. Linux only. Needs: pip install litserve
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future

import litserve
import uvicorn
import uvloop
from fastapi import FastAPI
from fastapi.responses import Response
from PIL import Image

from fulgurite import Picture, Request
from fulgurite.ledger import Ledger
from fulgurite.picture_file import png_bytes
from fulgurite.server import JSONLines, create_app
from fulgurite.settings import read_settings

KEY = "the-key-of-this-bench"
MODEL = "fulgurite/spark"
BODY = {"model": MODEL, "data": {"prompt": "a red fox", "height": 256, "width": 256, "num_steps": 8, "seed": 7}}
CONNECTIONS = 32


def picture() -> Picture:
    image = Image.radial_gradient("L").convert("RGB")
    return Picture(image, Request("a red fox", height=256, width=256, seed=7), MODEL, 8, image.size, 0.1, ())


def freeze() -> None:
    """As `fulgurite serve` does; and the bare app, which would have no torch to walk through if not for this file."""
    gc.collect()
    gc.freeze()


def ours(port: int) -> None:
    class Instant:
        """An engine that has drawn everything already."""

        def __init__(self) -> None:
            self.made = picture()

        def submit(self, model: str, request: Request, on_step: object = None, key: str = "") -> Future[Picture]:
            job: Future[Picture] = Future()
            job.set_result(self.made)
            return job

        def cancel(self, job: Future[Picture]) -> None: ...

        def position(self, job: Future[Picture]) -> int:
            return 0

        def seconds_until_begun(self, job: Future[Picture]) -> float:
            return 0.0

        def stats(self) -> dict[str, int]:
            return {"queued": 0, "running": 0, "done": 0, "failed": 0}

        def state(self) -> str:
            return "ready"

    with tempfile.TemporaryDirectory() as home:
        ledger = Ledger(f"sqlite:///{home}/ledger.db")
        ledger.keys.set_from_environment(KEY)
        app = create_app(Instant(), ledger, read_settings())
        lines = logging.FileHandler(os.devnull)
        lines.setFormatter(JSONLines())
        logging.basicConfig(level=logging.INFO, handlers=[lines])
        freeze()
        uvicorn.run(app, port=port, log_level="error")


def bare(port: int) -> None:
    app, made = FastAPI(), picture()

    @app.post("/api/v1")
    def draw(body: dict) -> Response:
        return Response(png_bytes(made), media_type="image/png")

    freeze()
    uvicorn.run(app, port=port, log_level="error")


class Draw(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.made = picture()

    def decode_request(self, request: dict) -> dict:
        return request

    def predict(self, request: dict) -> bytes:
        return png_bytes(self.made)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


def lit(port: int) -> None:
    server = litserve.LitServer(Draw(api_path="/api/v1"), accelerator="cpu")
    server.run(port=port, log_level="error", generate_client_file=False, num_api_servers=1)


class Caller(asyncio.Protocol):
    """One connection that asks again as soon as it is answered. Plain bytes: the client shall cost little."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self.request, self.latencies, self.buffer, self.wanted = request, latencies, bytearray(), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.buffer.clear()
        self.wanted, self.asked = 0, time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.wanted and (end := self.buffer.find(b"\r\n\r\n")) > 0:
            head = bytes(self.buffer[:end]).lower()
            if not head.startswith(b"http/1.1 200"):
                sys.exit(f"Not a picture: {bytes(self.buffer[:500])!r}")
            self.wanted = end + 4 + int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        if self.wanted and len(self.buffer) >= self.wanted:
            self.latencies.append(time.perf_counter() - self.asked)
            self.ask()


async def load(port: int, seconds: float) -> list[float]:
    body = json.dumps(BODY).encode()
    head = f"POST /api/v1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    callers = [
        await loop.create_connection(lambda: Caller(request, latencies), "127.0.0.1", port) for _ in range(CONNECTIONS)
    ]
    await asyncio.sleep(seconds)
    for transport, _ in callers:
        transport.abort()
    return latencies


def measured(name: str, seconds: float, cores: set[int]) -> tuple[float, float, float]:
    """Requests a second, and the 50th and 99th percentile of their milliseconds, after a second of warming up."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--serve", name, "--port", str(port)]
    # A process group of its own, because LitServe starts more.
    process = subprocess.Popen(command, start_new_session=True)
    os.sched_setaffinity(process.pid, cores)  # and so its children's
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    sys.exit(f"{name} did not start.")
                time.sleep(0.1)
        time.sleep(2)
        uvloop.run(load(port, 1))
        latencies = sorted(uvloop.run(load(port, seconds)))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    count = len(latencies)
    return count / seconds, 1e3 * latencies[count // 2], 1e3 * latencies[count * 99 // 100]


SERVERS: dict[str, Callable[[int], None]] = {"ours": ours, "bare FastAPI": bare, "LitServe": lit}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=5)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--cores", type=int, default=1, help="the server's; the client has the others; 0: all, both")
    arguments.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    arguments.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.serve:
        return SERVERS[given.serve](given.port)
    cores = sorted(os.sched_getaffinity(0))
    if given.cores >= len(cores):
        sys.exit("No core would be left for the client.")
    of_server = set(cores[: given.cores] or cores)
    os.sched_setaffinity(0, set(cores) - of_server or of_server)
    rounds = [{name: measured(name, given.seconds, of_server) for name in SERVERS} for _ in range(given.rounds)]
    for name in SERVERS:
        rate, middle, late = (statistics.median(row[name][i] for row in rounds) for i in range(3))
        ratio = statistics.median(row["ours"][0] / row[name][0] for row in rounds)
        print(
            f"{name:13} {rate:7.0f} requests/s   p50 {middle:6.1f} ms   p99 {late:6.1f} ms   ours is {ratio:.2f} of it"
        )


if __name__ == "__main__":
    main()
