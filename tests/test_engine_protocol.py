"""What the server asks of an engine: of the real one, of a cluster's, and of the fake of the server's tests."""

import inspect
from collections.abc import Iterator
from contextlib import closing

import pytest
from conftest import SPARK, Blank, FakeEngine, engine_of

from fulgurite import Request
from fulgurite.cluster import ClusterEngine
from fulgurite.cluster.replica import Replica
from fulgurite.engine import Engine as RealEngine
from fulgurite.server.protocol import Engine

FOX = Request("a red fox", width=256, height=256, num_steps=4, seed=1)
METHODS = [name for name, _ in inspect.getmembers(Engine, inspect.isfunction) if not name.startswith("_")]


@pytest.fixture(params=["real", "cluster", "fake"])
def either(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "fake":
        yield FakeEngine()
        return
    with closing(engine_of(Blank())) as engine:
        if request.param == "real":
            yield engine
        else:
            replica = Replica(lambda say: engine)
            with closing(ClusterEngine(replica.draw, lambda: 1, 64, 60, lambda: None)) as cluster:
                yield cluster


def test_the_protocol_is_small_and_every_part_of_it_documented() -> None:
    assert METHODS == ["cancel", "position", "seconds_until_begun", "state", "stats", "submit"]
    assert all(getattr(Engine, name).__doc__ for name in METHODS)


@pytest.mark.parametrize("engine", [RealEngine, ClusterEngine, FakeEngine])
@pytest.mark.parametrize("name", METHODS)
def test_an_engine_takes_what_the_protocol_says(engine: type, name: str) -> None:
    wanted, found = (inspect.signature(getattr(of, name)).parameters for of in (Engine, engine))
    assert [(p.name, p.default) for p in wanted.values()] == [(p.name, p.default) for p in found.values()]


def test_a_job_tells_its_steps_and_ends_in_its_picture(either: Engine) -> None:
    told: list[tuple[int, int]] = []
    job = either.submit(SPARK, FOX, lambda done, steps, preview: told.append((done, steps)), key="a")
    picture = job.result(20)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (picture.model, picture.steps, picture.image.size) == (SPARK, 4, (256, 256))
    assert (either.position(job), either.seconds_until_begun(job)) == (0, 0)
    stats = either.stats()
    assert {name: stats[name] for name in ("queued", "running", "done", "failed")} == {
        "queued": 0,
        "running": 0,
        "done": 1,
        "failed": 0,
    }
    assert either.state() == "ready"
    either.cancel(job)  # too late, and no harm
    assert job.result(0) is picture
