"""What /openapi.json says is what the server does, to the last error: schemathesis tries it."""

import schemathesis
from conftest import HEADERS, FakeEngine
from hypothesis import HealthCheck, given, settings

from fulgurite.ledger import Ledger
from fulgurite.server import create_app
from fulgurite.settings import read_settings


def test_the_server_does_what_it_says(engine: FakeEngine, ledger: Ledger) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, ledger, read_settings()))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def answers_as_described(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=HEADERS)

        answers_as_described()
