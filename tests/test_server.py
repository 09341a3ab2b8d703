"""The hosted API, word for word, over a fake engine; then over a real server process with the published client."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
from conftest import HEADERS, KEY, LIGHTNING, SPARK, FakeEngine, body, drawn, engine_of, needs_weights
from fastapi.testclient import TestClient
from PIL import Image

from fulgurite import Picture, Pipeline, Request
from fulgurite.cards import card
from fulgurite.errors import BusyError, FulguriteError, NotPulledError, RequestError, WeightsError
from fulgurite.ledger import Ledger
from fulgurite.parameters import Parameters
from fulgurite.picture_file import parameters, png_bytes
from fulgurite.server import create_app, demo_notices
from fulgurite.settings import Settings, read_settings

ROOT = Path(__file__).parent.parent


def error_of(response: httpx.Response) -> dict[str, str]:
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"code", "message", "param"}
    return error


def refusing(engine: FakeEngine, error: Exception) -> None:
    def answer(model: str, request: Request) -> Picture:
        raise error

    engine.answer = answer


def test_a_picture(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = lambda model, request: drawn(model, request, ("ran 8 steps", "drawn at 256\xd7256\nand resampled"))
    response = client.post("/api/v1", json=body(seed=7, num_steps=4, negative_prompt="blurry", guidance=3))
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-fulgurite-model"] == SPARK
    assert response.headers["x-fulgurite-steps"] == "4"
    assert response.headers["x-fulgurite-decoder"] == "full"
    assert response.headers["x-fulgurite-seed"] == "7"
    assert response.headers["x-fulgurite-seconds"] == "0.100"
    assert response.headers["x-fulgurite-notes"] == "ran 8 steps; drawn at 256\\xd7256 and resampled"
    assert "x-fulgurite-demo" not in response.headers
    assert engine.jobs == [(SPARK, Request("a red fox", "blurry", 256, 256, 4, 3.0, 7))]
    with Image.open(io.BytesIO(response.content)) as picture:
        assert picture.size == (256, 256)
        assert picture.info["parameters"] == (
            "a red fox\nNegative prompt: blurry\nSteps: 4, Sampler: Euler, CFG scale: 3, Seed: 7, Size: 256x256, "
            "Model: fulgurite/spark, Decoder: full, Version: Fulgurite 0.1.0"
        )


def test_the_defaults_are_the_hosted_apis(client: TestClient, engine: FakeEngine) -> None:
    assert client.post("/api/v1", json={"model": SPARK, "data": {"prompt": "fox"}}).status_code == 200
    (_, request), seed = engine.jobs[0], engine.jobs[0][1].seed
    assert seed is not None
    assert request == Request("fox", seed=seed)  # the pipeline's own defaults are the same
    assert (request.height, request.width, request.num_steps, request.guidance) == (1024, 1024, 20, 7.5)
    client.post("/api/v1", json={"model": SPARK, "data": {"prompt": "fox"}})
    assert engine.jobs[1][1].seed != seed
    assert set(Parameters.model_fields) == set(Request.__dataclass_fields__)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xff"],
)
def test_without_the_key(engine: FakeEngine, ledger: Ledger, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    with TestClient(create_app(engine, ledger, read_settings())) as client:
        response = client.post(
            "/api/v1",
            headers=headers,
            content=b"{",
        )
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["code"] == "unauthorized"
        assert client.post("/api/v1", headers={"Authorization": f"bearer {KEY}"}, json=body()).status_code == 200


def test_an_unknown_model_names_those_there_are(client: TestClient) -> None:
    response = client.post("/api/v1", json=body() | {"model": "acme/nope"})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("unknown_model", "model")
    assert SPARK in error["message"]
    assert LIGHTNING in error["message"]


def test_only_the_models_asked_for_are_served(engine: FakeEngine, ledger: Ledger) -> None:
    with TestClient(create_app(engine, ledger, read_settings(models=(SPARK,))), headers=HEADERS) as client:
        response = client.post("/api/v1", json=body() | {"model": LIGHTNING})
        assert response.status_code == 404
        assert error_of(response)["message"].endswith("There are: fulgurite/spark.")
        assert [card["id"] for card in client.get("/api/v1/models").json()["models"]] == [SPARK]


@pytest.mark.parametrize("setting", ["models", "fast_decoder"])
def test_a_model_that_is_not_there_is_an_error_that_names_the_setting(
    engine: FakeEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv(f"FULGURITE_{setting.upper()}", "nope")
    with pytest.raises(FulguriteError, match=f"^FULGURITE_{setting.upper()}: There is no model 'nope' here"):
        create_app(engine, ledger, read_settings())


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (RequestError("not so", "guidance"), 422, "invalid_parameter", "data.guidance"),
        (NotPulledError("run `fulgurite pull`"), 503, "not_pulled", "model"),
        (WeightsError("damaged"), 503, "weights_unusable", "model"),
        (BusyError("full", 7), 503, "busy", None),
    ],
)
def test_what_the_engine_refuses(
    client: TestClient, engine: FakeEngine, error: Exception, status: int, code: str, param: str | None
) -> None:
    refusing(engine, error)
    response = client.post("/api/v1", json=body())
    assert response.status_code == status
    assert error_of(response) == {"code": code, "message": str(error), "param": param}
    assert response.headers.get("retry-after") == ("7" if code == "busy" else None)


def test_a_bug_is_a_500_that_can_be_found_in_the_log(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    refusing(engine, ZeroDivisionError("secret detail"))
    response = client.post("/api/v1", json=body())
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_other_addresses_and_methods(client: TestClient) -> None:
    for path in ("/nope", "/api/v1/", "/api/v2", "/api/v1/%ff%00"):
        assert error_of(client.get(path))["code"] == "not_found"
    response = client.get("/api/v1")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["code"] == "method_not_allowed"
    for path, allowed in (("predictions/my-own-id", "GET, HEAD, PUT"), ("admin/keys", "GET, HEAD, POST")):
        response = client.patch(f"/api/v1/{path}")
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        assert error_of(response)["message"] == f"This address takes {allowed}."


WATCHED = ["/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", f"/models/{SPARK}", "/api/v1/models"]


@pytest.mark.parametrize("path", WATCHED)
def test_head_is_get_without_a_body(client: TestClient, path: str) -> None:
    got, response = client.get(path), client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == got.headers["content-type"]


def test_head_is_counted_and_refused_where_there_is_no_get(client: TestClient) -> None:
    client.head("/healthz")
    assert 'method="HEAD",path="/healthz",status="200"' in client.get("/metrics").text
    assert client.head("/api/v1").status_code == 405
    assert client.head("/nowhere").status_code == 404


def test_health(client: TestClient) -> None:
    answer = client.get("/healthz").json()
    assert answer == {"status": "ok", "engine": {"queued": 0, "running": 0, "done": 0, "failed": 0}}


def test_cards(client: TestClient) -> None:
    card = client.get(f"/api/v1/models/{LIGHTNING}").json()
    assert card["cost_microdollars"] == 1100
    assert card["hosted_regions"] == ["US", "India"]
    assert "unet" not in card
    assert "answered_by" not in card
    assert card in client.get("/api/v1/models").json()["models"]
    assert error_of(client.get("/api/v1/models/nope/nope"))["code"] == "unknown_model"


def test_openapi_describes_the_request(client: TestClient) -> None:
    post = client.get("/openapi.json").json()["paths"]["/api/v1"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    height = schema["properties"]["data"]["properties"]["height"]
    assert (height["minimum"], height["maximum"], height["default"]) == (256, 2048, 1024)
    assert {"200", "401", "404", "413", "415", "422", "503"} <= set(post["responses"])


def test_openapi_describes_what_is_sent_unasked(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    hook = described["webhooks"]["prediction"]["post"]
    assert {"webhook-id", "webhook-timestamp", "webhook-signature"} == {has["name"] for has in hook["parameters"]}
    assert hook["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/PredictionShown")
    assert "2, 10, 60, 300 s" in hook["description"]
    assert set(hook["responses"]) == {"204", "default"}
    events = described["paths"]["/api/v1"]["post"]["description"]
    assert all(f"`{event}`" in events for event in ("queued", "step", "done", "error", "preview", "retry_after"))
    assert "Authorization: Bearer" in described["info"]["description"]
    assert not [path for path, operations in described["paths"].items() if "head" in operations]


def test_docs_need_no_network(client: TestClient) -> None:
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) >= 2
    for source in sources:
        answer = client.get(source)
        assert source.startswith("/")
        assert answer.status_code == 200
        assert len(answer.content) > 1000


EMBEDDED = "fulgurite/spark-lightning"  # the same kind of model, and small


def test_demo_says_who_answers(engine: FakeEngine, ledger: Ledger) -> None:
    app = create_app(engine, ledger, read_settings(demo=True))
    with TestClient(app, headers=HEADERS) as client:
        response = client.post("/api/v1", json=body() | {"model": LIGHTNING})
        assert engine.jobs[0][0] == response.headers["x-fulgurite-model"] == EMBEDDED
        assert response.headers["x-fulgurite-demo"].startswith(f"Demo: {EMBEDDED}")
        assert client.get(f"/api/v1/models/{LIGHTNING}").json()["answered_by"] == EMBEDDED
        assert "x-fulgurite-demo" not in client.post("/api/v1", json=body()).headers


def test_a_demonstration_tells_only_of_what_is_served() -> None:
    assert demo_notices(read_settings(demo=True)) == [
        f"Demo: {EMBEDDED}, a much smaller model, answers for {LIGHTNING}."
    ]
    assert demo_notices(read_settings(demo=True, models=(SPARK,))) == []
    assert demo_notices(read_settings()) == []


def test_a_client_that_goes_away_cancels_its_job(engine: FakeEngine, ledger: Ledger) -> None:
    engine.held = True
    app = create_app(engine, ledger, read_settings())
    sent, messages = [], [{"type": "http.request", "body": json.dumps(body()).encode()}, {"type": "http.disconnect"}]
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/api/v1", "query_string": b"", "headers": headers}

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert engine.futures[0].cancelled()
    assert sent[0]["status"] == 499


def test_generation_never_blocks_the_event_loop(engine: FakeEngine, ledger: Ledger) -> None:
    """Two jobs are held; meanwhile health is answered, and a closing engine's cancelled job is a clear 503."""
    engine.held = True
    app = create_app(engine, ledger, read_settings())

    async def talk() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=HEADERS) as client:
            waiting = [asyncio.create_task(client.post("/api/v1", json=body())) for _ in range(2)]
            while len(engine.futures) < 2:
                await asyncio.sleep(0.001)
            assert (await client.get("/healthz")).status_code == 200
            engine.futures[0].set_result(drawn(*engine.jobs[0]))
            engine.futures[1].cancel()
            return await asyncio.gather(*waiting)

    first, second = sorted(asyncio.run(talk()), key=lambda response: response.status_code)
    assert first.status_code == 200
    assert (second.status_code, error_of(second)["code"]) == (503, "shutting_down")


def test_settings_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULGURITE_MODELS", f"{SPARK}, {LIGHTNING}")
    assert read_settings(port=None).models == (SPARK, LIGHTNING)
    monkeypatch.setenv("FULGURITE_PORT", "80a")
    assert read_settings(port=81).port == 81
    with pytest.raises(FulguriteError, match=r"^FULGURITE_PORT: "):
        read_settings()
    with pytest.raises(FulguriteError, match=r"^--port: "):
        read_settings(port=-1)
    monkeypatch.setenv("FULGURITE_API_KEY", "two words")
    with pytest.raises(FulguriteError, match=r"^FULGURITE_API_KEY: (?!.*two words)"):
        read_settings(port=81)
    monkeypatch.setenv("FULGURITE_PROT", "80")
    with pytest.raises(FulguriteError, match=r"^FULGURITE_PROT is no setting"):
        read_settings()


def test_picture_files_hold_any_prompt() -> None:
    picture = drawn(SPARK, Request("nul \0 شعلة 🔥\nline", width=256, height=256, seed=1))
    assert parameters(picture).startswith("nul   شعلة 🔥\nline\nSteps: 20")
    with Image.open(io.BytesIO(png_bytes(picture))) as file:
        assert file.info["parameters"] == parameters(picture)
    assert png_bytes(picture) == png_bytes(picture)


def test_real_pixels_through_the_server(tiny: Pipeline, ledger: Ledger) -> None:
    engine = engine_of(tiny)
    try:
        app = create_app(engine, ledger, read_settings())
        with TestClient(app, headers=HEADERS) as client:
            request = body(seed=2**64 - 1, num_steps=2, width=300, height=257)
            first, second = (client.post("/api/v1", json=request) for _ in range(2))
            assert first.status_code == 200
            assert first.content == second.content
            assert (
                first.content != client.post("/api/v1", json=body(seed=3, num_steps=2, width=300, height=257)).content
            )
            assert "resampled to 300x257" in first.headers["x-fulgurite-notes"]
            with Image.open(io.BytesIO(first.content)) as picture:
                assert picture.size == (300, 257)
    finally:
        engine.close()


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A real server process in demo mode on a free port, perhaps under another command: its address."""
    command = [*getattr(request, "param", ()), sys.executable, "-m", "fulgurite", "serve", "--demo", "--port", "0"]
    environment = os.environ | {"FULGURITE_API_KEY": KEY}
    heeds = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heeds) as server:
        assert server.stderr
        for line in server.stderr:
            if found := re.search(r"answers at (http://\S+)", line):
                break
        try:
            yield found[1], server
        finally:
            server.terminate()
            server.stderr.read()
    assert server.returncode == 0


def test_a_real_server_and_curl(served: tuple[str, object], tmp_path: Path) -> None:
    """What needs a socket: a 100 MB body, announced or not, is refused while it is read, and the next request works."""
    url, big = served[0], tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(100_000_000)

    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "-m", "60", "-w", "%{http_code}", "-o", "/dev/null", url]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout

    good = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    assert curl(*good, "--data-binary", f"@{big}") == "413"
    assert curl(*good, "-H", "Transfer-Encoding: chunked", "--data-binary", f"@{big}") == "413"
    assert curl("-H", good[3], "--data-binary", f"@{big}") == "401"
    assert curl(*good, "--data", "{}") == "422"
    response = httpx.post(url, headers=HEADERS | {"Content-Type": "application/json"}, content=bytes(5_000_000))
    assert response.status_code == 413
    assert httpx.get(url.replace("/api/v1", "/healthz")).json()["status"] == "ok"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
@pytest.mark.parametrize("served", [(), ("nohup",)], indirect=True, ids=["stops", "goes on under nohup"])
def test_a_hang_up(request: pytest.FixtureRequest, served: tuple[str, subprocess.Popen[str]]) -> None:
    url, server = served
    server.send_signal(signal.SIGHUP)
    if "nohup" in request.node.name:
        time.sleep(0.5)
        assert httpx.get(url.replace("/api/v1", "/healthz")).status_code == 200
    else:
        assert server.wait(20) == 0


@needs_weights
def test_a_picture_by_curl(served: tuple[str, object], tmp_path: Path) -> None:
    file, request = tmp_path / "output.png", json.dumps(body() | {"model": LIGHTNING})
    command = ["curl", "-sS", "--fail", served[0], "-d", request, "-o", file, "-D", tmp_path / "headers"]
    headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    subprocess.run([*command, *headers], check=True)
    with Image.open(file) as picture:
        assert picture.size == (256, 256)
    assert f"x-fulgurite-model: {EMBEDDED}" in (tmp_path / "headers").read_text()


@needs_weights
def test_the_published_client(served: tuple[str, object], tmp_path: Path) -> None:
    environment = os.environ | {"API_URL": served[0], "API_KEY": KEY}
    started = time.monotonic()
    subprocess.run([sys.executable, ROOT / "examples" / "client.py"], cwd=tmp_path, env=environment, check=True)
    assert time.monotonic() - started < 120
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (1024, 1024)
        assert "Model: fulgurite/spark" in picture.info["parameters"]
        assert len(picture.convert("L").resize((16, 16)).getcolors() or []) > 8  # a picture, not one flat colour


def test_the_decoder_is_the_requests_choice_and_else_the_operators(engine: FakeEngine, ledger: Ledger) -> None:
    def answer(settings: Settings, **data: str) -> httpx.Response:
        asked = {"model": LIGHTNING, "data": {"prompt": "a red fox", **data}}
        with TestClient(create_app(engine, ledger, settings), headers=HEADERS) as client:
            return client.post("/api/v1", json=asked)

    usual, fast = read_settings(), read_settings(fast_decoder=LIGHTNING)
    for settings, data, wanted in (
        (usual, {}, "full"),
        (usual, {"decoder": "fast"}, "fast"),
        (fast, {}, "fast"),
        (fast, {"decoder": "full"}, "full"),
    ):
        response = answer(settings, **data)
        assert response.headers["x-fulgurite-decoder"] == engine.jobs[-1][1].decoder == wanted
        with Image.open(io.BytesIO(response.content)) as picture:
            assert f"Decoder: {wanted}," in picture.info["parameters"]
    assert error_of(answer(usual, decoder="quick"))["param"] == "data.decoder"


def test_a_model_without_a_fast_decoder_refuses_it(
    engine: FakeEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(card(SPARK), fast_decoder=None)
    monkeypatch.setattr("fulgurite.server.service.card", lambda model: without)
    monkeypatch.setattr("fulgurite.server.catalogue.card", lambda model: without)
    with TestClient(create_app(engine, ledger, read_settings()), headers=HEADERS) as client:
        for path in ("/api/v1", "/api/v1/predictions"):
            response = client.post(path, json=body(decoder="fast"))
            assert response.status_code == 422
            assert error_of(response) == {
                "code": "invalid_parameter",
                "message": "decoder: fulgurite/spark has no 'fast' one, only 'full'.",
                "param": "data.decoder",
            }
        described = client.get(f"/api/v1/models/{SPARK}").json()["parameters"]["properties"]["decoder"]
        assert (described["enum"], described["default"]) == (["full"], "full")
    assert engine.jobs == []
    with pytest.raises(FulguriteError, match="--fast-decoder: fulgurite/spark has no fast decoder"):
        create_app(engine, ledger, read_settings(fast_decoder=SPARK))
