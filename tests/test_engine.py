"""The engine, over pipelines that draw nothing, and over real ones for the bits of their pictures."""

import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPARK, Blank, Loads, engine_of, needs_bfloat16, needs_weights

from fulgurite import Picture, Pipeline, Request
from fulgurite.engine import Engine, Runner
from fulgurite.engine.runner import Drawing
from fulgurite.engine.scheduler import Group
from fulgurite.errors import BusyError, DeviceError, FulguriteError, NotFiniteError, OutOfMemoryError, RequestError
from fulgurite.pipeline import Encoded, Row

LIGHTNING = "bytedance/stable-diffusion-xl-lightning"
FOX = Request("a red fox", width=256, height=256, num_steps=4, seed=1)


class Gate:
    """Lets no step pass until it is open, and notes who was drawn."""

    def __init__(self) -> None:
        self.stepping, self.open = threading.Event(), threading.Event()
        self.steps: list[list[str]] = []
        self.finished: list[str] = []

    def __call__(self, stage: str, rows: Sequence[Row]) -> None:
        if stage == "step":
            self.stepping.set()
            assert self.open.wait(20)
            self.steps.append([row.request.prompt for row in rows])
        if stage == "finish":
            self.finished.append(rows[0].request.prompt)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def counts(engine: Engine) -> dict[str, int]:
    return {name: n for name, n in engine.stats().items() if name in ("queued", "running", "done", "failed")}


def test_jobs_join_and_leave_the_batch_at_any_step() -> None:
    gate = Gate()
    with closing(engine_of(Blank(gate))) as engine:
        long = engine.submit(SPARK, replace(FOX, prompt="long", num_steps=8))
        assert gate.stepping.wait(20)
        short = engine.submit(SPARK, replace(FOX, prompt="short", num_steps=1))
        gate.open.set()
        assert short.result(20).steps == 1
        assert long.result(20).steps == 8
    assert gate.finished == ["short", "long"]
    assert sorted(gate.steps[1]) == ["long", "short"]
    assert len(gate.steps) == 8


def test_past_the_queues_bound_it_says_when_to_come_back() -> None:
    gate = Gate()
    with closing(engine_of(Blank(gate), queue_size=2)) as engine:
        first = engine.submit(SPARK, FOX)
        assert gate.stepping.wait(20)
        waiting = [engine.submit(SPARK, FOX) for _ in range(2)]
        assert [engine.position(job) for job in (first, *waiting)] == [0, 0, 1]
        assert engine.seconds_until_begun(first) == 0 < engine.seconds_until_begun(waiting[1])
        with pytest.raises(BusyError, match="2 places") as busy:
            engine.submit(SPARK, FOX)
        assert busy.value.retry_after >= 1
        assert counts(engine) == {"queued": 2, "running": 1, "done": 0, "failed": 0}
        gate.open.set()
        for job in (first, *waiting):
            job.result(20)
        engine.submit(SPARK, FOX).result(20)


def test_cancelled_jobs_are_never_finished_and_free_their_places() -> None:
    gate = Gate()
    with closing(engine_of(Blank(gate), queue_size=2)) as engine:
        running = engine.submit(SPARK, replace(FOX, prompt="running"))
        assert gate.stepping.wait(20)
        waiting, by_future = (engine.submit(SPARK, replace(FOX, prompt="waiting")) for _ in range(2))
        engine.cancel(waiting)
        assert waiting.cancelled()
        assert by_future.cancel()
        engine.cancel(running)
        with pytest.raises(BusyError, match="stopped"):
            running.result(0)
        last = engine.submit(SPARK, replace(FOX, prompt="last"))
        gate.open.set()
        last.result(20)
        assert gate.finished == ["last"]
        until(lambda: counts(engine) == {"queued": 0, "running": 0, "done": 1, "failed": 0})


@pytest.mark.parametrize("stage", ["start", "step", "finish"])
@pytest.mark.parametrize("error", [RequestError("no", "prompt"), ValueError("bug"), StopIteration(), SystemExit(3)])
def test_a_failure_is_its_own_jobs_alone(stage: str, error: BaseException) -> None:
    def on(at: str, rows: Sequence[Row]) -> None:
        if at == stage and any(row.request.prompt == "bad" for row in rows):
            raise error

    with closing(engine_of(Blank(on))) as engine:
        jobs = [engine.submit(SPARK, replace(FOX, prompt=prompt)) for prompt in ("good", "bad", "fine")]
        assert [job.exception(20) is None for job in jobs] == [True, False, True]
        failure = jobs[1].exception()
        assert failure is error if isinstance(error, FulguriteError) else failure.__cause__ is error
        assert counts(engine) == {"queued": 0, "running": 0, "done": 2, "failed": 1}


def test_a_callback_that_fails_is_its_own_jobs_failure() -> None:
    def broken(done: int, steps: int, preview: object) -> None:
        raise ValueError("bug")

    with closing(engine_of(Blank())) as engine:
        bad, good = engine.submit(SPARK, FOX, broken), engine.submit(SPARK, FOX)
        assert isinstance(bad.exception(20), RuntimeError)
        assert good.result(20)


def test_out_of_memory_splits_the_batch_and_is_learned() -> None:
    sizes: list[int] = []

    def on(stage: str, rows: Sequence[Row]) -> None:
        if stage == "step":
            sizes.append(len(rows))
            if len(rows) > 2 or rows[0].request.prompt == "huge":
                raise torch.OutOfMemoryError("CUDA out of memory")

    with closing(engine_of(Blank(on))) as engine:
        jobs = [engine.submit(SPARK, replace(FOX, prompt=f"fox {i}")) for i in range(6)]
        for job in jobs:
            job.result(20)
        refused = sum(size > 2 for size in sizes)
        huge, good = engine.submit(SPARK, replace(FOX, prompt="huge")), engine.submit(SPARK, FOX)
        assert isinstance(huge.exception(20), OutOfMemoryError)
        assert good.result(20)
        assert sum(size > 2 for size in sizes) == refused


def test_two_rows_that_do_not_fit_are_an_error_at_once_whatever_was_learned_of_one() -> None:
    """Inexact batches begin at one row; a guided picture of an undistilled model has two."""
    full = [True]

    def on(stage: str, rows: Sequence[Row]) -> None:
        if stage == "step" and full and sum(row.plan.network_rows for row in rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    alone = replace(FOX, guidance=0.0)
    with closing(Engine(lambda: Runner(Loads(Blank(on)), exact=False))) as engine:
        pairs = [engine.submit(SPARK, alone) for _ in range(4)]
        assert all(job.result(20) for job in pairs)  # by which it has learned that one row fits
        assert isinstance(engine.submit(SPARK, FOX).exception(20), OutOfMemoryError)
        full.clear()
        assert engine.submit(SPARK, FOX).result(20)


def test_a_checkpoint_that_the_loader_gives_up_is_gone() -> None:
    loads = Loads(Blank())
    runner = Runner(loads)
    group, drawing = Group(SPARK, 0, (16, 32, 32)), Drawing(FOX, None)
    for stage in ("encode", "step"):
        assert runner.run(stage, group, [drawing]).moved == [drawing]
    first, loads.pipeline = weakref.ref(loads.pipeline), Blank()
    gc.collect()
    assert first() is None


def test_what_a_step_held_is_free_when_it_is_tried_again() -> None:
    """The first try's tensors would else still be there, and the second fail as well."""
    held: list[weakref.ref[torch.Tensor]] = []

    def on(stage: str, rows: Sequence[Row]) -> None:
        if stage in ("step", "finish"):
            assert all(tensor() is None for tensor in held)
            tensor = torch.zeros(8)
            if not held or (stage, len(held)) == ("finish", 1):
                held.append(weakref.ref(tensor))
                raise torch.OutOfMemoryError("CUDA out of memory")

    with closing(engine_of(Blank(on))) as engine:
        assert engine.submit(SPARK, FOX).result(20)
    assert len(held) == 2


def test_what_a_failed_stage_held_is_free_while_the_engine_waits() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def on(stage: str, rows: Sequence[Row]) -> None:
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise ZeroDivisionError("no picture")

    with closing(engine_of(Blank(on))) as engine:
        assert engine.submit(SPARK, FOX).exception(20)
        deadline = time.monotonic() + 20
        while any(tensor() is not None for tensor in held):
            gc.collect()
            assert time.monotonic() < deadline


def test_a_device_that_fails_is_told_of_until_a_stage_works_again(caplog: pytest.LogCaptureFixture) -> None:
    def on(stage: str, rows: Sequence[Row]) -> None:
        if rows[0].request.prompt == "broken":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if rows[0].request.prompt == "bug":
            raise ZeroDivisionError

    with closing(engine_of(Blank(on))) as engine:
        with pytest.raises(DeviceError, match="this picture is lost"):
            engine.submit(SPARK, replace(FOX, prompt="broken")).result(20)
        assert engine.state() == "failed"
        assert "illegal memory access" in caplog.text
        assert engine.submit(SPARK, replace(FOX, prompt="bug")).exception(20)
        assert engine.state() == "failed"
        assert engine.submit(SPARK, FOX).result(20)
        assert engine.state() == "ready"


@pytest.mark.parametrize("stage", ["start", "finish"])
def test_out_of_memory_at_any_stage_makes_room_or_is_its_own_jobs_error(stage: str) -> None:
    """Once memory is short for "tight", until the other checkpoints went; for "huge" it always is."""
    dropped: list[tuple[str, int]] = []

    def on(at: str, rows: Sequence[Row]) -> None:
        name = rows[0].request.prompt
        if at == stage and (name == "huge" or (name == "tight" and not dropped)):
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Drops(Loads):
        def drop_others(self, model: str, steps: int) -> None:
            dropped.append((model, steps))

    with closing(Engine(lambda: Runner(Drops(Blank(on))))) as engine:
        assert engine.submit(SPARK, replace(FOX, prompt="tight")).result(20)
        assert dropped == [(SPARK, 0)]
        huge, good = engine.submit(SPARK, replace(FOX, prompt="huge")), engine.submit(SPARK, FOX)
        assert isinstance(huge.exception(20), OutOfMemoryError)
        assert good.result(20)


def test_out_of_memory_while_a_larger_batch_is_proven_fails_nobody() -> None:
    class Proves(Blank):
        def agrees(self, latent_size: tuple[int, int], parts: Sequence[int]) -> bool:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gate = Gate()
    with closing(engine_of(Proves(gate))) as engine:
        first = engine.submit(SPARK, FOX)
        assert gate.stepping.wait(20)
        others = [engine.submit(SPARK, FOX) for _ in range(5)]
        gate.open.set()
        assert all(job.result(20) for job in (first, *others))
    assert max(map(len, gate.steps)) == 1


@pytest.mark.parametrize("stage", ["start", "step", "finish"])
def test_a_hung_device_fails_what_ran_and_the_next_request_succeeds(stage: str) -> None:
    forever = threading.Event()
    hangs = [True]

    def on(at: str, rows: Sequence[Row]) -> None:
        if at == stage and hangs:
            hangs.pop()
            forever.wait(20)

    with closing(engine_of(Blank(on), hang_seconds=0.2)) as engine:
        assert isinstance(engine.submit(SPARK, FOX).exception(20), DeviceError)
        assert engine.submit(SPARK, FOX).result(20)
        forever.set()
        assert engine.submit(SPARK, FOX).result(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_amid_its_work_fails_what_it_had_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with closing(engine_of(Blank(gate))) as engine:
        begun = engine.submit(SPARK, FOX)
        assert gate.stepping.wait(20)
        waiting = engine.submit(SPARK, FOX)
        real, faults = engine._scheduler.ran, iter([ZeroDivisionError])

        def ran(*done: Any) -> None:
            for fault in faults:
                raise fault
            real(*done)

        monkeypatch.setattr(engine._scheduler, "ran", ran)
        gate.open.set()
        assert isinstance(begun.exception(20), DeviceError)
        assert waiting.result(20)
        assert engine.submit(SPARK, FOX).result(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_threads_that_die_one_after_the_other() -> None:
    broken = [True]

    def make() -> Runner:
        if broken:
            raise ZeroDivisionError
        return Runner(Loads(Blank()))

    with closing(Engine(make)) as engine:
        assert isinstance(engine.submit(SPARK, FOX).exception(20), DeviceError)
        until(lambda: engine.state() == "failed")
        broken.clear()
        until(lambda: engine.state() == "ready")
        assert isinstance(engine.submit(SPARK, FOX).exception(20), DeviceError | None)  # ends, either way
        assert engine.submit(SPARK, FOX).result(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_replaced() -> None:
    made: list[int] = []

    def make() -> Runner:
        made.append(1)
        if len(made) == 1:
            raise ZeroDivisionError
        return Runner(Loads(Blank()))

    with closing(Engine(make)) as engine:
        assert engine.submit(SPARK, FOX).result(20)


def test_late_jobs_are_given_up_and_refused_whatever_the_device_does() -> None:
    gate = Gate()
    with closing(engine_of(Blank(gate), deadline_seconds=0.1)) as engine:
        job = engine.submit(SPARK, replace(FOX, num_steps=8))
        assert gate.stepping.wait(20)
        with pytest.raises(BusyError, match="within"):
            engine.submit(SPARK, FOX)
        with pytest.raises(BusyError, match="not made within"):
            job.result(10)  # while its step still waits
        gate.open.set()


def test_a_prompt_that_comes_again_is_not_encoded_again() -> None:
    encoded: list[str] = []

    class Encodes(Blank):
        def encode(self, prompt: str) -> Encoded:
            encoded.append(prompt)
            return super().encode(prompt)

    with closing(engine_of(Encodes())) as engine:
        for prompt in ("fox", "boat", "fox"):
            assert engine.submit(SPARK, replace(FOX, prompt=prompt)).result(20)
    assert encoded == ["fox", "boat"]


def test_close_ends_everything_within_a_step() -> None:
    gate = Gate()
    engine = engine_of(Blank(gate))
    job = engine.submit(SPARK, FOX)
    assert gate.stepping.wait(20)
    waiting = engine.submit(SPARK, FOX)
    closer = threading.Thread(target=engine.close)
    closer.start()
    until(waiting.cancelled)
    gate.open.set()
    closer.join(20)
    assert not closer.is_alive()
    assert isinstance(job.exception(0), BusyError)
    with pytest.raises(CancelledError):
        waiting.result(0)
    with pytest.raises(BusyError):
        engine.submit(SPARK, FOX)


def test_close_leaves_a_device_that_hangs_alone() -> None:
    gate = Gate()
    engine = engine_of(Blank(gate), hang_seconds=600)
    job = engine.submit(SPARK, FOX)
    assert gate.stepping.wait(20)
    closer = threading.Thread(target=engine.close, args=(0.1,))
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    assert isinstance(job.exception(0), BusyError)
    gate.open.set()


def test_an_abort_storm_leaves_nothing_behind() -> None:
    """Four clients submit a thousand jobs each and cancel every other at random times, in either way there is."""

    def client(key: str) -> None:
        chance, mine = random.Random(key), []
        for _ in range(1000):
            request = replace(FOX, num_steps=chance.choice((1, 2, 4, 8)), width=chance.choice((256, 300)))
            with suppress(BusyError):  # the queue may be full
                mine.append(engine.submit(SPARK, request, key=key))
            if mine and chance.random() < 0.5:
                victim = chance.choice(mine)
                chance.choice((engine.cancel, Future.cancel))(victim)
        jobs.extend(mine)

    jobs: list[Future[Picture]] = []
    with closing(engine_of(Blank(), queue_size=200)) as engine:
        clients = [threading.Thread(target=client, args=(key,)) for key in "abcd"]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(60)
        ends = Counter(end_of(job) for job in jobs)
        assert ends["done"] > 0 < ends["cancelled"]
        stats = counts(engine)
        assert (stats["queued"], stats["running"], stats["failed"]) == (0, 0, 0)
        assert not engine._scheduler.tasks()
        assert engine.submit(SPARK, FOX).result(20)


def end_of(job: Future[Picture]) -> str:
    try:
        return "done" if job.result(60) else ""
    except (CancelledError, BusyError):
        return "cancelled"


def test_ten_thousand_jobs_leave_no_objects_behind() -> None:
    """Of prompts and sizes that are all different."""

    def objects() -> int:
        import gc

        gc.collect()
        return len(gc.get_objects())

    def draw(numbers: range) -> None:
        for i in numbers:
            asked = (replace(FOX, num_steps=1, prompt=f"{i} {n}", width=256 + i) for n in range(50))
            for job in [engine.submit(LIGHTNING, request, key=request.prompt) for request in asked]:
                assert job.result(60)

    with closing(Engine(lambda: Runner(Loads(Blank()), cache_bytes=1000))) as engine:
        draw(range(100))
        before = objects()
        draw(range(100, 200))
        assert objects() < before + 1500  # what is known of a size, a hundred times
        assert engine.stats()["done"] == 10_000


@needs_weights
@needs_bfloat16
def test_the_embedded_models_pictures_in_half_precision_are_those_of_full_precision() -> None:
    """50 dB and more were measured; 40 dB is beyond what people can see."""
    exact, half = (Pipeline.load(SPARK, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for seed, prompt in enumerate(("a red fox", "a green tree", "a rocket on a black background")):
        request = replace(FOX, prompt=prompt, seed=seed, num_steps=8)
        assert decibels(exact.draw(request), half.draw(request)) > 40


@needs_weights
@pytest.mark.parametrize("steps", [1, 4])
def test_the_embedded_fast_decoders_pictures_are_near_the_full_ones(steps: int) -> None:
    """28 dB and more were measured over 1 to 8 steps; a decoder of other latents would be far below 25."""
    draw = Pipeline.load("fulgurite/spark-lightning", steps=steps)
    for seed, prompt in enumerate(("a red fox", "a green tree", "a rocket on a black background")):
        full = replace(FOX, prompt=prompt, seed=seed, num_steps=steps)
        assert decibels(draw.draw(full), draw.draw(replace(full, decoder="fast"))) > 25


def decibels(a: Picture, b: Picture) -> float:
    """Peak signal to noise, of one picture as another shows it."""
    difference = np.asarray(a.image, float) - np.asarray(b.image, float)
    return float(10 * np.log10(255**2 / (difference**2).mean()))


def test_numbers_that_are_none_are_an_error(tiny: Pipeline) -> None:
    row = tiny.start(replace(FOX, num_steps=1), tiny.encode)
    row.x = row.x * float("nan")
    with pytest.raises(NotFiniteError):
        tiny.finish(row)
