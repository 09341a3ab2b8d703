"""What an operator sees: metrics, readiness, and one line of log for each request."""

import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest
from conftest import HEADERS, KEY, SPARK, Blank, FakeEngine, Loads, body, wait_until
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from fulgurite import Picture, Request
from fulgurite.engine import Engine, Runner, Stages
from fulgurite.errors import BusyError
from fulgurite.ledger import Ledger
from fulgurite.pipeline import Row
from fulgurite.records import Answer, Entry
from fulgurite.server import JSONLines, metrics


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """Every number on the page, by its name and its labels' values."""
    families = text_string_to_metric_families(client.get("/metrics", headers={"Authorization": ""}).text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_pictures_steps_money_and_errors_are_counted(client: TestClient, engine: FakeEngine) -> None:
    assert client.post("/api/v1", json=body(num_steps=5)).status_code == 200
    assert client.post("/api/v1", json=body(num_steps=3)).status_code == 200
    assert client.post("/api/v1", json=body(num_steps=99)).status_code == 422
    assert client.get("/somewhere/else").status_code == 404

    def busy(model: str, request: Request) -> Picture:
        raise BusyError("full", 1)

    engine.answer = busy
    assert client.post("/api/v1", json=body()).status_code == 503
    found = samples(client)
    assert found["fulgurite_pictures_total", SPARK, "done"] == 2
    assert found["fulgurite_pictures_total", SPARK, "refused"] == 1
    assert found["fulgurite_steps_total", SPARK] == 8
    usage = client.get("/api/v1/usage").json()["usage"]
    assert found["fulgurite_charged_microdollars_total", SPARK] == sum(row["price_microdollars"] for row in usage)
    assert found["fulgurite_requests_total", "POST", "/api/v1", "200"] == 2
    assert found["fulgurite_requests_total", "POST", "/api/v1", "422"] == 1
    assert found["fulgurite_requests_total", "GET", "other", "404"] == 1
    assert found["fulgurite_errors_total", "invalid_parameter"] == 1
    assert found["fulgurite_errors_total", "busy"] == 1
    assert found["fulgurite_picture_seconds_count", "computed"] == 2
    assert found["fulgurite_picture_seconds_sum", "computed"] == pytest.approx(0.2)
    assert found["fulgurite_picture_seconds_count", "encoded"] == 2
    assert found["fulgurite_engine_queued",] == 0


def test_what_the_ledger_refuses_is_counted_as_it_has_it(
    client: TestClient, ledger: Ledger, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_was_first(entry: Entry, answer: Answer | None = None) -> Future[Answer | None]:
        settle(replace(entry, request_id="another"), replace(answer, id="another", body_hash="") if answer else None)
        return settle(entry, answer)

    def credit_is_spent(entry: Entry, answer: Answer | None = None) -> Future[Answer | None]:
        with ledger._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE keys SET credit = 0")
        return settle(replace(entry, price=1), answer)

    settle = ledger.settle
    for happens, status in ((another_was_first, 409), (credit_is_spent, 402)):
        monkeypatch.setattr(ledger, "settle", happens)
        assert client.post("/api/v1", json=body(), headers={"Idempotency-Key": "once"}).status_code == status
        with ledger._engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM answers")
    found = samples(client)
    refused = [entry for entry in ledger.entries() if entry.outcome == "refused"]
    assert found["fulgurite_pictures_total", SPARK, "refused"] == len(refused) == 2
    assert ("fulgurite_pictures_total", SPARK, "done") not in found


def test_a_cluster_s_replicas_are_told(client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [name for name, *_ in samples(client) if "replicas" in name]
    numbers = engine.stats() | {"replicas": 7, "redrawn": 3}
    monkeypatch.setattr(engine, "stats", lambda: numbers)
    found = samples(client)
    assert (found["fulgurite_replicas",], found["fulgurite_redrawn_total",]) == (7, 3)


def test_a_replayed_answer_is_no_new_picture(client: TestClient) -> None:
    for _ in range(3):
        assert client.post("/api/v1", json=body(), headers={"Idempotency-Key": "once"}).status_code == 200
    found = samples(client)
    assert found["fulgurite_pictures_total", SPARK, "done"] == 1
    assert found["fulgurite_requests_total", "POST", "/api/v1", "200"] == 3


def test_readiness_is_the_engine_s(client: TestClient, engine: FakeEngine) -> None:
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (200, {"state": "ready"})
    engine.held = True
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (503, {"state": "busy"})


def test_a_server_whose_ledger_cannot_be_used_is_not_ready(
    client: TestClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the engine is; and once it can be used, the server is ready again, without a picture asked for."""
    monkeypatch.setattr(metrics, "CHECK_SECONDS", 0.0)
    with ledger._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO gone")
    for _ in range(3):
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"state": "ledger_unavailable"})
    assert caplog.text.count("not ready: The ledger cannot be used: no such table: keys.") == 1
    with ledger._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO keys")
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (200, {"state": "ready"})


def test_a_ledger_that_does_not_answer_is_not_waited_for(
    client: TestClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "CHECK_PATIENCE", 0.01)
    answers, begun = threading.Event(), []

    def hangs() -> None:
        begun.append(1)
        answers.wait(30)

    monkeypatch.setattr(ledger, "check", hangs)
    for _ in range(3):
        assert client.get("/readyz").json() == {"state": "ledger_unavailable"}
    assert len(begun) == 1
    answers.set()
    wait_until(lambda: client.get("/readyz").json() == {"state": "ready"})


def test_readiness_looks_at_the_ledger_rarely(
    client: TestClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHECK_SECONDS", 60.0)
    looked: list[int] = []
    monkeypatch.setattr(ledger, "check", lambda: looked.append(1))
    for _ in range(5):
        assert client.get("/readyz").status_code == 200
    assert len(looked) == 1


def test_an_engine_knows_its_state() -> None:
    loading, loaded, drawing, finish = (threading.Event() for _ in range(4))

    class Slow(Loads):
        def __call__(self, model: str, steps: int) -> Stages:
            loading.set()
            loaded.wait(30)
            return self.pipeline

    def draw(stage: str, rows: Sequence[Row]) -> None:
        if stage == "step":
            drawing.set()
            finish.wait(30)

    engine = Engine(lambda: Runner(Slow(Blank(draw))), queue_size=1)
    assert engine.state() == "ready"
    first = engine.submit(SPARK, Request("a red fox"))
    assert loading.wait(30)
    assert engine.state() == "starting"
    loaded.set()
    assert drawing.wait(30)
    assert engine.state() == "ready"
    second = engine.submit(SPARK, Request("a red fox"))
    assert engine.state() == "busy"
    finish.set()
    assert first.result(30)
    assert second.result(30)
    assert engine.state() == "ready"
    engine.close()
    assert engine.state() == "failed"


def test_each_request_is_one_line_without_secrets(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fulgurite"):
        answer = client.post("/api/v1?secret=hush", json=body(prompt="hush money"))
        client.post("/api/v1", json={}, headers=HEADERS)
    lines = [json.loads(JSONLines().format(record)) for record in caplog.records if record.name == "fulgurite"]
    assert len(lines) == 2
    assert lines[0]["request_id"] == answer.headers["X-Request-Id"]
    assert (lines[0]["method"], lines[0]["path"], lines[0]["status"]) == ("POST", "/api/v1", 200)
    assert lines[0]["model"] == SPARK
    assert lines[0]["key"]
    assert "code" not in lines[0]
    assert lines[1]["code"] == answer_code(client)
    assert KEY not in str(lines)
    assert "hush" not in str(lines)


def answer_code(client: TestClient) -> str:
    return client.post("/api/v1", json={}).json()["error"]["code"]
