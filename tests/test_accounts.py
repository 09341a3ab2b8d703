"""Keys, limits, idempotency keys and usage through the server, and on the command line."""

import asyncio
import csv
import io
import logging
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import HEADERS, LIGHTNING, SPARK, FakeEngine, body, drawn
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from fulgurite import Picture, Request, cards
from fulgurite.cli import app as command_line
from fulgurite.cli_ledger import micro_dollars
from fulgurite.errors import FulguriteError, RequestError
from fulgurite.ledger import Ledger, open_ledger
from fulgurite.records import Entry, Limits, dollars, now
from fulgurite.server import create_app
from fulgurite.server.limits import Meters
from fulgurite.server.problems import Problem
from fulgurite.settings import read_settings
from fulgurite.training.students import write_card

PRICE = 1100  # SDXL-Lightning's
MADE: dict[str, Any] = body() | {"model": LIGHTNING}


def with_key(ledger: Ledger, **limits: Any) -> tuple[str, dict[str, str]]:
    """A new key's id, and the header that carries it."""
    key, secret = ledger.keys.create("a customer", Limits(**limits))
    return key.id, {"Authorization": f"Bearer {secret}"}


def spent(ledger: Ledger, key_id: str) -> int:
    [key] = [key for key in ledger.keys.all() if key.id == key_id]
    assert key.spent == sum(entry.price for entry in ledger.entries(key_id))
    return key.spent


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_a_picture_is_billed_as_its_card_says(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    key_id, headers = with_key(ledger)
    response = client.post("/api/v1", json=MADE | {"data": {"prompt": "fox", "seed": 2**64 - 1}}, headers=headers)
    assert response.headers["x-fulgurite-price"] == "0.0011"
    assert spent(ledger, key_id) == PRICE
    [entry] = ledger.entries(key_id)
    wanted = Entry(
        response.headers["x-request-id"], key_id, entry.at, LIGHTNING, 20, 20, 1024, 1024, 2**64 - 1,
        entry.seconds_queued, 0.1, PRICE, "done",
    )  # fmt: skip
    assert entry == wanted
    assert abs(now() - entry.at) < timedelta(minutes=5)
    assert client.post("/api/v1", json=body(), headers=headers).headers["x-fulgurite-price"] == "0"
    assert spent(ledger, key_id) == PRICE


def test_what_made_no_picture_costs_nothing(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    key_id, headers = with_key(ledger)
    for error, outcome in ((ZeroDivisionError("bug"), "failed"), (RequestError("not so", "seed"), "refused")):

        def answer(model: str, request: Request, error: Exception = error) -> Picture:
            raise error

        engine.answer = answer
        response = client.post("/api/v1", json=MADE, headers=headers)
        assert response.status_code in (422, 500)
        assert ledger.entries(key_id)[-1].outcome == outcome
    client.post("/api/v1", json={"model": LIGHTNING, "data": {}}, headers=headers)  # never became work
    assert [entry.outcome for entry in ledger.entries(key_id)] == ["failed", "refused"]
    assert spent(ledger, key_id) == 0


def test_a_picture_that_cannot_be_encoded_is_a_failure(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    engine.answer = lambda model, request: Picture(Image.new("RGB", (0, 0)), request, model, 1, (0, 0), 0.1, ())
    assert client.post("/api/v1", json=MADE).status_code == 500
    assert [(entry.outcome, entry.price) for entry in ledger.entries()] == [("failed", 0)]


def test_credit(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    key_id, headers = with_key(ledger, credit=3 * PRICE - 1)
    assert [client.post("/api/v1", json=MADE, headers=headers).status_code for _ in range(4)] == [200, 200, 402, 402]
    assert code(client.post("/api/v1", json=MADE, headers=headers)) == (402, "credit_spent")
    assert len(engine.jobs) == 2  # no work is begun that the credit does not cover
    assert client.post("/api/v1", json=body(), headers=headers).status_code == 200  # free
    assert spent(ledger, key_id) == 2 * PRICE


def test_credit_is_reserved_while_pictures_are_made(engine: FakeEngine, ledger: Ledger) -> None:
    """Ten at once, credit for three: three are begun, whatever the order in which they end."""
    key_id, headers = with_key(ledger, credit=3 * PRICE)
    engine.held = True
    app = create_app(engine, ledger, read_settings())

    async def talk() -> list[int]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers=headers
        ) as client:
            waiting = [asyncio.create_task(client.post("/api/v1", json=MADE)) for _ in range(10)]
            while sum(task.done() for task in waiting) < 7:
                await asyncio.sleep(0.001)
            for job, future in zip(engine.jobs, engine.futures, strict=True):
                future.set_result(drawn(*job))
            return sorted(response.status_code for response in await asyncio.gather(*waiting))

    assert asyncio.run(talk()) == [200] * 3 + [402] * 7
    assert spent(ledger, key_id) == 3 * PRICE


def test_pictures_in_flight(engine: FakeEngine, ledger: Ledger) -> None:
    _, headers = with_key(ledger, pictures_in_flight=2)
    engine.held = True
    app = create_app(engine, ledger, read_settings())

    async def talk() -> tuple[httpx.Response, list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers=headers
        ) as client:
            waiting = [asyncio.create_task(client.post("/api/v1", json=MADE)) for _ in range(2)]
            while len(engine.futures) < 2:
                await asyncio.sleep(0.001)
            refused = await client.post("/api/v1", json=MADE)
            for job, future in zip(engine.jobs, engine.futures, strict=True):
                future.set_result(drawn(*job))
            engine.held = False
            return refused, await asyncio.gather(*waiting), await client.post("/api/v1", json=MADE)

    refused, made, afterwards = asyncio.run(talk())
    assert code(refused) == (429, "too_many_pictures")
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-ratelimit-remaining-pictures"] == "0"
    assert [response.status_code for response in [*made, afterwards]] == [200] * 3
    assert afterwards.headers["x-ratelimit-limit-pictures"] == "2"


def test_requests_per_minute(client: TestClient, ledger: Ledger) -> None:
    _, headers = with_key(ledger, requests_per_minute=2)
    answers = [client.post("/api/v1", json=body(), headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert all(answer.headers["x-ratelimit-limit-requests"] == "2" for answer in answers)
    assert code(answers[2]) == (429, "rate_limited")
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].headers["x-ratelimit-reset-requests"].endswith("s")
    assert client.post("/api/v1", json=body()).status_code == 200  # another key


def test_requests_grow_back_evenly(monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> None:
    clock = 100.0
    monkeypatch.setattr("fulgurite.server.limits.time.monotonic", lambda: clock)
    key, _ = ledger.keys.create("a", Limits(requests_per_minute=6))
    meters = Meters()
    taken, waits = [], []
    for _ in range(300):  # a request a second for five minutes
        try:
            meters.count_request(key)
            taken.append(clock)
        except Problem as problem:
            waits.append(int((problem.headers or {})["Retry-After"]))
        clock += 1
    assert set(waits) <= set(range(1, 11))
    assert 6 + 29 <= len(taken) <= 6 + 30  # what was full at first, and one every ten seconds
    clock += 3600
    assert meters.count_request(key)["X-RateLimit-Remaining-Requests"] == "5"  # never more than a minute's


def test_a_key_may_be_for_some_models_only(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    _, headers = with_key(ledger, models=(SPARK,))
    response = client.post("/api/v1", json=MADE, headers=headers)
    assert code(response) == (403, "model_not_allowed")
    assert "It may use: fulgurite/spark." in response.json()["error"]["message"]
    assert client.post("/api/v1", json=body(), headers=headers).status_code == 200
    assert len(engine.jobs) == 1


def test_expired_and_revoked_keys(client: TestClient, ledger: Ledger) -> None:
    _, headers = with_key(ledger, expires_at=now() - timedelta(seconds=1))
    response = client.post("/api/v1", json=body(), headers=headers)
    assert code(response) == (401, "unauthorized")
    assert "expired" in response.json()["error"]["message"]
    key_id, headers = with_key(ledger)
    assert client.post("/api/v1", json=body(), headers=headers).status_code == 200
    ledger.keys.revoke(key_id)
    assert "revoked" in client.post("/api/v1", json=body(), headers=headers).json()["error"]["message"]


def test_a_retry_gets_the_first_answer_and_is_not_billed(
    client: TestClient, ledger: Ledger, engine: FakeEngine
) -> None:
    key_id, headers = with_key(ledger)
    headers |= {"Idempotency-Key": "order-1"}
    first, again = (client.post("/api/v1", json=MADE, headers=headers) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert first.headers["x-fulgurite-seed"] == again.headers["x-fulgurite-seed"]  # a random one
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert first.headers["x-fulgurite-id"] == again.headers["x-fulgurite-id"] == first.headers["x-request-id"]
    assert len(engine.jobs) == 1
    assert spent(ledger, key_id) == PRICE
    for other in (MADE | {"output_format": "jpeg"}, MADE | {"data": MADE["data"] | {"seed": 1}}):
        assert code(client.post("/api/v1", json=other, headers=headers)) == (409, "idempotency_key_reused")
    reordered = dict(reversed(MADE.items()))
    assert client.post("/api/v1", json=reordered, headers=headers).content == first.content
    # The same words from another customer are another order.
    assert (
        "idempotent-replayed"
        not in client.post("/api/v1", json=MADE, headers=HEADERS | {"Idempotency-Key": "order-1"}).headers
    )


def test_what_failed_may_be_tried_again_under_its_key(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    key_id, headers = with_key(ledger)
    headers |= {"Idempotency-Key": "order-1"}

    def failing(model: str, request: Request) -> Picture:
        raise RuntimeError

    working, engine.answer = engine.answer, failing
    assert client.post("/api/v1", json=MADE, headers=headers).status_code == 500
    engine.answer = working
    assert client.post("/api/v1", json=MADE, headers=headers).status_code == 200
    assert spent(ledger, key_id) == PRICE


@pytest.mark.parametrize("given", ["", "two words", "x" * 256, "\xff"])
def test_idempotency_keys_that_cannot_be(client: TestClient, engine: FakeEngine, given: str) -> None:
    response = client.post("/api/v1", json=body(), headers={"Idempotency-Key": given.encode("latin-1")})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "Idempotency-Key"
    assert engine.jobs == []


def test_two_at_once_make_one_picture(engine: FakeEngine, ledger: Ledger) -> None:
    """Five clients with one idempotency key, and one with another body; two go away, and the work goes on."""
    key_id, headers = with_key(ledger)
    headers |= {"Idempotency-Key": "order-1"}
    engine.held = True
    app = create_app(engine, ledger, read_settings())

    async def talk() -> tuple[list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers=headers
        ) as client:
            waiting = [asyncio.create_task(client.post("/api/v1", json=MADE)) for _ in range(5)]
            while not engine.futures:
                await asyncio.sleep(0.001)
            other = await client.post("/api/v1", json=body())
            for task in waiting[:2]:
                task.cancel()
            await asyncio.sleep(0.01)
            engine.futures[0].set_result(drawn(*engine.jobs[0]))
            return await asyncio.gather(*waiting[2:]), other

    made, other = asyncio.run(talk())
    assert code(other) == (409, "idempotency_key_reused")
    assert [response.status_code for response in made] == [200] * 3
    assert len({response.content for response in made}) == len(engine.jobs) == 1
    assert spent(ledger, key_id) == PRICE


@pytest.mark.parametrize("drawn_already", [False, True])
def test_a_client_that_goes_away_pays_nothing(engine: FakeEngine, ledger: Ledger, drawn_already: bool) -> None:
    key_id, headers = with_key(ledger)
    engine.held = True
    app = create_app(engine, ledger, read_settings())

    async def talk() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers) as client,
        ):
            waiting = asyncio.create_task(client.post("/api/v1", json=MADE))
            while not engine.futures:
                await asyncio.sleep(0.001)
            if drawn_already:  # and not yet encoded when the client goes
                engine.futures[0].set_result(drawn(*engine.jobs[0]))
            waiting.cancel()

    asyncio.run(talk())
    assert [entry.outcome for entry in ledger.entries(key_id)] == ["cancelled"]
    assert spent(ledger, key_id) == 0


def test_nothing_is_delivered_that_cannot_be_billed(client: TestClient, ledger: Ledger, engine: FakeEngine) -> None:
    """The disk fills up: the picture stays here, and so does the money; afterwards all is well again."""
    key_id, headers = with_key(ledger)
    client.post("/api/v1", json=MADE, headers=headers)
    with sqlite3.connect(ledger._engine.url.database) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    response = client.post("/api/v1", json=MADE, headers=headers)
    assert code(response) == (503, "ledger_unavailable")
    assert "disk" not in response.text
    with sqlite3.connect(ledger._engine.url.database) as database:
        database.execute("DROP TRIGGER full")
    assert spent(ledger, key_id) == PRICE
    assert client.post("/api/v1", json=MADE, headers=headers).status_code == 200
    assert spent(ledger, key_id) == 2 * PRICE


def test_usage(client: TestClient, ledger: Ledger) -> None:
    (mine, headers), (_, other) = with_key(ledger), with_key(ledger)
    _, secret = ledger.keys.create("the operator", admin=True)
    admin = {"Authorization": f"Bearer {secret}"}
    for sent in (headers, headers, other):
        client.post("/api/v1", json=MADE, headers=sent)
    row = {"day": f"{now():%Y-%m-%d}", "model": LIGHTNING, "key": mine, "pictures": 2, "not_made": 0, "steps": 40}
    row["price_microdollars"] = 2 * PRICE
    assert client.get("/api/v1/usage", headers=headers).json() == {"usage": [row]}
    assert client.get("/api/v1/usage", headers=headers, params={"key": mine}).json() == {"usage": [row]}
    assert code(client.get("/api/v1/usage", headers=headers, params={"key": "another"})) == (403, "not_an_admin")
    assert len(client.get("/api/v1/usage", headers=admin).json()["usage"]) == 2
    assert client.get("/api/v1/usage", headers=admin, params={"key": mine}).json() == {"usage": [row]}
    assert client.get("/api/v1/usage", headers=admin, params={"until": "2020-01-01"}).json() == {"usage": []}
    for day in ("0001-01-01", "9999-12-31"):
        assert client.get("/api/v1/usage", headers=admin, params={"since": day, "until": day}).status_code == 200
    wrong = client.get("/api/v1/usage", headers=admin, params={"since": "yesterday"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "since")
    assert client.get("/api/v1/usage", headers={"Authorization": ""}).status_code == 401
    for days, message in (
        ({"since": "2026-02-02", "until": "2026-02-01"}, "since: 2026-02-02 is after the last day, 2026-02-01."),
        ({"since": "9999-12-31"}, f"since: 9999-12-31 is after the last day, {now():%Y-%m-%d}."),
    ):
        wrong = client.get("/api/v1/usage", headers=admin, params=days)
        assert (code(wrong), wrong.json()["error"]["param"]) == ((422, "invalid_parameter"), "since")
        assert wrong.json()["error"]["message"] == message
    wrong = client.get("/api/v1/usage", headers=admin, params={"key": "\0"})
    assert (code(wrong), wrong.json()["error"]["param"]) == ((422, "invalid_parameter"), "key")
    wrong = client.get("/api/v1/usage", headers=admin, params={"form": "2026-02-01"})
    assert (code(wrong), wrong.json()["error"]["param"]) == ((422, "invalid_parameter"), "form")
    assert wrong.json()["error"]["message"] == "There is no parameter 'form'. It would be ignored, so it is refused."


def test_the_admin_api(client: TestClient, ledger: Ledger) -> None:
    _, secret = ledger.keys.create("the operator", admin=True)
    keys, admin = "/api/v1/admin/keys", {"Authorization": f"Bearer {secret}"}
    new = {
        "name": "Zoë",
        "models": [SPARK],
        "requests_per_minute": 9,
        "credit_microdollars": 5,
        "pictures_in_flight": 1,
    }
    made = client.post(keys, json=new | {"expires_at": "2126-01-01T00:00:00Z"}, headers=admin)
    assert made.status_code == 201
    key = made.json()
    assert new.items() <= key.items()
    assert (key["state"], key["spent_microdollars"], key["admin"]) == ("active", 0, False)
    with_it = {"Authorization": f"Bearer {key['secret']}"}
    assert client.post("/api/v1", json=body(), headers=with_it).status_code == 200
    rotated = client.post(f"{keys}/{key['id']}/rotate", headers=admin).json()
    assert client.post("/api/v1", json=body(), headers=with_it).status_code == 401
    with_it = {"Authorization": f"Bearer {rotated['secret']}"}
    assert client.post("/api/v1", json=body(), headers=with_it).status_code == 200
    assert client.delete(f"{keys}/{key['id']}", headers=admin).json()["state"] == "revoked"
    assert client.post("/api/v1", json=body(), headers=with_it).status_code == 401
    assert code(client.delete(f"{keys}/{key['id']}", headers=admin)) == (404, "unknown_key")
    for answer in (client.delete(f"{keys}/%00", headers=admin), client.post(f"{keys}/%00/rotate", headers=admin)):
        assert code(answer) == (422, "invalid_parameter")  # PostgreSQL would fail at it
    listed = client.get(keys, headers=admin)
    assert [shown["state"] for shown in listed.json()["keys"]] == ["active", "active", "revoked"]
    assert "secret" not in listed.text
    for method, path in (("GET", keys), ("POST", keys), ("DELETE", f"{keys}/x"), ("POST", f"{keys}/x/rotate")):
        assert code(client.request(method, path, json=new)) == (403, "not_an_admin")
    assert code(client.post(keys, json=new | {"models": ["acme/nope"]}, headers=admin)) == (404, "unknown_model")
    json_type = {"Content-Type": "application/json"}
    assert code(client.post(keys, content=b"x", headers=admin | json_type)) == (400, "invalid_json")
    wrong = ({}, {"name": ""}, {"name": "x", "credit": 5}, {"name": "x", "requests_per_minute": 0})
    for each in (*wrong, {"name": "x", "expires_at": "9999-12-31T23:59:59-05:00"}):
        assert client.post(keys, json=each, headers=admin).status_code == 422
    past = client.post(keys, json={"name": "x", "expires_at": "2020-01-01T00:00:00Z"}, headers=admin)
    assert (code(past), past.json()["error"]["param"]) == ((422, "invalid_parameter"), "expires_at")
    assert past.json()["error"]["message"] == "expires_at: that is past: the key would have expired already."


def test_of_a_new_key_nothing_is_converted(client: TestClient, ledger: Ledger) -> None:
    _, secret = ledger.keys.create("the operator", admin=True)
    admin = {"Authorization": f"Bearer {secret}"}

    def made(**given: Any) -> httpx.Response:
        return client.post("/api/v1/admin/keys", json={"name": "Zoë"} | given, headers=admin)

    converted = [
        {"admin": "yes"},
        {"admin": 1},
        {"requests_per_minute": "5"},
        {"pictures_in_flight": 5.0},
        {"credit_microdollars": True},
        {"expires_at": 4922899200},
        {"expires_at": "2126-01-01T00:00:00"},
    ]
    for each in converted:
        refused = made(**each)
        assert (code(refused), refused.json()["error"]["param"]) == ((422, "invalid_parameter"), *each)
    for moment in ("2126-01-01T00:00:00Z", "2126-01-01T01:00:00+01:00", "2126-01-01T00:00:00.000Z"):
        key = made(expires_at=moment, models=[SPARK], admin=True).json()
        assert datetime.fromisoformat(key["expires_at"]) == datetime(2126, 1, 1, tzinfo=UTC)
        assert (key["models"], key["admin"]) == ([SPARK], True)
    assert made(expires_at=None, models=None).status_code == 201


def test_a_stranger_is_refused_before_a_byte_of_the_body_is_read(client: TestClient) -> None:
    read: list[bytes] = []

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            read.append(b" " * (1 << 20))
            yield read[-1]

    json_type = {"Content-Type": "application/json", "Authorization": "Bearer nobody"}
    assert client.post("/api/v1/admin/keys", content=endless(), headers=json_type).status_code == 401
    assert len(read) <= 1  # which the test's client itself has at hand
    assert client.post("/api/v1/admin/keys", content=b"[" * 10, headers=json_type).status_code == 401


def test_secrets_are_never_logged(
    client: TestClient, ledger: Ledger, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _, headers = with_key(ledger)
    secret = headers["Authorization"].removeprefix("Bearer ")

    def failing(model: str, request: Request) -> Picture:
        raise RuntimeError("a bug")

    engine.answer = failing
    responses = [client.post("/api/v1", json=MADE, headers=headers), client.get(f"/{secret}", headers=headers)]
    assert "a bug" in caplog.text
    assert secret not in "".join(response.text for response in responses)
    assert not [record for record in caplog.records if secret in record.getMessage() and "httpx" not in record.name]


def test_a_ledger_that_fails_is_a_503_that_costs_nothing(
    client: TestClient, ledger: Ledger, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE entries")
    for response in (client.post("/api/v1", json=MADE), client.get("/api/v1/usage")):
        assert code(response) == (503, "ledger_unavailable")
        assert response.headers["retry-after"]
        assert "entries" not in response.text
    assert "no such table: entries" in caplog.text
    assert [key.spent for key in ledger.keys.all()] == [0]


def command(*arguments: str) -> Any:
    result = CliRunner().invoke(command_line, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_keys_on_the_command_line() -> None:
    made = command(
        "keys", "create", "Zoë", "--model", SPARK, "--rpm", "60", "--pictures", "2", "--credit", "5.0000011",
        "--expires", "2126-01-01", "--admin",
    )  # fmt: skip
    assert made.exit_code == 1
    assert "to the millionth" in made.stderr
    made = command("keys", "create", "Zoë", "--rpm", "60", "--credit", "5.000001", "--expires", "2126-01-01")
    secret = made.stdout.strip()
    books = open_ledger(read_settings())
    key = books.keys.find(secret)
    assert key
    assert (key.limits.requests_per_minute, key.limits.credit) == (60, 5_000_001)
    listed = command("keys", "list").stdout
    assert key.id in listed
    assert "Zoë" in listed
    assert secret not in listed
    rotated = command("keys", "rotate", key.id)
    assert books.keys.find(secret) is None
    assert books.keys.find(rotated.stdout.strip())
    assert "revoked" in command("keys", "revoke", key.id).stderr
    assert books.keys.find(rotated.stdout.strip()).state() == "revoked"
    books.close()
    for change in ("revoke", "rotate"):
        assert f"The key '{key.id}' is revoked, for good." in command("keys", change, key.id).stderr
        assert "There is no key 'key_x'." in command("keys", change, "key_x").stderr
    assert "There is no model 'acme/nope'" in command("keys", "create", "x", "--model", "acme/nope").stderr


def test_the_list_says_what_each_key_may() -> None:
    limits = ("--model", SPARK, "--model", LIGHTNING, "--rpm", "60", "--pictures", "2", "--expires", "2126-01-01")
    for name, flags, may in (
        ("usual", (), "draw"),
        ("admin", ("--admin",), "draw, manage keys"),
        ("broke", ("--credit", "0"), "draw; $0 in all"),
        ("bound", limits, f"draw with {SPARK}, {LIGHTNING}; 60 requests/min; 2 at once; until 2126-01-01"),
    ):
        command("keys", "create", name, *flags)
        [line] = [line for line in command("keys", "list").stdout.splitlines() if f" {name} " in line]
        assert line.partition(" active ")[2].split("  ")[0].strip() == may


def test_commands_that_read_make_no_ledger(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "other"
    for words in (("keys", "list"), ("usage",), ("usage", "--csv"), ("keys", "revoke", "x"), ("keys", "rotate", "x")):
        asked = command(*words, "--home", str(there))
        assert (asked.exit_code, asked.stdout) == (1, "")
        assert f"Error: There is no ledger {there / 'ledger.db'}: " in asked.stderr
    assert not there.exists()
    monkeypatch.setenv("FULGURITE_LEDGER", f"sqlite:///{there}.db")
    assert f"There is no ledger {there}.db: " in command("keys", "list").stderr
    assert command("keys", "create", "x").exit_code == 0
    assert command("keys", "list").exit_code == 0
    assert not home.exists()


def test_a_key_may_be_for_models_of_your_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cards, "added", {})
    (tmp_path / "cards").mkdir()
    write_card("spark.toml", tmp_path / "cards/fox.toml", tmp_path / "cards/fox/unet/model.safetensors")
    folder = ("--cards", str(tmp_path / "cards"))
    wrong = command("keys", "create", "x", "--model", "local/hare", *folder)
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "There is no model 'local/hare' here. There are: " in wrong.stderr
    assert "local/fox" in wrong.stderr
    assert "nowhere" in command("keys", "create", "x", "--cards", "nowhere").stderr
    assert command("keys", "create", "Zoë", "--model", "local/fox", *folder).exit_code == 0
    listed = command("keys", "list").stdout.splitlines()
    assert len(listed) == 2
    assert "local/fox" in listed[1]


def test_names_are_shown_as_they_are() -> None:
    name = "oops [/nope] [red]x[/red] :smile: 赤い狐\n\x1b[2J"
    shown = "oops [/nope] [red]x[/red] :smile: 赤い狐\\n\\x1b[2J"
    made = command("keys", "create", name)
    listed = command("keys", "list").stdout
    assert shown in listed
    assert listed.count("\n") == 2
    assert shown in made.stderr
    key_id = listed.splitlines()[1].split()[0]
    assert shown in command("keys", "rotate", key_id).stderr
    assert shown in command("keys", "revoke", key_id).stderr


@pytest.mark.parametrize(
    ("flags", "exit_code", "said"),
    [
        (["--rpm", "1000001"], 2, "--rpm"),
        (["--rpm", "9" * 30], 2, "--rpm"),
        (["--pictures", "1000001"], 2, "--pictures"),
        (["--expires", "2020-01-01"], 1, "--expires: on 2020-01-01 the key would have expired already"),
        (["--expires", f"{now():%Y-%m-%d}"], 1, "--expires: "),
        (["--expires", "tomorrow"], 2, "'tomorrow' is not a day, such as 2027-01-31."),
    ],
)
def test_limits_that_a_key_cannot_have(flags: list[str], exit_code: int, said: str) -> None:
    made = command("keys", "create", "x", *flags)
    assert (made.exit_code, made.stdout) == (exit_code, "")
    assert said in made.stderr
    assert "There is no ledger" in command("keys", "list").stderr


def test_the_home_that_a_flag_names(home: Path, tmp_path: Path) -> None:
    there = ("--home", str(tmp_path / "other"))
    secret = command("keys", "create", "bob", *there).stdout.strip()
    books = open_ledger(read_settings(home=tmp_path / "other"))
    key = books.keys.find(secret)
    assert key
    books.close()
    assert "bob" in command("keys", "list", *there).stdout
    assert command("usage", "--key", key.id, *there).exit_code == 0
    assert command("keys", "rotate", key.id, *there).exit_code == 0
    assert command("keys", "revoke", key.id, *there).exit_code == 0
    assert not home.exists()


def test_usage_on_the_command_line(engine: FakeEngine) -> None:
    books = open_ledger(read_settings())
    key_id, headers = with_key(books)
    with TestClient(create_app(engine, books, read_settings()), headers=headers) as client:
        for _ in range(3):
            client.post("/api/v1", json=MADE)
    books.close()
    row = {"day": f"{now():%Y-%m-%d}", "model": LIGHTNING, "key": key_id, "name": "a customer", "pictures": "3"}
    assert list(csv.DictReader(io.StringIO(command("usage", "--csv").stdout))) == [
        row | {"not_made": "0", "steps": "60", "price_microdollars": "3300"}
    ]
    shown = command("usage").stdout
    assert shown.splitlines()[0].split()[:4] == ["day", "model", "key", "name"]
    assert shown.splitlines()[1].split()[2:5] == [key_id, "a", "customer"]
    assert shown.splitlines()[2].split() == ["in", "all", "3", "0", "60", "$0.0033"]
    assert command("usage", "--csv", "--until", "2020-01-01").stdout.count("\n") == 1
    assert key_id in command("usage", "--key", key_id).stdout
    unknown = command("usage", "--key", "key_x")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "--key: there is no key 'key_x'." in unknown.stderr
    assert command("usage", "--since", "yesterday").exit_code == 2
    backwards = command("usage", "--since", "2026-02-01", "--until", "2026-01-31")
    assert (backwards.exit_code, backwards.stdout) == (1, "")
    assert "--since: 2026-02-01 is after the last day, 2026-01-31." in backwards.stderr


@pytest.mark.parametrize(("text", "micro"), [("5", 5_000_000), ("$0.0011", 1100), ("0", 0), ("1e2", 100_000_000)])
def test_dollars_are_exact(text: str, micro: int) -> None:
    assert micro_dollars(text) == micro
    assert micro_dollars(dollars(micro)) == micro


@pytest.mark.parametrize("text", ["", "five", "-1", "nan", "inf", "0.0000001", "1e400", "1e-400"])
def test_amounts_that_cannot_be(text: str) -> None:
    with pytest.raises(FulguriteError, match="--credit"):
        micro_dollars(text)
