"""Webhooks, sent to a real receiver."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from conftest import HEADERS, KEY, FakeEngine, body, drawn
from fastapi.testclient import TestClient

from fulgurite import Picture, Request
from fulgurite.errors import BusyError
from fulgurite.ledger import Ledger
from fulgurite.server import create_app, webhooks
from fulgurite.settings import read_settings


class Receiver(HTTPServer):
    """Answers with the statuses it is given, then with 204; keeps what it gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.endless, self.hung_up = False, threading.Event()  # an answer without end; and that nobody hears it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    def wait_for(self, count: int) -> list[tuple[dict[str, str], bytes]]:
        deadline = time.monotonic() + 20
        while len(self.got) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.got


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, content))
        endless = self.server.endless
        self.send_response(200 if endless else self.server.statuses.pop(0) if self.server.statuses else 204)
        self.send_header("Location", self.server.url)
        self.end_headers()
        while endless:
            try:
                self.wfile.write(b"x" * 100_000)
            except OSError:
                self.server.hung_up.set()
                break

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(webhooks, "DELAYS", (0.0, 0.01, 0.01, 0.01))
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(engine: FakeEngine, ledger: Ledger) -> Iterator[TestClient]:
    app = create_app(engine, ledger, read_settings(webhook_private=True))
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


def test_the_end_is_told_and_signed(client: TestClient, receiver: Receiver) -> None:
    made = client.post("/api/v1/predictions", json=body(seed=3) | {"webhook": receiver.url}).json()
    [(headers, content)] = receiver.wait_for(1)
    assert json.loads(content) == made
    assert headers["webhook-id"] == f"{made['id']}-succeeded"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    secret = client.get("/api/v1/webhook-secret").json()["secret"]
    assert secret.startswith("whsec_")
    words = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + content
    expected = hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), words, hashlib.sha256)
    assert headers["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
    assert KEY not in content.decode()


def test_a_failure_is_told_too(client: TestClient, engine: FakeEngine, receiver: Receiver) -> None:
    def busy(model: str, request: Request) -> Picture:
        raise BusyError("All places are taken.", 1)

    engine.answer = busy
    client.post("/api/v1/predictions", json=body() | {"webhook": receiver.url}, headers={"Prefer": "respond-async"})
    [(_, content)] = receiver.wait_for(1)
    assert (json.loads(content)["status"], json.loads(content)["error"]["code"]) == ("failed", "busy")


def test_who_joins_what_runs_is_told_too(client: TestClient, engine: FakeEngine, receiver: Receiver) -> None:
    """But nobody twice, however often a request was sent again."""
    engine.held = True
    for query in ("?first", "?second", "?second"):
        hook = {"webhook": receiver.url + query}
        put = client.put("/api/v1/predictions/my-own-id", json=body() | hook, headers={"Prefer": "respond-async"})
        assert put.status_code == 202
    while not engine.futures:
        time.sleep(0.01)
    engine.futures[0].set_result(drawn(*engine.jobs[0]))
    receiver.wait_for(2)
    time.sleep(0.2)
    assert len(receiver.wait_for(2)) == 2


def test_it_is_tried_again_with_the_same_id_and_redirects_are_not_followed(
    client: TestClient, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302, 429]
    client.post("/api/v1/predictions", json=body() | {"webhook": receiver.url})
    got = receiver.wait_for(4)
    assert len({headers["webhook-id"] for headers, _ in got}) == 1
    assert len({content for _, content in got}) == 1
    time.sleep(0.2)
    assert len(got) == 4


def test_giving_up_is_logged(client: TestClient, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [500] * 9
    asked = client.post("/api/v1/predictions", json=body() | {"webhook": receiver.url + "?token=hush"})
    receiver.wait_for(4)
    deadline = time.monotonic() + 20
    while "given up after 4 tries: answered 500" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    id = asked.json()["id"]
    for number in range(1, 5):
        assert caplog.text.count(f"webhook for {id}-succeeded: try {number} of 4 failed: answered 500") == 1
    assert not [record for record in caplog.records if record.name == "fulgurite" and "hush" in record.getMessage()]


def stopping(engine: FakeEngine, ledger: Ledger) -> TestClient:
    """A client of a server that stops where it is left."""
    app = create_app(engine, ledger, read_settings(webhook_private=True))
    return TestClient(app, headers=HEADERS | {"Prefer": "respond-async"})


def test_who_waits_is_told_before_a_server_stops(engine: FakeEngine, ledger: Ledger, receiver: Receiver) -> None:
    engine.held = True
    with stopping(engine, ledger) as client:
        client.put("/api/v1/predictions/my-own-id", json=body() | {"webhook": receiver.url})
        while not engine.futures:
            time.sleep(0.01)
        threading.Timer(0.2, engine.futures[0].set_result, [drawn(*engine.jobs[0])]).start()
    [(_, content)] = receiver.got
    assert json.loads(content)["status"] == "succeeded"


def test_and_so_is_that_it_stopped_first(engine: FakeEngine, ledger: Ledger, receiver: Receiver) -> None:
    engine.held = True
    with stopping(engine, ledger) as client:
        client.put("/api/v1/predictions/my-own-id", json=body() | {"webhook": receiver.url})
        client.app.state.stop_by = 0.0  # type: ignore[attr-defined]
    [(_, content)] = receiver.got
    assert (json.loads(content)["status"], json.loads(content)["error"]["code"]) == ("failed", "shutting_down")


def test_what_a_server_that_stops_cannot_deliver_is_logged(
    engine: FakeEngine,
    ledger: Ledger,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(webhooks, "DELAYS", (0.0, 60.0))
    monkeypatch.setattr(webhooks, "LAST_SECONDS", 0.1)
    receiver.statuses = [500]
    with stopping(engine, ledger) as client:
        client.put("/api/v1/predictions/my-own-id", json=body() | {"webhook": receiver.url})
        receiver.wait_for(1)
    assert "webhook for my-own-id not delivered: the server stopped first" in caplog.text


def test_what_is_made_already_is_not_told_again(client: TestClient, receiver: Receiver) -> None:
    for _ in range(3):
        client.put("/api/v1/predictions/my-own-id", json=body() | {"webhook": receiver.url})
    receiver.wait_for(1)
    time.sleep(0.2)
    assert len(receiver.got) == 1


def test_the_request_goes_to_the_address_that_was_looked_at() -> None:
    """A name may lead elsewhere by then; the receiver is asked for by it all the same."""
    for address, shown in (("93.184.216.34", "93.184.216.34"), ("2606:2800:220:1::1", "[2606:2800:220:1::1]")):
        request = httpx.Request("POST", "https://example.com:8443/hook?a=1", content=b"x")
        webhooks.pin(request, address)
        assert str(request.url) == f"https://{shown}:8443/hook?a=1"
        assert request.headers["Host"] == "example.com:8443"
        assert request.extensions["sni_hostname"] == "example.com"


def test_an_answer_without_end_is_not_read(client: TestClient, receiver: Receiver) -> None:
    """Its head says that it has arrived."""
    receiver.endless = True
    client.post("/api/v1/predictions", json=body() | {"webhook": receiver.url})
    receiver.wait_for(1)
    assert receiver.hung_up.wait(5)
    assert len(receiver.got) == 1


def test_a_secret_that_is_empty_signs_nothing(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    file = read_settings().home / "webhook.secret"
    client.get("/api/v1/webhook-secret")
    assert len(file.read_bytes()) == 64
    assert [path.name for path in file.parent.glob("*") if path.name.startswith("tmp")] == []
    file.write_bytes(b"")
    answer = client.get("/api/v1/webhook-secret")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "webhook_secret_unusable")
    assert f"{file} is empty: delete it, to have another secret made." in caplog.text
    assert str(file) not in answer.text


@pytest.mark.parametrize("unreadable", [False, True], ids=["empty", "unreadable"])
def test_what_cannot_be_signed_is_not_sent_and_logged(
    client: TestClient, receiver: Receiver, caplog: pytest.LogCaptureFixture, unreadable: bool
) -> None:
    file = read_settings().home / "webhook.secret"
    if unreadable:
        file.mkdir(parents=True)  # which stops root too
    else:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    client.post("/api/v1/predictions", json=body() | {"webhook": receiver.url})
    deadline = time.monotonic() + 20
    while "given up after 4 tries: " not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert str(file) in caplog.text
    assert receiver.got == []


def test_each_key_and_each_server_has_its_own_secret(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    def secret(client: TestClient, headers: dict[str, str] = HEADERS) -> str:
        return client.get("/api/v1/webhook-secret", headers=headers).json()["secret"]

    _, other = ledger.keys.create("another")
    found = {secret(client), secret(client), secret(client, {"Authorization": f"Bearer {other}"})}
    with TestClient(create_app(engine, ledger, read_settings()), headers=HEADERS) as restarted:
        assert secret(restarted) == secret(client)
    with TestClient(create_app(engine, ledger, read_settings(webhook_secret="x" * 16)), headers=HEADERS) as elsewhere:
        found.add(secret(elsewhere))
    assert len(found) == 3


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com?token=1",
        "https://example.com#part",
        "HTTPS://example.com/",
        "http://my_app:5000/hook",
        "Http://_app/?a@b",
    ],
)
def test_urls_that_there_are(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nowhere(*_: object) -> list[str]:
        return []

    monkeypatch.setattr(webhooks.Webhooks, "_addresses", nowhere)
    asyncio.run(webhooks.Webhooks(read_settings()).check(url))
    webhooks.pin(httpx.Request("POST", url), "93.184.216.34")


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answers.wait(20) and [])
    monkeypatch.setattr(webhooks, "LOOKUP_SECONDS", 0.05)

    async def checked() -> None:
        waiting = webhooks.Webhooks(read_settings())
        await asyncio.gather(*(waiting.check("https://silent.example/") for _ in range(9)))
        answers.set()
        await waiting.close()

    asyncio.run(checked())


@pytest.mark.parametrize("url", ["https://ann:hush@example.com/", "http://ann@example.com", "http://a:@my_app:5000/"])
def test_a_user_in_a_url_is_refused_with_the_reason(client: TestClient, url: str) -> None:
    answer = client.post("/api/v1/predictions", json=body() | {"webhook": url})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "webhook")
    assert answer.json()["error"]["message"].startswith("webhook: leave the user and password out")
    assert "hush" not in answer.text


@pytest.mark.parametrize(
    ("url", "status"),
    [
        *[
            (url, 422)
            for url in ("ftp://example.com/", "http:///nowhere", "http://[bad/", "http://host:99999/", "hook")
        ],
        *[(f"http://{host}/", 403) for host in ("127.0.0.1", "localhost:80", "169.254.169.254", "10.0.0.1", "0x7f.1")],
    ],
)
def test_where_it_may_not_go(engine: FakeEngine, ledger: Ledger, url: str, status: int) -> None:
    with TestClient(create_app(engine, ledger, read_settings()), headers=HEADERS) as client:
        answer = client.post("/api/v1/predictions", json=body() | {"webhook": url})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, "webhook")
    assert not engine.jobs


def test_a_picture_has_no_webhook(client: TestClient) -> None:
    assert client.post("/api/v1", json=body() | {"webhook": "https://example.com"}).status_code == 422
