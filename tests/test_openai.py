"""OpenAI's own client against the server: what it sends is understood, what it is sent it understands."""

import base64
import io
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from conftest import HEADERS, KEY, LIGHTNING, SPARK, FakeEngine, drawn, wait_until
from fastapi.testclient import TestClient
from PIL import Image

from fulgurite import Picture, Request, cards
from fulgurite.errors import BusyError
from fulgurite.ledger import Ledger
from fulgurite.parameters import LEAST_SIDE, MOST_SIDE
from fulgurite.records import Limits
from fulgurite.request import OnStep, Preview
from fulgurite.server import create_app, jobs, listen, server_for, streaming
from fulgurite.server.openai_images import SIZE
from fulgurite.settings import read_settings


@pytest.fixture
def images(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def test_a_picture(images: openai.OpenAI, engine: FakeEngine, ledger: Ledger) -> None:
    found = images.images.generate(model=LIGHTNING, prompt="a red fox", size="1536x1024", quality="medium")
    [picture] = found.data
    assert opened(picture.b64_json).format == "PNG"
    assert opened(picture.b64_json).size == (1536, 1024)
    assert (found.size, found.output_format) == ("1536x1024", "png")
    [(model, request)] = engine.jobs
    assert (model, request.prompt, request.num_steps) == (LIGHTNING, "a red fox", 4)
    [entry] = ledger.entries()
    assert (entry.outcome, entry.price) == ("done", 1100)
    assert picture.made["id"] == entry.request_id  # type: ignore[attr-defined]
    assert picture.made["price"] == "0.0011"  # type: ignore[attr-defined]


def test_several_pictures_have_seeds_that_count_up_and_each_its_own_line(
    images: openai.OpenAI, engine: FakeEngine, ledger: Ledger
) -> None:
    extra = {"seed": 2**64 - 1, "num_steps": 3, "guidance": 5.0, "negative_prompt": "blurry"}
    found = images.images.generate(model=SPARK, prompt="a red fox", n=3, output_format="webp", extra_body=extra)
    assert [request.seed for _, request in engine.jobs] == [2**64 - 1, 0, 1]
    assert {(r.num_steps, r.guidance, r.negative_prompt) for _, r in engine.jobs} == {(3, 5.0, "blurry")}
    assert {(r.width, r.height) for _, r in engine.jobs} == {(256, 256)}  # the model's own
    assert [picture.made["seed"] for picture in found.data] == [str(2**64 - 1), "0", "1"]  # type: ignore[attr-defined]
    assert {opened(picture.b64_json).format for picture in found.data} == {"WEBP"}
    assert len({entry.request_id for entry in ledger.entries()}) == 3

    images.images.generate(model=SPARK, prompt="a red fox", n=3)
    assert len({request.seed for _, request in engine.jobs[3:]}) == 3


def test_what_was_not_made_of_several_is_not_billed_and_told(client: TestClient, ledger: Ledger, engine: FakeEngine):
    def answer(model: str, request: Request) -> Picture:
        if request.seed == 8:
            raise BusyError("All 64 places in the queue are taken.", 3)
        return drawn(model, request)

    engine.answer = answer
    asked = {"model": LIGHTNING, "prompt": "a red fox", "n": 3, "seed": 7}
    found = client.post("/v1/images/generations", json=asked)
    assert found.status_code == 200
    assert [picture["made"]["seed"] for picture in found.json()["data"]] == ["7", "9"]
    assert found.headers["x-fulgurite-notes"] == "1 of 3 not made: All 64 places in the queue are taken."
    assert sorted((entry.outcome, entry.price) for entry in ledger.entries()) == [
        ("done", 1100), ("done", 1100), ("refused", 0),
    ]  # fmt: skip
    none = client.post("/v1/images/generations", json=asked | {"seed": 8, "n": 1})
    assert (none.status_code, none.json()["error"]["code"]) == (503, "busy")


def test_a_retry_gets_the_same_pictures_and_is_billed_once(client: TestClient, ledger: Ledger) -> None:
    asked = {"model": LIGHTNING, "prompt": "a red fox", "n": 2}
    once = {"Idempotency-Key": "k" * 255}
    first, second = (client.post("/v1/images/generations", json=asked, headers=once).json() for _ in range(2))
    assert [picture["b64_json"] for picture in first["data"]] == [picture["b64_json"] for picture in second["data"]]
    assert [picture["made"]["seed"] for picture in first["data"]] == [p["made"]["seed"] for p in second["data"]]
    assert len(ledger.entries()) == 2
    for other in ({"n": 1}, {"n": 3}, {"seed": 5}):
        refused = client.post("/v1/images/generations", json=asked | other, headers=once)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert len(ledger.entries()) == 2


def test_a_key_of_a_picture_that_is_being_made_is_refused_before_any_is(
    client: TestClient, engine: FakeEngine, ledger: Ledger
):
    """The first was refused, the second is being made; then the same key comes with another prompt."""
    held = threading.Event()

    def answer(model: str, request: Request) -> Picture:
        if request.seed == 7:
            raise BusyError("No place.", 3)
        return drawn(model, request)

    engine.answer, engine.waits = answer, {8: held}
    asked, once = {"model": LIGHTNING, "prompt": "a red fox", "n": 2, "seed": 7}, {"Idempotency-Key": "once"}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(client.post, "/v1/images/generations", json=asked, headers=once)
        wait_until(lambda: len(engine.jobs) == 2)
        engine.answer = drawn
        second = client.post("/v1/images/generations", json=asked | {"prompt": "a cat"}, headers=once)
        assert second.json()["error"]["code"] == "idempotency_key_reused"
        held.set()
        assert len(first.result().json()["data"]) == 1
    assert Counter(entry.outcome for entry in ledger.entries()) == {"refused": 1, "done": 1}


def test_a_key_that_may_have_fewer_at_once_is_told_before_any_is_made(client: TestClient, ledger: Ledger) -> None:
    _, secret = ledger.keys.create("few", Limits(pictures_in_flight=2))
    few = {"Authorization": f"Bearer {secret}"}
    asked = {"model": SPARK, "prompt": "a red fox", "n": 3}
    refused = client.post("/v1/images/generations", json=asked, headers=few)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "n")
    assert refused.json()["error"]["message"] == "n: this key may have 2 pictures made at once."
    assert not ledger.entries()
    assert client.post("/v1/images/generations", json=asked | {"n": 2}, headers=few).status_code == 200
    _, secret = ledger.keys.create("one", Limits(pictures_in_flight=1))
    refused = client.post("/v1/images/generations", json=asked, headers={"Authorization": f"Bearer {secret}"})
    assert refused.json()["error"]["message"] == "n: this key may have 1 picture made at once."


@pytest.mark.parametrize(("late", "encoding"), [(0, 0), (1.5, 0), (0, 1.5)])
def test_what_is_made_when_the_server_stops_is_delivered(
    engine: FakeEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, late: float, encoding: float
) -> None:
    """Also where the time to stop within is over before it is a file, or the server hears that the ledger has it."""
    settle, encode, begun = ledger.settle, jobs.file_bytes, []

    def encoded(*arguments: Any) -> bytes:
        begun.append(arguments)
        time.sleep(encoding)
        return encode(*arguments)

    def settled_late(*arguments: Any) -> Future[Any]:
        settled, heard = settle(*arguments), Future[Any]()
        threading.Timer(late, lambda: heard.set_result(settled.result())).start()
        return heard

    monkeypatch.setattr(ledger, "settle", settled_late)
    monkeypatch.setattr(jobs, "file_bytes", encoded)
    engine.waits = {9: threading.Event()}
    server = server_for(create_app(engine, ledger, read_settings(shutdown_seconds=1)), 1)
    listener = listen("127.0.0.1", 0)
    asked = {"model": LIGHTNING, "prompt": "a red fox", "n": 3, "seed": 7}
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/images/generations"
    with ThreadPoolExecutor() as threads:
        serving = threads.submit(server.run, [listener])
        found = threads.submit(httpx.post, url, json=asked, headers=HEADERS, timeout=30)
        wait_until(lambda: len(begun if encoding else ledger.entries()) == 2)
        server.should_exit = True
        serving.result()
    assert found.result().status_code == 200
    assert [picture["made"]["seed"] for picture in found.result().json()["data"]] == ["7", "8"]
    assert found.result().headers["x-fulgurite-notes"] == "1 of 3 not made: The server is shutting down."
    assert Counter(entry.outcome for entry in ledger.entries()) == {"done": 2, "cancelled": 1}


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"size": "100x100"}, "size"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "large"}, "size"),
        ({"size": "512x512", "extra_body": {"width": 512}}, "size"),
        ({"n": 11}, "n"),
        ({"background": "transparent"}, "background"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"extra_body": {"num_steps": 21}}, "num_steps"),
        ({"prompt": "x"}, "prompt"),
        ({"stream": True, "n": 2}, "n"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(images: openai.OpenAI, engine: FakeEngine, sent, param) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        images.images.generate(**{"model": SPARK, "prompt": "a red fox"} | sent)
    assert (caught.value.param, caught.value.code) == (param, "invalid_parameter")
    assert param in str(caught.value)
    assert not engine.jobs


def test_what_a_model_cannot_do_is_refused_by_name(
    images: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cards.added, SPARK, replace(cards.card(SPARK), schedules=(4, 8)))
    with pytest.raises(openai.UnprocessableEntityError, match="needs at least 4") as caught:
        images.images.generate(model=SPARK, prompt="a red fox", quality="low")
    assert caught.value.param == "num_steps"
    assert not engine.jobs


def test_what_changes_nothing_is_said(images: openai.OpenAI) -> None:
    found = images.images.with_raw_response.generate(
        model=SPARK, prompt="a red fox", style="vivid", user="anna", moderation="low", background="auto"
    )
    told = found.headers["x-fulgurite-notes"]
    assert told == "moderation changes nothing here; style changes nothing here; user changes nothing here"
    streamed = images.images.with_raw_response.generate(model=SPARK, prompt="a red fox", user="anna", stream=True)
    assert streamed.headers["x-fulgurite-notes"] == "user changes nothing here"
    unstreamed = images.images.with_raw_response.generate(model=SPARK, prompt="a red fox", partial_images=2)
    assert unstreamed.headers["x-fulgurite-notes"] == "partial_images changes nothing without stream"


def test_errors_are_those_of_the_client(address: str, images: openai.OpenAI, ledger: Ledger) -> None:
    with pytest.raises(openai.NotFoundError, match="dall-e-3"):
        images.images.generate(model="dall-e-3", prompt="a red fox")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").images.generate(model=SPARK, prompt="a red fox")
    _, secret = ledger.keys.create("poor", Limits(models=(SPARK,)))
    with pytest.raises(openai.PermissionDeniedError, match="may not use"):
        openai.OpenAI(base_url=f"{address}/v1", api_key=secret).images.generate(model=LIGHTNING, prompt="a red fox")


def test_the_models_there_are(images: openai.OpenAI) -> None:
    names = [model.id for model in images.models.list()]
    assert names[:2] == [LIGHTNING, SPARK]
    assert images.models.retrieve(LIGHTNING).id == LIGHTNING
    with pytest.raises(openai.NotFoundError):
        images.models.retrieve("dall-e-3")


def test_a_client_that_goes_away_stops_all_its_pictures(address: str, engine: FakeEngine, ledger: Ledger) -> None:
    engine.held = True
    with pytest.raises(openai.APITimeoutError):
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, timeout=0.5, max_retries=0).images.generate(
            model=SPARK, prompt="a red fox", n=3
        )
    wait_until(lambda: len(ledger.entries()) == 3)
    assert {entry.outcome for entry in ledger.entries()} == {"cancelled"}


def test_a_size_is_what_the_hosted_api_lets_a_side_be() -> None:
    fits = [side for side in range(10_000) if re.fullmatch(SIZE, f"{side}x{side}")]
    assert fits == list(range(LEAST_SIDE, MOST_SIDE + 1))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_partial_images_then_the_picture(images: openai.OpenAI, ledger: Ledger, output_format: Any) -> None:
    """The picture is the one that is made without a stream, and billed as that is."""
    asked = {"model": LIGHTNING, "prompt": "a red fox", "size": "512x320", "output_format": output_format}
    asked |= {"quality": "medium", "extra_body": {"seed": 7}}
    *partial, completed = images.images.generate(**asked, stream=True, partial_images=2)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert completed.type == "image_generation.completed"
    assert [event.partial_image_index for event in partial] == [0, 1]
    for event in (*partial, completed):
        assert (event.size, event.quality, event.output_format) == ("512x320", "medium", output_format)
        assert event.background == "opaque"
        assert abs(event.created_at - time.time()) < 60
        assert opened(event.b64_json).size == (512, 320)
        assert opened(event.b64_json).format == output_format.upper()
    assert completed.usage.total_tokens == 0
    [entry] = ledger.entries()
    assert (entry.outcome, entry.price) == ("done", 1100)
    assert completed.made["id"] == entry.request_id
    assert completed.made["seed"] == "7"
    assert completed.b64_json == images.images.generate(**asked).data[0].b64_json


def test_a_partial_image_comes_while_the_picture_is_made(
    images: openai.OpenAI, engine: FakeEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SILENCE_SECONDS", 0.0)  # comments come between the events
    engine.waits = {7: threading.Event()}
    events = images.images.generate(
        model=SPARK, prompt="a red fox", stream=True, partial_images=1, extra_body={"seed": 7}
    )
    assert next(events).type == "image_generation.partial_image"
    time.sleep(2 * streaming.LOOK_SECONDS)
    assert not ledger.entries()
    engine.waits[7].set()
    assert [event.type for event in events] == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("steps", "partial_images", "previewed"),
    [
        (20, 3, [5, 10, 15]),
        (8, 2, [2, 5]),
        (8, 1, [4]),
        (4, 3, [1, 2, 3]),
        (3, 3, [1, 2]),
        (2, 3, [1]),
        (1, 3, []),
        (8, 0, []),
        (8, None, []),
    ],
)
def test_partial_images_are_spread_over_the_steps_and_no_other_preview_is_drawn(
    images: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, steps, partial_images, previewed
) -> None:
    seen, submit = [], engine.submit

    def watched(model: str, request: Request, on_step: OnStep | None = None, key: str = "") -> Future[Picture]:
        def told(done: int, steps: int, preview: Preview) -> None:
            on_step(done, steps, lambda: seen.append(done) or preview())

        return submit(model, request, told if on_step else None, key)

    monkeypatch.setattr(engine, "submit", watched)
    *partial, completed = images.images.generate(
        model=SPARK, prompt="a red fox", stream=True, partial_images=partial_images, extra_body={"num_steps": steps}
    )
    assert seen == previewed
    assert [event.partial_image_index for event in partial] == list(range(len(previewed)))
    assert (completed.type, completed.quality) == ("image_generation.completed", "auto")


def test_a_retry_of_a_stream_is_the_same_picture_and_billed_once(images: openai.OpenAI, ledger: Ledger) -> None:
    asked = {"model": SPARK, "prompt": "a red fox", "extra_headers": {"Idempotency-Key": "once"}}
    *partial, first = images.images.generate(**asked, stream=True, partial_images=1)
    [again] = images.images.generate(**asked, stream=True, partial_images=1)
    unstreamed = images.images.generate(**asked)
    assert len(partial) == len(ledger.entries()) == 1
    assert first.b64_json == again.b64_json == unstreamed.data[0].b64_json
    with pytest.raises(openai.ConflictError, match="idempotency key was sent before"):
        images.images.generate(**asked | {"prompt": "a cat"}, stream=True)


def test_two_that_share_a_stream_s_picture_each_get_what_they_asked_for(
    images: openai.OpenAI, engine: FakeEngine, ledger: Ledger
) -> None:
    engine.waits = {7: threading.Event()}
    asked = {"model": SPARK, "prompt": "a red fox", "stream": True, "extra_body": {"seed": 7}}
    asked |= {"extra_headers": {"Idempotency-Key": "once"}}
    first = images.images.generate(**asked, partial_images=3)
    second = images.images.generate(**asked, partial_images=1)
    assert next(second).type == "image_generation.partial_image"
    engine.waits[7].set()
    assert [event.type for event in second] == ["image_generation.completed"]
    assert len(list(first)) == 4
    assert len(engine.jobs) == len(ledger.entries()) == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BusyError("All places are taken.", 7), "busy", "All places are taken."),
        (KeyError(), "internal_error", "Something broke here."),
    ],
)
def test_what_goes_wrong_in_a_stream_is_an_exception(
    images: openai.OpenAI, engine: FakeEngine, ledger: Ledger, error: Exception, code: str, message: str
) -> None:
    def failing(model: str, request: Request) -> Picture:
        raise error

    engine.answer = failing
    events = images.images.generate(model=SPARK, prompt="a red fox", stream=True, partial_images=1)
    assert next(events).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match=message) as caught:
        next(events)
    assert caught.value.code == code
    assert [entry.price for entry in ledger.entries()] == [0]


def test_a_stream_of_what_is_not_queued_is_told_by_its_status(images: openai.OpenAI, engine: FakeEngine) -> None:
    engine.refuses = BusyError("All places are taken.", 7)
    with pytest.raises(openai.InternalServerError, match="All places are taken") as caught:
        images.with_options(max_retries=0).images.generate(model=SPARK, prompt="a red fox", stream=True)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "7")


def test_who_leaves_a_stream_cancels(images: openai.OpenAI, engine: FakeEngine, ledger: Ledger) -> None:
    engine.held = True
    events = images.images.generate(model=SPARK, prompt="a red fox", stream=True, partial_images=1)
    wait_until(lambda: engine.futures)
    events.close()
    wait_until(lambda: engine.futures[0].cancelled())
    wait_until(ledger.entries)
    assert [(entry.outcome, entry.price) for entry in ledger.entries()] == [("cancelled", 0)]
