"""A picture's way told as server-sent events."""

import base64
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import HEADERS, SPARK, FakeEngine, body, drawn, needs_weights
from fastapi.testclient import TestClient
from PIL import Image

from fulgurite import Picture, Pipeline, Request
from fulgurite.errors import BusyError
from fulgurite.ledger import Ledger


def parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("how", ["stream", "accept"])
def test_steps_with_previews_then_the_picture(client: TestClient, how: str) -> None:
    asked = body(seed=9, num_steps=3) | ({"stream": True} if how == "stream" else {})
    headers = {"Accept": "text/event-stream"} if how == "accept" else {}
    answer = client.post("/api/v1", json=asked, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    names = [name for name, _ in parsed(answer.text)]
    assert [name for name in names if name != "queued"] == ["step", "step", "step", "done"]
    steps = [data for name, data in parsed(answer.text) if name == "step"]
    assert [(data["step"], data["steps"]) for data in steps] == [(1, 3), (2, 3), (3, 3)]
    assert opened(steps[0]["preview"]).size == (16, 16)
    done = parsed(answer.text)[-1][1]
    assert (done["model"], done["seed"], done["steps"], done["decoder"]) == (SPARK, "9", "3", "full")
    assert done["picture"].startswith("data:image/png;base64,")
    assert opened(done["picture"]).size == (256, 256)


def test_a_retry_without_streaming_is_the_same_picture(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    headers = {"Idempotency-Key": "once"}
    streamed = parsed(client.post("/api/v1", json=body() | {"stream": True}, headers=headers).text)[-1][1]["picture"]
    assert base64.b64decode(streamed.partition(",")[2]) == client.post("/api/v1", json=body(), headers=headers).content
    again = parsed(client.post("/api/v1", json=body() | {"stream": True}, headers=headers).text)
    assert again[-1][1]["picture"] == streamed
    assert len(engine.jobs) == len(ledger.entries()) == 1


def test_what_goes_wrong_is_the_last_event(
    client: TestClient, engine: FakeEngine, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(error: Exception) -> Callable[[str, Request], Picture]:
        def answer(model: str, request: Request) -> Picture:
            raise error

        return answer

    for error, code, seconds in (
        (BusyError("All places are taken.", 7), "busy", 7),
        (KeyError(), "internal_error", None),
    ):
        engine.answer = failing(error)
        answer = client.post("/api/v1", json=body() | {"stream": True})
        name, data = parsed(answer.text)[-1]
        assert (name, data["error"]["code"], data["retry_after"]) == ("error", code, seconds)
        assert data["request_id"] == answer.headers["x-request-id"]
        assert (data["request_id"] in caplog.text) == (code == "internal_error")
    assert [entry.outcome for entry in ledger.entries()] == ["refused", "failed"]
    refused = client.post("/api/v1", json=body(num_steps=99) | {"stream": True})
    assert refused.status_code == 422  # what is wrong from the start is no stream
    refused = client.post("/api/v1/predictions", json=body() | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "stream")


def test_what_is_not_queued_is_no_stream(client: TestClient, engine: FakeEngine, ledger: Ledger) -> None:
    engine.refuses = BusyError("All places are taken.", 7)
    answer = client.post("/api/v1", json=body() | {"stream": True})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (503, "7", "busy")
    engine.refuses = KeyError()
    answer = client.post("/api/v1", json=body() | {"stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert [entry.outcome for entry in ledger.entries()] == ["refused", "failed"]


def test_the_place_in_the_queue_is_told_and_who_hangs_up_cancels(
    address: str, engine: FakeEngine, ledger: Ledger
) -> None:
    engine.held = True
    url = address + "/api/v1"
    with httpx.Client(headers=HEADERS, timeout=20) as caller:
        with caller.stream("POST", url, json=body() | {"stream": True}) as first:
            waiting = first.iter_lines()
            assert next(waiting) == "event: queued"
            with caller.stream("POST", url, json=body() | {"stream": True}) as second:
                lines = second.iter_lines()
                while (line := next(lines)).find('"position": 1') < 0:
                    assert not line.startswith("event: done")
                engine.futures[0].set_result(drawn(*engine.jobs[0]))
                assert "event: done" in waiting
        deadline = time.monotonic() + 20
        while not (len(engine.futures) == 2 and engine.futures[1].cancelled()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    while "cancelled" not in {entry.outcome for entry in ledger.entries()}:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_weights
@pytest.mark.parametrize("fast", [True, False])
def test_the_last_preview_looks_like_the_picture(fast: bool) -> None:
    """By the fast decoder, and by the linear map where there is none."""
    previews: list[Image.Image | None] = []
    draw = Pipeline.load(SPARK)
    if not fast:
        draw.networks = replace(draw.networks, fast_decoder=None)
    picture = draw(
        "a red apple on a blue background", width=256, height=256, num_steps=6, seed=1,
        on_step=lambda done, steps, preview: previews.append(preview()),
    )  # fmt: skip
    assert len(previews) == 6
    last = previews[-1]
    assert last
    assert last.size == (128, 128)
    side = 128 if fast else 16  # the linear map knows one colour a latent pixel
    apart = np.abs(np.asarray(last.resize((side, side)), float) - np.asarray(picture.image.resize((side, side)), float))
    assert apart.mean() < (8 if fast else 20)  # of 255
