"""What /openapi.json says is what the server does, to the last error: schemathesis tries it."""

import httpx
import schemathesis
from conftest import HEADERS, LIGHTNING, FakeEngine, body, drawn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from fulgurite.ledger import Ledger
from fulgurite.records import Limits
from fulgurite.server import create_app
from fulgurite.settings import read_settings

# OpenAPI cannot say that `since` is no later than `until`: there, what fits the schema may be refused.
MORE_THAN_SAID = {"/api/v1/usage": [positive_data_acceptance]}


def test_the_server_does_what_it_says(engine: FakeEngine, ledger: Ledger) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, ledger, read_settings()))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def answers_as_described(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=HEADERS, excluded_checks=MORE_THAN_SAID.get(case.path, []))

        answers_as_described()


def test_every_error_has_our_shape(engine: FakeEngine, ledger: Ledger) -> None:
    described = create_app(engine, ledger, read_settings()).openapi()
    assert "HTTPValidationError" not in str(described)


def test_every_header_of_ours_is_described(engine: FakeEngine, ledger: Ledger) -> None:
    engine.answer = lambda model, request: drawn(model, request, ("a note",))
    _, secret = ledger.keys.create("a", Limits(requests_per_minute=3, pictures_in_flight=1))
    limited = {"Authorization": f"Bearer {secret}", "Idempotency-Key": "once"}
    asked, seen = body() | {"model": LIGHTNING}, set()
    with TestClient(create_app(engine, ledger, read_settings(demo=True))) as client:
        paths = client.get("/openapi.json").json()["paths"]

        def check(path: str, response: httpx.Response) -> None:
            described = paths[path]["post"]["responses"][str(response.status_code)]["headers"]
            ours = {name for name in response.headers if name.startswith("x-")}
            ours |= {"retry-after", "www-authenticate", "idempotent-replayed"} & set(response.headers)
            assert ours <= {name.lower() for name in described}
            seen.update(ours)

        for _ in range(2):
            check("/api/v1", client.post("/api/v1", json=asked, headers=limited))
        check("/api/v1/predictions", client.post("/api/v1/predictions", json=asked, headers=limited))
        check("/api/v1", client.post("/api/v1", json=asked, headers=limited))
        check("/api/v1", client.post("/api/v1", json=asked))
    assert {"retry-after", "www-authenticate", "idempotent-replayed", "x-fulgurite-demo", "x-fulgurite-notes"} <= seen
    assert all(
        "X-Request-Id" in response["headers"]
        for operations in paths.values()
        for operation in operations.values()
        for response in operation["responses"].values()
    )
