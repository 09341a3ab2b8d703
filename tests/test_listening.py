"""Connections on real sockets: a thousand at once, slow, silent and dead ones, and a server that is told to stop."""

import asyncio
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http.client import HTTPResponse
from multiprocessing.process import BaseProcess
from pathlib import Path

import busy_server
import httpx
import pytest
from conftest import HEADERS, KEY, SPARK, FakeEngine, body, drawn, wait_until
from fastapi import FastAPI
from PIL import Image

from fulgurite import APIError, Client, Picture, Request
from fulgurite.client import Step
from fulgurite.errors import FulguriteError
from fulgurite.ledger import Ledger
from fulgurite.server import body as request_body
from fulgurite.server import listen, listening, server_for, url_of

CONNECTIONS = 1000
HEAD = f"POST /api/v1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n".encode()

processes = multiprocessing.get_context("forkserver")
Start = Callable[..., tuple[int, BaseProcess]]


@pytest.fixture
def start(ledger: Ledger, tmp_path: Path) -> Iterator[Start]:
    """Starts a busy server on the test's ledger: its port and process."""
    started = []

    def start_one(step_seconds: float, shutdown_seconds: int = 5) -> tuple[int, BaseProcess]:
        hear, tell = processes.Pipe(duplex=False)
        arguments = f"sqlite:///{tmp_path / 'ledger.db'}", step_seconds, shutdown_seconds, tmp_path / "log", tell
        started.append(processes.Process(target=busy_server.serve, args=arguments, daemon=True))
        started[-1].start()
        tell.close()
        return hear.recv(), started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.join()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


def is_hung_up(connection: socket.socket) -> bool:
    """Waits, at most the socket's timeout."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def status_of_answer(connection: socket.socket) -> int:
    """Reads the whole answer."""
    with HTTPResponse(connection) as answer:
        answer.begin()
        answer.read()
        return answer.status


def port_of(address: str) -> int:
    return httpx.URL(address).port or 0


async def picture(port: int, seed: int, answers: Counter[str]) -> None:
    """Asks over one connection until there is a picture, coming back as it is told, though sooner."""
    content = json.dumps(body(seed=seed, num_steps=1)).encode()
    head = HEAD + f"Idempotency-Key: order-{seed}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        writer.write(head + content)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        said = dict(line.split(": ", 1) for line in lines[1:-2])
        answer = await reader.readexactly(int(said["content-length"]))
        status = lines[0].split()[1]
        answers[status] += 1
        if status == "200":
            assert said["x-fulgurite-seed"] == str(seed)
            assert answer.startswith(b"\x89PNG")
            break
        assert (status, json.loads(answer)["error"]["code"]) == ("503", "busy")
        assert int(said["retry-after"]) >= 1
        await asyncio.sleep(0.5)
    writer.close()


def peak_megabytes(process: BaseProcess) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def test_a_thousand_at_once_among_slow_and_dead_ones(start: Start, ledger: Ledger) -> None:
    """All get their picture, once; those past the queue's bound were told to come back; memory stays where it was."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    port, server = start(step_seconds=0.003)
    answers: Counter[str] = Counter()
    before = peak_megabytes(server)

    async def all_at_once() -> None:
        await asyncio.gather(*(picture(port, seed, answers) for seed in range(CONNECTIONS)))

    with ExitStack() as connections:
        for _ in range(100):
            connections.enter_context(connected(port))  # silent
            slow = connections.enter_context(connected(port))
            slow.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n{")
        asyncio.run(all_at_once())
    assert answers["200"] == CONNECTIONS
    assert answers["503"] > 0
    outcomes = Counter(entry.outcome for entry in ledger.entries())
    assert outcomes == {"done": CONNECTIONS, "refused": answers["503"]}
    assert {entry.seed for entry in ledger.entries() if entry.outcome == "done"} == set(range(CONNECTIONS))
    assert peak_megabytes(server) < before + 250


@pytest.mark.parametrize("sent", [b"", b"POST /api/v1 HT", HEAD])
def test_a_request_that_never_comes_is_not_waited_for(
    address: str, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.2)
    with connected(port_of(address)) as connection:
        connection.sendall(sent)
        assert is_hung_up(connection)
    assert httpx.post(address + "/api/v1", json=body(), headers=HEADERS).status_code == 200


def test_nor_a_second_request_that_never_ends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.2)
    with connected(port_of(address)) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b'{"state":"ready"}' in connection.recv(10_000)
        connection.sendall(b"GET /readyz HT")
        assert is_hung_up(connection)


ANSWERED = [  # requests, and what may come after their answer that begins no other
    pytest.param(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", id="an empty line"),
    pytest.param(b"POST /api/v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", b"x" * 9, id="a body unread"),
]


@pytest.mark.parametrize(("asked", "after"), ANSWERED)
def test_nor_a_second_request_that_never_begins(
    address: str, monkeypatch: pytest.MonkeyPatch, asked: bytes, after: bytes
) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.2)
    with connected(port_of(address)) as silent, connected(port_of(address)) as busy:
        for connection in (silent, busy):
            connection.sendall(asked)
            assert status_of_answer(connection) in (200, 401)
            connection.sendall(after[:1])
        with pytest.raises(ConnectionError):
            wait_until(lambda: busy.sendall(b"\r\n"))
        assert is_hung_up(silent)


@pytest.mark.parametrize(("asked", "after"), ANSWERED)
def test_but_one_that_begins_is_served(
    address: str, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, asked: bytes, after: bytes
) -> None:
    """Though its body comes slowly, and its picture takes long."""
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.5)
    engine.answer = lambda model, request: time.sleep(0.5) or drawn(model, request)
    content = json.dumps(body()).encode()
    with connected(port_of(address)) as connection:
        connection.sendall(asked)
        assert status_of_answer(connection) in (200, 401)
        connection.sendall(after)
        time.sleep(0.1)
        connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode())
        for part in (content[:1], content[1:]):
            time.sleep(0.3)
            connection.sendall(part)
        assert status_of_answer(connection) == 200


def test_a_body_that_never_ends(address: str, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.2)
    with connected(port_of(address)) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "body_too_slow"' in answer
        assert is_hung_up(connection)
    assert engine.jobs == []


def test_a_slow_picture_is_not_hung_up_on(address: str, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.1)
    engine.answer = lambda model, request: time.sleep(0.5) or drawn(model, request)
    assert httpx.post(address + "/api/v1", json=body(), headers=HEADERS).status_code == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "SILENT_SECONDS", 1)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a socket option of Linux")
@pytest.mark.usefixtures("impatient")
def test_who_does_not_read_the_answer_is_hung_up_on(request: pytest.FixtureRequest, engine: FakeEngine) -> None:
    def noise(model: str, asked: Request) -> Picture:
        size = asked.width, asked.height
        return Picture(Image.frombytes("RGB", size, os.urandom(3 * size[0] * size[1])), asked, model, 1, size, 0.1, ())

    engine.answer = noise
    address = request.getfixturevalue("address")
    content = json.dumps(body(width=2048, height=2048)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", port_of(address)))
        connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(3)
        with pytest.raises(ConnectionResetError):
            read_all(connection)


def read_all(connection: socket.socket) -> None:
    while connection.recv(1 << 20):
        pass


@pytest.mark.parametrize(
    ("host", "said"),
    [("127.0.0.1", "port [0-9]+: Address already in use.$"), ("no.such.host.invalid", "Cannot listen on no.*[a-z].$")],
)
def test_an_address_that_cannot_be_had(host: str, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(FulguriteError, match=said):
        listen(host, other.getsockname()[1])


def running(port: int) -> int:
    return httpx.get(f"http://127.0.0.1:{port}/healthz").json()["engine"]["running"]


def test_told_to_stop_it_finishes_what_runs(start: Start, ledger: Ledger) -> None:
    port, server = start(step_seconds=0.5, shutdown_seconds=20)
    url = f"http://127.0.0.1:{port}/api/v1"
    later = httpx.post(f"{url}/predictions", json=body(num_steps=4), headers=HEADERS | {"Prefer": "respond-async"})
    assert later.status_code == 202

    async def talk() -> httpx.Response:
        async with httpx.AsyncClient(timeout=20) as client:
            asked = asyncio.create_task(client.post(url, json=body(num_steps=4), headers=HEADERS))
            await asyncio.to_thread(wait_until, lambda: running(port) == 2)
            os.kill(server.pid or 0, signal.SIGTERM)
            await asyncio.to_thread(wait_until, lambda: refuses(port))
            return await asked

    assert asyncio.run(talk()).status_code == 200
    server.join(20)
    assert server.exitcode == -signal.SIGTERM  # uvicorn's way: raised again, at the end
    assert [entry.outcome for entry in ledger.entries()] == ["done", "done"]


def test_the_time_to_stop_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What requests have used of it the engine does not get again."""
    app = FastAPI()
    server = server_for(app, 30)
    now = 1000.0
    monkeypatch.setattr(listening.time, "monotonic", lambda: now)
    assert server.seconds_left() == 30
    monkeypatch.setattr(listening.uvicorn.Server, "shutdown", lambda *_: asyncio.sleep(0))
    asyncio.run(server.shutdown([]))
    now += 25
    assert server.seconds_left() == 5
    now += 25
    assert server.seconds_left() == 0
    assert app.state.stop_by == 1030


def test_a_system_without_bounds_of_files_listens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, which has no module ``resource``."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("listening_there", listening.__file__)
    assert spec
    assert spec.loader
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    with there.listen("127.0.0.1", 0) as listener:
        connected(listener.getsockname()[1]).close()


def refuses(port: int) -> bool:
    try:
        connected(port).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_ctrl_c_waits_for_no_picture(start: Start, ledger: Ledger, tmp_path: Path) -> None:
    """Who asked for it is told so."""
    port, server = start(step_seconds=1, shutdown_seconds=60)
    with connected(port) as connection:
        content = json.dumps(body(num_steps=20)).encode()
        connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: running(port))
        os.kill(server.pid or 0, signal.SIGINT)
        wait_until(lambda: refuses(port))
        os.kill(server.pid or 0, signal.SIGINT)
        assert status_of_answer(connection) == 503
    server.join(20)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [(entry.outcome, entry.price) for entry in ledger.entries()] == [("cancelled", 0)]


def test_the_address_told_is_a_url() -> None:
    assert url_of("::1", 8311) == "http://[::1]:8311"
    assert url_of("127.0.0.1", 8311) == "http://127.0.0.1:8311"


def test_what_does_not_end_in_time_is_stopped_and_costs_nothing(start: Start, ledger: Ledger, tmp_path: Path) -> None:
    port, server = start(step_seconds=2, shutdown_seconds=1)
    url = f"http://127.0.0.1:{port}/api/v1"
    for _ in range(2):
        httpx.post(f"{url}/predictions", json=body(), headers=HEADERS | {"Prefer": "respond-async"})
    with connected(port) as connection:
        content = json.dumps(body()).encode()
        connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(
            lambda: running(port) + httpx.get(f"http://127.0.0.1:{port}/healthz").json()["engine"]["queued"] == 3
        )
        os.kill(server.pid or 0, signal.SIGTERM)
        assert status_of_answer(connection) == 503
        server.join(20)
        assert server.exitcode is not None
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [(entry.outcome, entry.price) for entry in ledger.entries()] == [("cancelled", 0)] * 3


def cut_off(port: int, server: BaseProcess, signals: Sequence[int]) -> list[str]:
    """A stream's lines, of a server that is told to stop meanwhile."""
    url, asked = f"http://127.0.0.1:{port}/api/v1", body(num_steps=20) | {"stream": True}
    with httpx.stream("POST", url, json=asked, headers=HEADERS, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        wait_until(lambda: running(port))
        for number in signals:
            os.kill(server.pid or 0, number)
            wait_until(lambda: refuses(port))
        return list(answer.iter_lines())


@pytest.mark.parametrize(
    ("shutdown_seconds", "signals"),
    [(1, [signal.SIGTERM]), (60, [signal.SIGINT] * 2)],
    ids=["too late", "Ctrl-C twice"],
)
def test_a_stream_that_is_cut_off_says_why(
    start: Start, ledger: Ledger, tmp_path: Path, shutdown_seconds: int, signals: Sequence[int]
) -> None:
    port, server = start(step_seconds=0.5, shutdown_seconds=shutdown_seconds)
    lines = cut_off(port, server, signals)
    server.join(20)
    assert lines[-3] == "event: error"
    told = json.loads(lines[-2].removeprefix("data: "))
    assert (told["status"], told["error"]["code"], told["retry_after"]) == (503, "shutting_down", 10)
    assert len(told["request_id"]) == 32
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [(entry.outcome, entry.price) for entry in ledger.entries()] == [("cancelled", 0)]


def test_the_client_hears_that_a_stream_is_cut_off(start: Start) -> None:
    port, server = start(step_seconds=0.5, shutdown_seconds=1)
    with Client(f"http://127.0.0.1:{port}/api/v1", KEY, retries=0) as caller:

        def stop(step: Step) -> None:
            os.kill(server.pid or 0, signal.SIGTERM)

        with pytest.raises(APIError, match="shutting down") as cut:
            caller.draw("a red fox", model=SPARK, on_step=stop)
    assert (cut.value.status, cut.value.code) == (503, "shutting_down")
