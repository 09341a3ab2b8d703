"""Engines on a Ray cluster: one engine to the server, and no end of one of them loses a picture."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import torch
from conftest import HEADERS, KEY, SPARK, Blank, body, drawn, engine_of, needs_weights
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from watched_replica import WatchedReplica

from fulgurite import Picture, Request, errors
from fulgurite.cluster import ClusterEngine, deployment, open_cluster, replica
from fulgurite.cluster.deployment import share
from fulgurite.cluster.engine import NOWHERE
from fulgurite.cluster.replica import Event, Place, Replica, StepTold
from fulgurite.engine import Loader
from fulgurite.errors import BusyError, DeviceError, FulguriteError, NotFiniteError, RequestError
from fulgurite.settings import read_settings

pytestmark = pytest.mark.xdist_group("cluster")
LIGHTNING = f"{SPARK}-lightning"
FOX = Request("a red fox", width=256, height=256, num_steps=4, seed=1)
PICTURE = drawn(SPARK, FOX)
LOST = ray.exceptions.ActorDiedError()
Draw = Callable[[str, Request, str, bool], AsyncIterator[Event]]


def cluster_of(draw: Draw, *, replicas: int = 1, deadline_seconds: float = 60) -> ClusterEngine:
    return ClusterEngine(draw, lambda: replicas, 2, deadline_seconds, lambda: None)


class Scripted:
    """Replicas that tell what they are made to, each time the next line, and then no more until nobody listens."""

    def __init__(self, *lines: Sequence[Event | Exception]) -> None:
        self.lines, self.requests = list(lines), list[Request]()
        self.left = threading.Event()

    async def __call__(self, model: str, request: Request, key: str, steps_told: bool) -> AsyncIterator[Event]:
        self.requests.append(request)
        try:
            for event in self.lines.pop(0):
                if isinstance(event, Exception) and not isinstance(event, FulguriteError):
                    raise event
                yield event
            await asyncio.sleep(60)
        finally:
            self.left.set()


def step(done: int) -> StepTold:
    return StepTold(done, 4, None)


@pytest.mark.parametrize(
    "lost", [LOST, ray.exceptions.OutOfMemoryError("killed"), ray.exceptions.NodeDiedError("gone")]
)
def test_a_picture_whose_replica_is_lost_is_drawn_by_another_from_the_same_seed(lost: Exception) -> None:
    replicas = Scripted([Place(0, 0, True), step(1), step(2), lost], [step(1), step(2), step(3), step(4), PICTURE])
    told: list[tuple[int, int]] = []
    with closing(cluster_of(replicas)) as cluster:
        job = cluster.submit(SPARK, replace(FOX, seed=None), lambda done, steps, _: told.append((done, steps)))
        assert job.result(20) is PICTURE
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert cluster.stats() == {"queued": 0, "running": 0, "done": 1, "failed": 0, "redrawn": 1, "replicas": 1}
    first, second = replicas.requests
    assert first == second
    assert first.seed is not None


@pytest.mark.parametrize("how", [LOST, DeviceError("The device failed, so this picture is lost.")])
def test_a_picture_that_no_replica_survives_is_given_up(how: Exception) -> None:
    replicas = Scripted(*[[how]] * 3)
    with closing(cluster_of(replicas)) as cluster:
        with pytest.raises(DeviceError, match="one after the other"):
            cluster.submit(SPARK, FOX).result(20)
        assert len(replicas.requests) == 3
        assert cluster.stats()["failed"] == 1


@pytest.mark.parametrize("error", [NotFiniteError("No numbers."), RuntimeError("a bug"), BusyError("Full.", 7)])
def test_what_another_replica_would_do_no_better_is_not_tried_again(error: Exception) -> None:
    replicas = Scripted([error])
    with closing(cluster_of(replicas)) as cluster:
        assert cluster.submit(SPARK, FOX).exception(20) is error
        assert cluster.stats()["failed"] == (not isinstance(error, BusyError))


def test_requests_that_cannot_be_drawn_are_refused_at_once() -> None:
    with closing(cluster_of(Scripted())) as cluster:
        with pytest.raises(RequestError, match="acme/nope"):
            cluster.submit("acme/nope", FOX)
        assert cluster.stats()["queued"] == 0


def test_nobody_waits_longer_than_the_deadline() -> None:
    replicas = Scripted([])
    with closing(cluster_of(replicas, deadline_seconds=0.05)) as cluster:
        with pytest.raises(BusyError, match=r"within 0\.05 s"):
            cluster.submit(SPARK, FOX).result(20)
        assert replicas.left.wait(20)


def test_who_goes_away_frees_the_replica() -> None:
    replicas = Scripted([Place(0, 0, True)])
    with closing(cluster_of(replicas)) as cluster:
        job = cluster.submit(SPARK, FOX)
        while not cluster.stats()["running"]:
            time.sleep(0.01)
        assert job.running()
        cluster.cancel(job)
        assert replicas.left.wait(20)
        assert job.cancelled()
        assert not job.running()
        while cluster.stats()["running"]:
            time.sleep(0.01)


@pytest.mark.parametrize("seconds", [None, 0])
def test_closing_ends_what_is_being_drawn(seconds: float | None) -> None:
    ended: list[bool] = []
    cluster = ClusterEngine(Scripted([]), lambda: 1, 2, 60, lambda: ended.append(True))
    job = cluster.submit(SPARK, FOX)
    cluster.close(seconds)
    assert ended
    assert job.cancelled()
    assert cluster.state() == "failed"
    with pytest.raises(BusyError, match="shutting down"):
        cluster.submit(SPARK, FOX)


def test_its_state_is_that_of_all_replicas() -> None:
    waits = [Place(1, 2.5, False)]
    with closing(cluster_of(Scripted(*[waits] * 4), replicas=2)) as cluster:  # each with a queue of two
        jobs: list[Future[Picture]] = []
        for state in ("ready", "ready", "ready", "ready", "busy"):
            assert cluster.state() == state
            jobs.append(cluster.submit(SPARK, FOX) if state == "ready" else jobs[0])
        while cluster.position(jobs[0]) != 1:
            time.sleep(0.01)
        with pytest.raises(BusyError, match="All 4 places") as refused:
            cluster.submit(SPARK, FOX)
        assert refused.value.retry_after >= 3
        assert cluster.seconds_until_begun(jobs[0]) == 2.5
    with closing(cluster_of(Scripted(), replicas=0)) as cluster:
        assert cluster.state() == "failed"


def test_a_replica_tells_a_jobs_place_its_steps_and_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "LOOK_SECONDS", 0.02)
    go = threading.Event()
    blank = Blank(lambda stage, rows: go.wait(20) if stage == "step" else None)

    async def events() -> list[Event]:
        found: list[Event] = []
        async for event in Replica(lambda say: engine).draw(SPARK, FOX, "", True):
            found.append(event)
            if isinstance(event, Place) and event.begun:
                go.set()
        return found

    with closing(engine_of(blank)) as engine:
        found = asyncio.run(events())
    assert [event.done for event in found if isinstance(event, StepTold)] == [1, 2, 3, 4]
    assert any(isinstance(event, Place) and event.begun for event in found)
    assert isinstance(found[-1], Picture)


def test_a_replica_frees_the_device_when_nobody_listens() -> None:
    go = threading.Event()
    blank = Blank(lambda stage, rows: go.wait(20) if stage == "step" else None)

    async def listen_a_little(one: Replica) -> None:
        events = one.draw(SPARK, FOX, "", False)
        await anext(events)
        await events.aclose()

    with closing(engine_of(blank)) as engine:
        asyncio.run(listen_a_little(Replica(lambda say: engine)))
        assert engine.stats()["queued"] == engine.stats()["running"] == 0
        go.set()


def test_a_replica_whose_device_failed_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: str, rows: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    ended: list[int] = []

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        ended.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)

    async def events(one: Replica) -> list[Event]:
        return [event async for event in one.draw(SPARK, FOX, "", False)]

    with closing(engine_of(Blank(fail))) as engine:
        one = Replica(lambda say: engine)
        one.check_health()
        with pytest.raises(Ended):
            asyncio.run(events(one))
        assert ended == [1]
        with pytest.raises(DeviceError):
            one.check_health()


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 8)), min_size=1, max_size=6), st.integers(1, 50))
def test_replicas_have_as_many_processors_as_all_can_have(machines: list[tuple[int, int]], replicas: int) -> None:
    def room(each: int) -> int:
        return sum(min(processors // each, places) for processors, places in machines)

    each = share(machines, replicas)
    assert each >= 1
    assert room(each) >= replicas or each == 1
    assert room(each + 1) < replicas


@pytest.mark.parametrize(
    "error",
    [
        BusyError("Full.", 7),
        RequestError("seed: too large", "seed"),
        errors.UnknownModelError("a/b", ["c/d"]),
        errors.OutOfMemoryError(),
        errors.UnknownKeyError("k"),
        errors.SettingError("device", "no"),
        errors.NotPulledError("Pull it."),
    ],
)
def test_errors_are_the_same_in_another_process(error: FulguriteError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert (str(there), vars(there)) == (str(error), vars(error))


def test_each_replica_has_a_device_of_its_own() -> None:
    with pytest.raises(FulguriteError, match=r"^--device: .* cuda or cpu, not 'cuda:1'"):
        open_cluster(read_settings(device="cuda:1", replicas=2), print)
    assert not ray.is_initialized()


# On a real cluster, of two replicas on this machine


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterEngine]:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ADDRESS", "local")
        environment.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's workers'
        environment.setattr(deployment, "Replica", WatchedReplica)
        settings = read_settings(
            home=tmp_path_factory.mktemp("home"), replicas=2, device="cpu", warm=(f"{LIGHTNING}:4",)
        )
        with closing(open_cluster(settings, said.append)) as cluster:
            assert any("is warm" in line for line in said)
            while cluster.stats()["replicas"] < 2:
                time.sleep(0.1)
            yield cluster


@pytest.fixture
def alone(cluster: ClusterEngine) -> Iterator[Loader]:
    """Draws here, with as many threads as each replica has."""
    before = torch.get_num_threads()
    torch.set_num_threads(share([(int(ray.cluster_resources()["CPU"]), 2)], 2))
    yield Loader("cpu")
    torch.set_num_threads(before)


def replica_names() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::")]


@needs_weights
def test_replicas_draw_what_one_engine_draws(cluster: ClusterEngine, alone: Loader) -> None:
    requests = [replace(FOX, seed=seed, prompt=f"a {colour} fox") for seed in range(4) for colour in ("red", "blue")]
    jobs = [cluster.submit(LIGHTNING, request, key=str(request.seed)) for request in requests]
    pipeline = alone(LIGHTNING, 4)
    for request, job in zip(requests, jobs, strict=True):
        picture = job.result(60)
        assert picture.image.tobytes() == pipeline.draw(request).image.tobytes()
        assert (picture.request, picture.steps) == (request, 4)
    assert cluster.stats()["replicas"] == 2


@needs_weights
def test_what_is_wrong_is_told_as_by_an_engine(cluster: ClusterEngine) -> None:
    with pytest.raises(FulguriteError, match="are not on this machine"):
        cluster.submit("bytedance/stable-diffusion-xl-lightning", FOX).result(60)


@needs_weights
def test_who_goes_away_frees_the_replica_on_a_cluster_too(cluster: ClusterEngine) -> None:
    [name] = serve.status().applications
    replicas = serve.get_app_handle(name)

    def of_both(*names: str) -> int:
        return sum(found[name] for found in replicas.broadcast("stats").results(timeout_s=60) for name in names)

    before = of_both("done")
    jobs = [cluster.submit(SPARK, replace(FOX, seed=seed, num_steps=20)) for seed in range(60)]
    while any(job.place is NOWHERE for job in jobs):  # each is in a replica's queue
        time.sleep(0.01)
    for job in jobs:
        cluster.cancel(job)

    while of_both("queued", "running"):
        time.sleep(0.1)
    assert of_both("done") - before < 30


@needs_weights
def test_a_replica_that_is_killed_loses_no_picture(cluster: ClusterEngine, alone: Loader) -> None:
    requests = [replace(FOX, seed=seed, num_steps=8) for seed in range(24)]
    ways, first_step = cluster._draw, threading.Event()
    tries: list[Request] = []

    def counted(model: str, request: Request, *arguments: object) -> AsyncIterator[Event]:
        tries.append(request)
        return ways(model, request, *arguments)

    cluster._draw = counted
    try:
        jobs = [cluster.submit(LIGHTNING, request, lambda *_: first_step.set()) for request in requests]
        assert first_step.wait(60)
        victim = replica_names()[0]
        ray.kill(ray.get_actor(victim, namespace="serve"))
        assert not wait(jobs, 120).not_done
    finally:
        cluster._draw = ways
    assert len(tries) > len(requests)
    pipeline = alone(LIGHTNING, 8)
    for request, job in zip(requests, jobs, strict=True):
        assert job.result().image.tobytes() == pipeline.draw(request).image.tobytes()
    until = time.monotonic() + 60
    while (len(names := replica_names()) < 2 or victim in names) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(names) == 2  # another took its place


@needs_weights
def test_a_server_over_a_cluster_and_its_end(tmp_path: Path, home: Path) -> None:
    command = [sys.executable, "-m", "fulgurite", "serve", "--replicas", "1", "--port", "0", "--home", str(home)]
    environment = os.environ | {"RAY_ADDRESS": "local", "FULGURITE_API_KEY": KEY}
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            until = time.monotonic() + 90
            while "answers at " not in (said := (tmp_path / "log").read_text()):
                assert server.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.1)
            url = said.partition("answers at ")[2].split()[0]
            answer = httpx.post(url, json=body(num_steps=2) | {"model": LIGHTNING}, headers=HEADERS, timeout=60)
            assert (answer.status_code, answer.headers["x-fulgurite-steps"]) == (200, "2")
            refused = httpx.post(url, json=body(num_steps=0), headers=HEADERS, timeout=60)
            assert refused.status_code == 422
            workers = psutil.Process(server.pid).children(recursive=True)
            assert any("ServeReplica" in worker.name() or "Replica" in " ".join(worker.cmdline()) for worker in workers)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert not psutil.wait_procs(workers, 30)[1]
