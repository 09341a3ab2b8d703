"""Bad input: each a clear error, or a picture where it is valid; never a 500; and the next request works."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import HEADERS, KEY, LIGHTNING, SPARK, FakeEngine, body, engine_of, needs_weights
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fulgurite import Pipeline
from fulgurite.engine import Engine, Loader, Runner
from fulgurite.ledger import Ledger
from fulgurite.server import create_app
from fulgurite.settings import read_settings

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def app(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """The real engine over real, if tiny, networks, and a real ledger."""
    engine = engine_of(tiny)
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('bad')}/ledger.db")
    ledger.keys.set_from_environment(KEY)
    yield create_app(engine, ledger, read_settings())
    engine.close()
    ledger.close()


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, text: str | bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    """Sends the bytes, and then a good request, which must work whatever came before."""
    response = client.post("/api/v1", content=text, headers=headers)
    if response.status_code == 200:
        assert response.content.startswith(b"\x89PNG")
    else:
        error = response.json()["error"]
        assert error["code"]
        assert error["message"]
    assert client.post("/api/v1", json=body(num_steps=1)).status_code == 200
    return response


STRANGE = ["nul \0 inside", "\0\0", "שועל אדום", "ثعلب أحمر", "🔥🦊", "  ", "\n\n", "\ufeffa\u202eb"]


@pytest.mark.parametrize("prompt", [*STRANGE, "a" * 100_000, "fox " * 25_000], ids=lambda prompt: ascii(prompt[:20]))
def test_strange_prompts_are_drawn(client: TestClient, prompt: str) -> None:
    for ascii_only in (True, False):
        data = body(prompt=prompt, negative_prompt=prompt, num_steps=1)
        response = post(client, json.dumps(data, ensure_ascii=ascii_only).encode())
        assert response.status_code == 200
    if len(prompt) == 100_000:
        assert "prompt was cut" in response.headers["x-fulgurite-notes"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("prompt", value) for value in ("", "x", "a" * 100_001, None, 7, ["a fox"], {})],
        *[("negative_prompt", value) for value in ("a" * 100_001, False)],
        *[
            (side, value)
            for side in ("height", "width")
            for value in (255, 2049, 256.5, "512", None, True, -512, 10**400)
        ],
        *[("num_steps", value) for value in (0, 21, -1, 4.5, "4", None)],
        *[("guidance", value) for value in (float("nan"), float("inf"), float("-inf"), -0.1, 31, "7", None)],
        *[("seed", value) for value in (-1, 2**64, 1.5, "7")],
        *[("sampler", "Euler"), ("Prompt", "a fox"), ("", 1), ("\x00" * 300, 1)],
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_bad_parameters_are_refused_by_name(client: TestClient, field: str, value: object) -> None:
    response = post(client, json.dumps(body(**{field: value})))
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "invalid_parameter"
    assert error["param"].startswith("data." + field[:90])


def test_null_is_left_out(engine: FakeEngine, ledger: Ledger) -> None:
    """So it is another's retry too, and has the operator's decoder."""
    nothing = {"seed": None, "negative_prompt": None, "decoder": None}
    with TestClient(create_app(engine, ledger, read_settings(fast_decoder=(SPARK,))), headers=HEADERS) as client:
        for asked in (body(**nothing), body()):
            drawn = client.post("/api/v1", json=asked, headers={"Idempotency-Key": "once"})
            assert (drawn.status_code, drawn.headers["x-fulgurite-decoder"]) == (200, "fast")
        assert len(engine.jobs) == 1
        asked = {"model": SPARK, "prompt": "a red fox", "n": 2} | nothing
        assert client.post("/v1/images/generations", json=asked).status_code == 200
    seeds = {request.seed for _, request in engine.jobs}
    assert len(seeds) == 3
    assert None not in seeds


@pytest.mark.parametrize(("field", "value"), [("height", 256), ("width", 257), ("seed", 2**64 - 1), ("guidance", 0)])
def test_the_bounds_themselves_are_drawn(client: TestClient, field: str, value: object) -> None:
    assert (
        post(client, json.dumps(body(num_steps=1) | {"data": body(num_steps=1)["data"] | {field: value}})).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("{}", "model"),
        ("[]", None),
        ("null", None),
        ("7", None),
        ('"text"', None),
        (json.dumps({"model": SPARK}), "data"),
        (json.dumps({"model": SPARK, "data": []}), "data"),
        (json.dumps({"model": SPARK, "data": None}), "data"),
        (json.dumps({"model": None} | {"data": body()["data"]}), "model"),
        (json.dumps({"model": "m" * 201} | {"data": body()["data"]}), "model"),
        (json.dumps(body() | {"stream": "yes"}), "stream"),
        (json.dumps(body() | {"batch": 2}), "batch"),
        (json.dumps({"model": SPARK, "data": {}}), "data.prompt"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_json_of_the_wrong_shape(client: TestClient, text: str, param: str | None) -> None:
    response = post(client, text)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"prompt=a+fox",
        b"\xff\xfe{\x00}\x00",
        b'{"model": "' + SPARK.encode() + b'", "data": {"prompt": "\xff\xff"}}',
        json.dumps(body(prompt="lone \ud800 surrogate")).encode(),
        json.dumps(body(prompt="\udc00\ud800")).encode(),
        json.dumps(body()).encode()[:-1],
        json.dumps(body()).encode() + b"}",
        b'{"a":' * 100_000,
        b"[" * 1_000_000,
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_broken_json(client: TestClient, text: bytes) -> None:
    response = post(client, text)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert len(response.text) < 1000


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\xff"]
)
def test_wrong_or_no_content_type(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind.encode("latin-1")}
    response = post(client, json.dumps(body()), headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_content_types_that_are_json(client: TestClient) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert post(client, json.dumps(body(num_steps=1)), {"Content-Type": kind}).status_code == 200


def test_bodies_that_are_too_large(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000_000

    for content in (b" " * (1 << 20) + b" ", endless()):
        response = post(client, content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_weights_that_are_not_there_say_how_to_pull_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ledger: Ledger
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    engine = Engine(lambda: Runner(Loader("cpu")))
    try:
        with TestClient(create_app(engine, ledger, read_settings()), headers=HEADERS) as client:
            response = client.post("/api/v1", json=body() | {"model": LIGHTNING})
    finally:
        engine.close()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_pulled")
    assert f"fulgurite pull {LIGHTNING}" in response.json()["error"]["message"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["prompt", "negative_prompt", "height", "width", "num_steps", "guidance", "seed"]
NEARLY = st.fixed_dictionaries(
    {"model": st.just(SPARK) | ANYTHING, "data": st.dictionaries(st.sampled_from(NAMES) | st.text(), ANYTHING)},
    optional={"more": ANYTHING},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NEARLY | ANYTHING)
def test_no_json_is_ever_a_500(client: TestClient, value: object) -> None:
    """Strings here may hold lone surrogates, which JSON can say and UTF-8 cannot."""
    response = client.post("/api/v1", content=json.dumps(value), headers=JSON)
    assert response.status_code in (200, 400, 404, 422)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"code", "message", "param"}


@needs_weights
def test_strange_prompts_with_the_embedded_model(ledger: Ledger) -> None:
    engine = Engine(lambda: Runner(Loader("cpu")))
    try:
        app = create_app(engine, ledger, read_settings())
        with TestClient(app, headers=HEADERS) as client:
            for prompt in ("\0\0", "🔥🦊", "שועל אדום", "a" * 100_000):
                assert post(client, json.dumps(body(prompt=prompt, num_steps=1))).status_code == 200
    finally:
        engine.close()
