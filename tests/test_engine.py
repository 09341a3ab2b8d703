"""The engine, over pipelines that draw nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager

import pytest
from conftest import SPARK, drawn

from fulgurite import Picture, Pipeline, Request
from fulgurite.engine import Engine, Load, Loader
from fulgurite.errors import BusyError, FulguriteError, RequestError
from fulgurite.pipeline import OnStep

FOX = Request("a red fox", width=256, height=256, num_steps=4)


class Gate:
    """A pipeline that waits at each step until it is let through."""

    def __init__(self) -> None:
        self.started, self.open = threading.Event(), threading.Event()
        self.drawn: list[str] = []

    def draw(self, request: Request, on_step: OnStep | None = None) -> Picture:
        assert on_step
        self.started.set()
        for step in range(request.num_steps):
            assert self.open.wait(10)
            on_step(step + 1, request.num_steps, lambda: None)
        self.drawn.append(request.prompt)
        return drawn(SPARK, request)


@contextmanager
def running(load: Load, queue_size: int = 8) -> Iterator[Engine]:
    engine = Engine(load, queue_size)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def gate() -> Gate:
    return Gate()


def loads(gate: Gate) -> Load:
    return lambda model, steps: gate


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_jobs_are_drawn_in_the_order_they_came(gate: Gate) -> None:
    gate.open.set()
    with running(loads(gate)) as engine:
        jobs = [engine.submit(SPARK, Request(name)) for name in "abcde"]
        assert [job.result(10).request.prompt for job in jobs] == gate.drawn == list("abcde")
        assert engine.stats() == {"queued": 0, "running": 0, "done": 5, "failed": 0}


def test_past_the_queues_bound_it_says_when_to_come_back(gate: Gate) -> None:
    with running(loads(gate), queue_size=2) as engine:
        first = engine.submit(SPARK, FOX)
        assert gate.started.wait(10)
        waiting = [engine.submit(SPARK, FOX) for _ in range(2)]
        with pytest.raises(BusyError, match="2 places") as busy:
            engine.submit(SPARK, FOX)
        assert busy.value.retry_after >= 1
        assert engine.stats() == {"queued": 2, "running": 1, "done": 0, "failed": 0}
        gate.open.set()
        for job in (first, *waiting):
            job.result(10)
        engine.submit(SPARK, FOX).result(10)


def test_a_cancelled_job_frees_its_place_and_is_never_drawn(gate: Gate) -> None:
    with running(loads(gate), queue_size=1) as engine:
        first = engine.submit(SPARK, Request("first", num_steps=1))
        assert gate.started.wait(10)
        unwanted = engine.submit(SPARK, Request("unwanted", num_steps=1))
        engine.cancel(unwanted)
        assert unwanted.cancelled()
        last = engine.submit(SPARK, Request("last", num_steps=1))
        gate.open.set()
        first.result(10)
        last.result(10)
        assert gate.drawn == ["first", "last"]


def test_a_job_cancelled_by_its_future_alone_is_never_drawn(gate: Gate) -> None:
    with running(loads(gate)) as engine:
        engine.submit(SPARK, FOX)
        assert gate.started.wait(10)
        assert engine.submit(SPARK, Request("unwanted")).cancel()
        last = engine.submit(SPARK, Request("last"))
        gate.open.set()
        last.result(10)
        assert gate.drawn == [FOX.prompt, "last"]


def test_a_running_job_that_is_cancelled_stops_at_its_next_step(gate: Gate) -> None:
    with running(loads(gate)) as engine:
        job = engine.submit(SPARK, FOX)
        assert gate.started.wait(10)
        engine.cancel(job)
        gate.open.set()
        with pytest.raises(BusyError, match="stopped"):
            job.result(10)
        assert engine.submit(SPARK, Request("next")).result(10)
        assert gate.drawn == ["next"]
        assert engine.stats()["failed"] == 0


@pytest.mark.parametrize("error", [RequestError("no", "prompt"), ValueError("bug"), StopIteration(), SystemExit(3)])
def test_a_failure_is_its_own_jobs_alone(error: BaseException, gate: Gate) -> None:
    def load(model: str, steps: int) -> Gate:
        if model == "broken":
            raise error
        return gate

    gate.open.set()
    with running(load) as engine:
        bad, good = engine.submit("broken", FOX), engine.submit(SPARK, FOX)
        failure = bad.exception(10)
        assert failure is error if isinstance(error, FulguriteError) else failure.__cause__ is error
        assert good.result(10)
        assert engine.stats() == {"queued": 0, "running": 0, "done": 1, "failed": 1}


def test_close_ends_everything_within_a_step(gate: Gate) -> None:
    engine = Engine(loads(gate))
    job, waiting = engine.submit(SPARK, FOX), engine.submit(SPARK, FOX)
    assert gate.started.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    until(waiting.cancelled)
    gate.open.set()
    closing.join(10)
    assert not closing.is_alive()
    assert isinstance(job.exception(0), BusyError)
    with pytest.raises(CancelledError):
        waiting.result(0)
    with pytest.raises(BusyError):
        engine.submit(SPARK, FOX)


def test_the_loader_keeps_each_checkpoint_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, int]] = []

    def load(model: str, *, steps: int, device: str, dtype: object) -> object:
        loaded.append((model, steps))
        return object()

    monkeypatch.setattr(Pipeline, "load", load)
    loader = Loader("cpu")
    lightning = "bytedance/stable-diffusion-xl-lightning"
    assert loader(lightning, 20) is loader(lightning, 8) is not loader(lightning, 7)
    assert loader(lightning, 4) is loader(lightning, 5)
    assert len(loaded) == 2


def test_a_device_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(FulguriteError, match="FULGURITE_DEVICE: cannot compute on 'abacus' here"):
        Loader("abacus")
