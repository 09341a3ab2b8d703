"""Our own client, against the server on a real socket, and against servers that fail in every way."""

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import KEY, SPARK, FakeEngine
from PIL import Image

from fulgurite import APIError, AsyncClient, Client, Picture, Request, client
from fulgurite.errors import BusyError, RequestError
from fulgurite.ledger import Ledger

Answers = list[httpx.Response | Exception]


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that clients wait, instead of waiting."""
    seconds: list[float] = []

    async def asleep(wait: float) -> None:
        seconds.append(wait)

    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=seconds.append))
    monkeypatch.setattr(client, "asyncio", SimpleNamespace(sleep=asleep))
    return seconds


def sync_draw(url: str, key: str, transport: httpx.MockTransport | None = None, **options: object) -> client.Drawn:
    with Client(url, key, transport=transport) as caller:
        return caller.draw("a red fox", **options)


def async_draw(url: str, key: str, transport: httpx.MockTransport | None = None, **options: object) -> client.Drawn:
    async def run() -> client.Drawn:
        async with AsyncClient(url, key, transport=transport) as caller:
            return await caller.draw("a red fox", **options)

    return asyncio.run(run())


@pytest.fixture(params=[sync_draw, async_draw])
def draw(request: pytest.FixtureRequest) -> Callable[..., client.Drawn]:
    return request.param


def scripted(answers: Answers, seen: list[httpx.Request]) -> httpx.MockTransport:
    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(handle)


@pytest.mark.usefixtures("waited")
def test_a_picture_and_what_its_headers_say(address: str, tmp_path: Path) -> None:
    picture = sync_draw(
        address + "/api/v1/", KEY, model=SPARK, seed=5, num_steps=3, width=256, height=256, output_format="webp"
    )
    assert (picture.seed, picture.steps, picture.model, picture.decoder) == (5, 3, SPARK, "full")
    assert picture.media_type == "image/webp"
    assert picture.image.size == (256, 256)
    assert picture.price
    picture.save(tmp_path / "fox.webp")
    with Image.open(tmp_path / "fox.webp") as saved:
        assert saved.format == "WEBP"
    assert sync_draw(address + "/api/v1", KEY, model=client.LIGHTNING, decoder="fast").decoder == "fast"
    assert async_draw(address + "/api/v1", KEY, model=SPARK, seed=5, width=256, height=256).image.format == "PNG"


def test_the_server_s_own_words_are_the_error(draw: Callable[..., client.Drawn], address: str) -> None:
    with pytest.raises(APIError, match="num_steps") as refused:
        draw(address + "/api/v1", KEY, model=SPARK, num_steps=99)
    assert (refused.value.status, refused.value.code, refused.value.param) == (
        422, "invalid_parameter", "data.num_steps",
    )  # fmt: skip
    assert refused.value.request_id
    with pytest.raises(APIError, match="no such key") as refused:
        draw(address + "/api/v1", "wrong", model=SPARK)
    assert refused.value.status == 401


def test_what_passes_is_tried_again_under_one_key(draw: Callable[..., client.Drawn], waited: list[float]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    busy = {"error": {"code": "busy", "message": "full", "param": None}}
    answers: Answers = [
        httpx.Response(503, json=busy, headers={"Retry-After": "7"}),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.Response(429, headers={"Retry-After": "9999"}),
        httpx.Response(200, content=file.getvalue(), headers={"Content-Type": "image/png"}),
    ]
    seen: list[httpx.Request] = []
    picture = draw("http://host/api/v1", "k", scripted(answers, seen))
    assert picture.image.size == (8, 8)
    assert picture.model is None
    assert len(seen) == 5
    assert len({request.headers["Idempotency-Key"] for request in seen}) == 1
    assert len({request.content for request in seen}) == 1
    assert (waited[0], waited[3]) == (7.0, 60.0)
    assert 0.25 <= waited[1] <= 0.75
    assert 0.5 <= waited[2] <= 1.5


@pytest.mark.parametrize(
    ("answer", "tries", "said"),
    [
        (
            lambda: httpx.Response(402, json={"error": {"code": "credit_spent", "message": "No credit."}}),
            1,
            "No credit",
        ),
        (
            lambda: httpx.Response(503, json={"error": {"code": "not_pulled", "message": "Pull it."}}),
            1,
            "Pull it",
        ),
        (
            lambda: httpx.Response(500, json={"error": {"code": "not_finite", "message": "No numbers."}}),
            5,
            "No numbers",
        ),
        (lambda: httpx.Response(503, json={"error": {"code": ["odd"], "message": "Odd."}}), 5, "Odd"),
        (lambda: httpx.Response(404, text="<html>"), 1, "http://host/api/v1 answered 404 Not Found"),
        (lambda: httpx.Response(502, text="<html>"), 5, "answered 502 Bad Gateway"),
        (lambda: httpx.Response(500, json=["odd"]), 5, "answered 500"),
        (lambda: httpx.ConnectError("refused"), 5, "cannot be reached: refused"),
        (lambda: httpx.Response(200, headers={"X-Fulgurite-Seed": "five"}), 5, "malformed header: .*'five'"),
    ],
)
def test_what_does_not_pass_is_an_error(
    draw: Callable[..., client.Drawn], answer: Callable[[], httpx.Response | Exception], tries: int, said: str
) -> None:
    seen: list[httpx.Request] = []
    with pytest.raises(APIError, match=said):
        draw("http://host/api/v1", "k", scripted([answer() for _ in range(9)], seen))
    assert len(seen) == tries


def test_an_answer_that_does_not_come_in_time_is_not_asked_for_again(draw: Callable[..., client.Drawn]) -> None:
    seen: list[httpx.Request] = []
    with pytest.raises(APIError, match=r"did not answer within 300 s: give the client a longer timeout") as slow:
        draw("http://host/api/v1", "k", scripted([httpx.ReadTimeout("slow")], seen))
    assert (slow.value.status, slow.value.code) == (0, "timeout")
    assert len(seen) == 1


@pytest.mark.usefixtures("waited")
def test_a_stream_that_fell_silent_is_asked_for_again(draw: Callable[..., client.Drawn]) -> None:
    answers = [httpx.ReadTimeout("silent"), httpx.Response(200, content=DONE, headers=EVENTS)]
    assert draw("http://host/api/v1", "k", scripted(answers, []), on_step=print).media_type


def test_a_seed_that_gives_no_picture_is_not_tried_again(draw: Callable[..., client.Drawn]) -> None:
    answer = httpx.Response(500, json={"error": {"code": "not_finite", "message": "No numbers."}})
    with pytest.raises(APIError, match="No numbers"):
        draw("http://host/api/v1", "k", scripted([answer], []), seed=0)


def test_an_answer_lost_on_its_way_is_given_again_and_billed_once(
    address: str, engine: FakeEngine, ledger: Ledger
) -> None:
    class Lossy(httpx.HTTPTransport):
        lost = 0

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            answer.read()
            if self.lost < 2:
                self.lost += 1
                raise httpx.ReadError("the line went dead")
            return answer

    with Client(address + "/api/v1", KEY, transport=Lossy()) as caller:
        assert caller.draw("a red fox", model=SPARK, width=256, height=256).image.size == (256, 256)
    assert len(engine.jobs) == 1
    assert [entry.outcome for entry in ledger.entries()] == ["done"]


def test_progress(draw: Callable[..., client.Drawn], address: str) -> None:
    steps: list[client.Step] = []
    options = {"model": SPARK, "seed": 5, "num_steps": 3, "width": 256, "height": 256}
    picture = draw(address + "/api/v1", KEY, on_step=steps.append, **options)
    assert [(step.done, step.steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[0].preview
    assert Image.open(io.BytesIO(steps[0].preview)).format == "JPEG"
    assert picture.content == draw(address + "/api/v1", KEY, **options).content
    assert (picture.seed, picture.steps, picture.media_type) == (5, 3, "image/png")


def test_progress_told_to_an_async_function() -> None:
    steps: list[int] = []

    async def told(step: client.Step) -> None:
        steps.append(step.done)

    sent = b'event: step\ndata: {"step": 1, "steps": 1, "preview": null}\n\n' + DONE
    async_draw("http://host", "k", scripted([httpx.Response(200, content=sent, headers=EVENTS)], []), on_step=told)
    assert steps == [1]


def test_what_is_none_is_not_sent(draw: Callable[..., client.Drawn]) -> None:
    seen: list[httpx.Request] = []
    nothing = dict.fromkeys(client.Options.__annotations__)
    draw("http://host", "k", scripted([httpx.Response(200)], seen), **nothing)
    assert json.loads(seen[0].content) == {"model": client.LIGHTNING, "data": {"prompt": "a red fox"}}
    assert seen[0].headers["Idempotency-Key"]
    assert "Accept" not in seen[0].headers


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("http://host", "", "The key is empty"),
        ("http://host", "ü", "The key has .* a letter beyond ASCII"),
        ("http://host", "fg-key\n", "The key has .* a line end"),
        ("127.0.0.1:8320/api/v1", "k", "'127.0.0.1:8320/api/v1' is no full address: write it as http://"),
        ("localhost:8320/api/v1", "k", "is no full address"),
        ("http:///api/v1", "k", "is no full address"),
        ("http://host:port", "k", "'http://host:port' cannot be read: Invalid port"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(
    kind: type[Client] | type[AsyncClient], url: str, key: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        kind(url, key)


def test_what_goes_wrong_in_a_stream(draw: Callable[..., client.Drawn], address: str, engine: FakeEngine) -> None:
    def broken(model: str, request: Request) -> Picture:
        raise RequestError("not so", "seed")

    engine.answer = broken
    with pytest.raises(APIError, match="not so") as refused:
        draw(address + "/api/v1", KEY, on_step=print, model=SPARK)
    assert (refused.value.status, refused.value.code) == (422, "invalid_parameter")


@pytest.mark.parametrize("queued", [True, False])
def test_a_busy_stream_is_come_back_to_as_it_is_told(
    draw: Callable[..., client.Drawn], address: str, engine: FakeEngine, waited: list[float], queued: bool
) -> None:
    error = BusyError("All places are taken.", 60)

    def busy(model: str, request: Request) -> Picture:
        raise error

    engine.answer, engine.refuses = busy, None if queued else error
    with pytest.raises(APIError, match="All places") as refused:
        draw(address + "/api/v1", KEY, on_step=print, model=SPARK)
    assert (refused.value.status, refused.value.code) == (503, "busy")
    assert len(refused.value.request_id) == 32
    assert waited == [60.0] * 4


EVENTS = {"Content-Type": "text/event-stream; charset=utf-8"}
DONE = b'event: done\ndata: {"seed": "5", "picture": "data:image/png;base64,eHl6"}\n\n'


@pytest.mark.parametrize(
    "sent",
    [
        b'event: queued\ndata: {"position": 0}\n\n',
        b"event: step\ndata: {nonsense\n\n",
        b'event: step\ndata: {"step": 1}\n\n',
        b'event: done\ndata: ["picture"]\n\n',
        b'event: done\ndata: {"picture": null}\n\n',
        b'event: done\ndata: {"picture": "eHl6"}\n\n',
        b'event: done\ndata: {"picture": "data:image/png;base64,eHl"}\n\n',
        b'event: done\ndata: {"seed": "five", "picture": "data:image/png;base64,eHl6"}\n\n',
        b'event: error\ndata: {"error": {"code": "busy", "message": "full"}}\n\n',
        b'event: error\ndata: {"status": 200, "error": {"code": "busy", "message": "full"}}\n\n',
        b'event: error\ndata: {"status": "503", "error": {"code": "busy", "message": "full"}}\n\n',
    ],
)
def test_a_stream_that_ends_early_or_is_garbled_is_tried_again(
    draw: Callable[..., client.Drawn], waited: list[float], sent: bytes
) -> None:
    answers: Answers = [
        httpx.Response(200, content=sent, headers=EVENTS),
        httpx.Response(200, content=b": still here\n\n" + DONE, headers=EVENTS),
    ]
    seen: list[httpx.Request] = []
    picture = draw("http://host/api/v1", "k", scripted(answers, seen), on_step=print)
    assert (picture.content, picture.seed, picture.media_type) == (b"xyz", 5, "image/png")
    assert len({request.headers["Idempotency-Key"] for request in seen}) == 1
    assert len(waited) == 1


def test_a_caller_s_own_error_is_not_taken_for_the_stream_s(draw: Callable[..., client.Drawn]) -> None:
    def mistaken(step: client.Step) -> None:
        raise ValueError("the caller's")

    sent = b'event: step\ndata: {"step": 1, "steps": 2, "preview": null}\n\n'
    with pytest.raises(ValueError, match="the caller's"):
        draw(
            "http://host/api/v1",
            "k",
            scripted([httpx.Response(200, content=sent, headers=EVENTS)], []),
            on_step=mistaken,
        )
