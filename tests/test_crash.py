"""The server is killed at any moment, and the books are right all the same."""

import io
import multiprocessing
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import crash_server
import httpx
import pytest
from conftest import LIGHTNING, body
from PIL import Image

from fulgurite.ledger import Ledger
from fulgurite.records import Limits

PRICE = 1100
ROUNDS = 12  # kills
CLIENTS = 6
CREDIT = 10**9

# Children of a process that has imported what takes long start in a moment.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["fulgurite.pipeline", "fulgurite.server", "fulgurite.ledger", "fastapi.testclient", "psycopg", "pytest", "uvicorn"]
)

Start = Callable[..., multiprocessing.process.BaseProcess]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Outlives the servers that answer on it: who connects between two of them waits for the next."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener


@pytest.fixture
def start(database_url: str, listener: socket.socket) -> Iterator[Start]:
    started = []

    def start_one(dies: crash_server.Dies = "never") -> multiprocessing.process.BaseProcess:
        started.append(processes.Process(target=crash_server.serve, args=(database_url, listener, dies), daemon=True))
        started[-1].start()
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def books(database_url: str) -> Iterator[Ledger]:
    books = Ledger(database_url)
    yield books
    books.close()


def picture_request(seed: int) -> dict[str, object]:
    return body(seed=seed) | {"model": LIGHTNING}


@dataclass
class Load:
    """Clients that never stop asking: half of them retry with an idempotency key until they have their picture."""

    url: str
    secret: str
    seeds: Iterator[int]
    stop: threading.Event = field(default_factory=threading.Event)
    delivered: Counter[int] = field(default_factory=Counter)  # by seed
    unfinished: set[int] = field(default_factory=set)

    def client(self, patient: bool) -> None:
        with httpx.Client(headers={"Authorization": f"Bearer {self.secret}"}, timeout=20) as client:
            while not self.stop.is_set():
                seed = next(self.seeds)
                headers = {"Idempotency-Key": f"order-{seed}"} if patient else {}
                if patient:
                    self.unfinished.add(seed)
                while not self.ask(client, seed, headers) and patient and not self.stop.is_set():
                    pass

    def ask(self, client: httpx.Client, seed: int, headers: dict[str, str]) -> bool:
        """Whether that ended in an answer; one that a crash cut off is none."""
        try:
            response = client.post(self.url, json=picture_request(seed), headers=headers)
        except httpx.TransportError:
            return False
        self.unfinished.discard(seed)
        if response.status_code == 200:
            with Image.open(io.BytesIO(response.content)) as picture:
                picture.load()
                assert f"Seed: {seed}," in picture.info["parameters"]
            self.delivered[seed] += 1
        else:
            assert (response.status_code, seed % 7) == (500, 0), response.text
        return True


def test_killed_at_random_moments_under_load(start: Start, listener: socket.socket, books: Ledger) -> None:
    key, secret = books.keys.create("a customer", Limits(credit=CREDIT))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1"
    load = Load(url, secret, iter(range(1, 10**9)))
    clients = [threading.Thread(target=load.client, args=(i % 2 == 0,)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for _ in range(ROUNDS):
        before, server = load.delivered.total(), start()
        while load.delivered.total() < before + 5 and server.is_alive():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        server.kill()
        server.join()
    load.stop.set()
    start()
    for client in clients:
        client.join()
    with httpx.Client(headers={"Authorization": f"Bearer {secret}"}, timeout=20) as client:
        for seed in list(load.unfinished):
            assert load.ask(client, seed, {"Idempotency-Key": f"order-{seed}"})

    entries = books.entries(key.id)
    billed = Counter(entry.seed for entry in entries if entry.price)
    assert load.delivered.total() > ROUNDS
    assert not load.unfinished
    assert set(load.delivered) <= set(billed)  # what was delivered is billed,
    assert set(billed.values()) == {1}  # once,
    assert all(entry.outcome == "done" and entry.price == PRICE for entry in entries if entry.price)
    assert not any(seed % 7 == 0 for seed in billed)  # and what made no picture is not.
    [key] = [known for known in books.keys.all() if known.id == key.id]
    assert key.spent == sum(entry.price for entry in entries)


def test_a_picture_cut_off_on_its_way_out_is_given_to_the_retry(
    start: Start, listener: socket.socket, books: Ledger
) -> None:
    key, secret = books.keys.create("a customer")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1"
    headers = {"Authorization": f"Bearer {secret}", "Idempotency-Key": "order"}

    def ask() -> httpx.Response:
        return httpx.post(url, json=picture_request(1), headers=headers, timeout=20)

    for dies, billed in (("before settling", 0), ("after settling", PRICE)):
        server = start(dies)
        with pytest.raises(httpx.TransportError):
            ask()
        server.join()
        assert sum(entry.price for entry in books.entries(key.id)) == billed
    start()
    answers = [ask(), ask()]
    assert [response.status_code for response in answers] == [200, 200]
    assert all(response.headers["idempotent-replayed"] == "true" for response in answers)
    [entry] = books.entries(key.id)
    assert entry.price == PRICE
    assert {response.headers["x-fulgurite-id"] for response in answers} == {entry.request_id}
