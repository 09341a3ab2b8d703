"""Pictures asked for now and fetched later."""

import asyncio
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import HEADERS, FakeEngine, body, drawn
from fastapi.testclient import TestClient
from PIL import Image

from fulgurite import Picture, Request
from fulgurite.errors import BusyError
from fulgurite.ledger import Ledger
from fulgurite.server import create_app
from fulgurite.server.predictions import Prediction
from fulgurite.settings import read_settings

URL = "/api/v1/predictions"
ASYNC = {"Prefer": "respond-async"}


def status_when(client: TestClient, id: str, *wanted: str) -> dict[str, Any]:
    """The prediction, once its status is one of these."""
    deadline = time.monotonic() + 20
    while (found := client.get(f"{URL}/{id}").json())["status"] not in wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def test_asked_for_now_fetched_later(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    engine.held = True
    begun = client.post(URL, json=body(seed=3, num_steps=4), headers=ASYNC)
    assert begun.status_code == 202
    id = begun.json()["id"]
    assert begun.json()["status"] == "starting"
    assert begun.json()["urls"]["get"].endswith(f"{URL}/{id}")
    early = client.get(f"{URL}/{id}/output")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "no_output")
    while not engine.futures:
        time.sleep(0.01)
    engine.futures[0].set_running_or_notify_cancel()
    assert status_when(client, id, "processing")
    engine.futures[0].set_result(drawn(*engine.jobs[0]))
    found = status_when(client, id, "succeeded")
    assert (found["made"]["seed"], found["made"]["steps"], found["made"]["decoder"]) == ("3", "4", "full")
    assert found["error"] is None
    picture = httpx.URL(found["output"]).path
    assert client.get(picture).content == client.get(picture).content
    assert client.get(picture).content.startswith(b"\x89PNG")
    assert client.get(picture).headers["x-fulgurite-seed"] == "3"
    assert [entry.outcome for entry in ledger.entries()] == ["done"]
    assert client.post(f"{URL}/{id}/cancel").json()["status"] == "succeeded"  # too late


def test_without_prefer_the_answer_waits(client: TestClient) -> None:
    made = client.post(URL, json=body())
    assert (made.status_code, made.json()["status"]) == (201, "succeeded")


def test_put_again_is_the_same_picture(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    answers = [client.put(f"{URL}/my-own-id", json=body()) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({str(answer.json()) for answer in answers}) == 1
    assert len(engine.jobs) == len(ledger.entries()) == 1
    other = client.put(f"{URL}/my-own-id", json=body(prompt="a cat"))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert other.json()["error"]["param"] == "id"
    assert other.json()["error"]["message"].startswith("There is a prediction of this id already")
    assert client.post(URL, json=body(), headers={"Idempotency-Key": "once"}).status_code == 201
    other = client.post(URL, json=body(prompt="a cat"), headers={"Idempotency-Key": "once"})
    assert (other.status_code, other.json()["error"]["param"]) == (409, "Idempotency-Key")


def test_of_what_failed_the_log_has_more_and_the_device_keeps_nothing(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """As the engine has it: a bug that came of another, whose frames hold what a stage had in memory."""
    kept: list[weakref.ref[object]] = []

    def stage() -> None:
        row = Image.new("RGB", (8, 8))
        kept.append(weakref.ref(row))
        raise ZeroDivisionError("no step")

    def fails(model: str, request: Request) -> Picture:
        kept.append(weakref.ref(request))
        try:
            stage()
        except ZeroDivisionError as error:
            raise RuntimeError("drawing failed") from error
        raise AssertionError

    engine.answer = fails
    begun = client.post(URL, json=body(), headers=ASYNC)
    assert status_when(client, begun.json()["id"], "failed")["error"]["code"] == "internal_error"
    assert begun.headers["x-request-id"] in caplog.text
    assert "ZeroDivisionError: no step" in caplog.text
    kept.append(weakref.ref(engine.futures.pop()))
    engine.jobs.clear()
    caplog.clear()
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]


def test_put_again_when_it_is_made_has_it_at_once(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    """From the server that made it, and from the next one."""
    made = client.put(f"{URL}/my-own-id", json=body()).json()
    with TestClient(create_app(engine, ledger, read_settings()), headers=HEADERS) as next_server:
        for server in (client, next_server):
            again = server.put(f"{URL}/my-own-id", json=body(), headers=ASYNC)
            assert (again.status_code, again.json()) == (201, made)
            other = server.put(f"{URL}/my-own-id", json=body(prompt="a cat"), headers=ASYNC)
            assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert len(engine.jobs) == 1


def test_put_joins_what_runs(client: TestClient, engine: FakeEngine) -> None:
    engine.held = True
    for _ in range(3):
        assert client.put(f"{URL}/my-own-id", json=body(), headers=ASYNC).status_code == 202
    while not engine.futures:
        time.sleep(0.01)
    engine.futures[0].set_result(drawn(*engine.jobs[0]))
    assert status_when(client, "my-own-id", "succeeded")
    assert len(engine.jobs) == 1


def test_a_retried_post_is_the_same_prediction(client: TestClient, engine: FakeEngine) -> None:
    answers = [client.post(URL, json=body(), headers={"Idempotency-Key": "once"}).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(engine.jobs) == 1
    assert client.post(URL, json=body()).json()["id"] != answers[0]["id"]


def test_cancel(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    engine.held = True
    id = client.post(URL, json=body(), headers=ASYNC).json()["id"]
    while not engine.futures:
        time.sleep(0.01)
    assert client.post(f"{URL}/{id}/cancel").json()["status"] == "canceled"
    assert engine.futures[0].cancelled()
    assert client.get(f"{URL}/{id}").json()["status"] == "canceled"
    assert [(entry.outcome, entry.price) for entry in ledger.entries()] == [("cancelled", 0)]


def test_who_waits_for_a_prediction_is_told_that_it_was_cancelled(
    client: TestClient, engine: FakeEngine, ledger: Ledger
) -> None:
    engine.held = True
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(client.put, f"{URL}/my-own-id", json=body())
        while not engine.futures:
            time.sleep(0.01)
        client.post(f"{URL}/my-own-id/cancel")
        answer = waits.result(20)
    assert (answer.status_code, answer.json()["status"], answer.json()["error"]) == (202, "canceled", None)
    assert [entry.outcome for entry in ledger.entries()] == ["cancelled"]


def test_what_succeeded_is_never_taken_for_a_failure() -> None:
    """Not even between the picture's arrival and the next turn of the event loop, which forgets the prediction."""

    async def found(result: Any) -> Any:
        task: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(0, result))
        prediction = Prediction(None, task)  # type: ignore[arg-type]
        await asyncio.wait({task})
        return prediction.found()

    answer = object()
    assert asyncio.run(found(answer)) is answer


def test_a_failure_is_told_and_may_be_tried_again(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    def busy(model: str, request: Request) -> Picture:
        raise BusyError("All places are taken.", 1)

    engine.answer = busy
    assert client.put(f"{URL}/my-own-id", json=body(), headers=ASYNC).status_code == 202
    error = status_when(client, "my-own-id", "failed")["error"]
    assert error == {"code": "busy", "message": "All places are taken.", "param": None}
    assert client.put(f"{URL}/my-own-id", json=body()).status_code == 503
    engine.answer = drawn
    assert client.put(f"{URL}/my-own-id", json=body()).json()["status"] == "succeeded"
    assert [entry.outcome for entry in ledger.entries()] == ["refused", "refused", "done"]


def test_what_succeeded_outlives_the_server(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    id = client.post(URL, json=body()).json()["id"]
    with TestClient(create_app(engine, ledger, read_settings()), headers=HEADERS) as next_server:
        assert next_server.get(f"{URL}/{id}").json()["status"] == "succeeded"
        assert next_server.get(f"{URL}/{id}/output").content.startswith(b"\x89PNG")


def test_another_key_sees_nothing(client: TestClient, ledger: Ledger) -> None:
    id = client.post(URL, json=body()).json()["id"]
    _, secret = ledger.keys.create("another")
    headers = {"Authorization": f"Bearer {secret}"}
    for method, path in (("GET", id), ("GET", f"{id}/output"), ("POST", f"{id}/cancel")):
        answer = client.request(method, f"{URL}/{path}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_prediction")


@pytest.mark.parametrize("id", ["short", "with space", "a" * 65, "dots...."])
def test_bad_ids(client: TestClient, id: str) -> None:
    answer = client.put(f"{URL}/{id}", json=body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_parameter")
    for method, path in (("GET", id), ("GET", f"{id}/output"), ("POST", f"{id}/cancel")):
        answer = client.request(method, f"{URL}/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_prediction")
