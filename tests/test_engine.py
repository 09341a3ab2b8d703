"""The engine, over pipelines that draw nothing, and over real ones for the bits of their pictures."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SPARK, Blank, Loads, engine_of, needs_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fulgurite import Pipeline, Request
from fulgurite.engine import Engine, Loader, Runner, usable_device
from fulgurite.engine.batches import Batches
from fulgurite.engine.cache import PromptCache
from fulgurite.errors import BusyError, DeviceError, FulguriteError, NotFiniteError, OutOfMemoryError, RequestError
from fulgurite.pipeline import Row

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
        jobs = [engine.submit(SPARK, replace(FOX, prompt=str(i))) for i in range(6)]
        for job in jobs:
            job.result(20)
        refused = sum(size > 2 for size in sizes)
        huge, good = engine.submit(SPARK, replace(FOX, prompt="huge")), engine.submit(SPARK, FOX)
        assert isinstance(huge.exception(20), OutOfMemoryError)
        assert good.result(20)
        assert sum(size > 2 for size in sizes) == refused


def test_a_hung_device_fails_what_ran_and_the_next_request_succeeds() -> None:
    forever = threading.Event()
    hangs = [True]

    def on(stage: str, rows: Sequence[Row]) -> None:
        if stage == "step" and hangs:
            hangs.pop()
            forever.wait(20)

    with closing(engine_of(Blank(on), hang_seconds=0.2)) as engine:
        assert isinstance(engine.submit(SPARK, FOX).exception(20), DeviceError)
        assert engine.submit(SPARK, FOX).result(20)
        forever.set()
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


def test_late_jobs_are_given_up_and_refused() -> None:
    gate = Gate()
    with closing(engine_of(Blank(gate), deadline_seconds=0.1)) as engine:
        job = engine.submit(SPARK, replace(FOX, num_steps=8))
        assert gate.stepping.wait(20)
        with pytest.raises(BusyError, match="within"):
            engine.submit(SPARK, FOX)
        time.sleep(0.1)
        gate.open.set()
        with pytest.raises(BusyError, match="not made within"):
            job.result(20)


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


def test_an_abort_storm_leaves_nothing_behind() -> None:
    chance = random.Random(0)
    with closing(engine_of(Blank(), queue_size=10_000)) as engine:
        jobs = []
        for i in range(3000):
            request = replace(FOX, num_steps=chance.choice((1, 2, 4, 8)), width=chance.choice((256, 300)))
            jobs.append(engine.submit(SPARK, request, key=str(i % 5)))
            if chance.random() < 0.5:
                engine.cancel(chance.choice(jobs))
        for job in jobs:
            with suppress(CancelledError, BusyError):
                assert job.result(60).steps
        stats = counts(engine)
        assert (stats["queued"], stats["running"], stats["failed"]) == (0, 0, 0)
        assert not engine._scheduler.tasks()
        assert engine.submit(SPARK, FOX).result(20)


def test_ten_thousand_jobs_leave_no_objects_behind() -> None:
    def objects() -> int:
        import gc

        gc.collect()
        return len(gc.get_objects())

    with closing(engine_of(Blank(), queue_size=64)) as engine:
        made = 0
        for _ in range(100):
            jobs = [engine.submit(SPARK, replace(FOX, num_steps=1, prompt="same")) for _ in range(50)]
            made += len([job.result(60) for job in jobs])
        before = objects()
        for _ in range(100):
            jobs = [engine.submit(SPARK, replace(FOX, num_steps=1, prompt="same")) for _ in range(50)]
            made += len([job.result(60) for job in jobs])
        assert made == 10_000
        assert objects() < before + 500


REQUESTS = st.builds(
    Request,
    prompt=st.sampled_from(("a red fox", "a blue boat at sea", "night")),
    negative_prompt=st.sampled_from(("", "", "blurry")),
    num_steps=st.integers(1, 5),
    width=st.sampled_from((256, 300)),
    height=st.just(256),
    guidance=st.sampled_from((0.0, 7.5, 9.0)),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_picture_is_the_same_to_the_bit_whoever_shares_its_batch(
    tiny: Pipeline, dtype: torch.dtype, distilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = replace(tiny.card, schedules=(1, 2, 4) if distilled else ())
    monkeypatch.setattr("fulgurite.engine.engine.card", lambda model: of)
    nets = tiny.networks
    networks = replace(
        nets,
        text_encoders=tuple(type(e)(e.config).to(dtype) for e in nets.text_encoders),
        unet=type(nets.unet)(nets.unet.config).to(dtype),
        vae=type(nets.vae)(nets.vae.config).to(dtype),
    )
    pipeline = Pipeline(of, networks, "cpu", dtype)

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(REQUESTS, st.sampled_from("ab"), st.floats(0, 0.02)), min_size=2, max_size=9))
    def interleaved(asked: list[tuple[Request, str, float]]) -> None:
        with closing(engine_of(pipeline)) as engine:
            jobs = []
            for request, key, pause in asked:
                jobs.append(engine.submit(SPARK, request, key=key))
                time.sleep(pause)
            for (request, _, _), job in zip(asked, jobs, strict=True):
                assert job.result(60).image.tobytes() == pipeline.draw(request).image.tobytes()

    interleaved()


@needs_weights
def test_the_embedded_models_pictures_in_half_precision_are_those_of_full_precision() -> None:
    """52 dB and more were measured; 40 dB is beyond what people can see."""
    exact, half = (Pipeline.load(SPARK, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for seed, prompt in enumerate(("a red fox", "a green tree", "a rocket at night")):
        request = replace(FOX, prompt=prompt, seed=seed, num_steps=8)
        a, b = (np.asarray(pipeline.draw(request).image, dtype=float) for pipeline in (exact, half))
        assert 10 * np.log10(255**2 / ((a - b) ** 2).mean()) > 40


@needs_weights
def test_the_embedded_models_students_share_batches_and_keep_their_bits() -> None:
    model = "fulgurite/spark-lightning"
    alone = Loader("cpu")
    requests = [
        replace(
            FOX, prompt=f"a red fox {i % 3}", negative_prompt="blurry" if i % 4 == 0 else "", num_steps=steps, seed=i
        )
        for i, steps in enumerate((1, 2, 4, 8, 4, 4, 2, 1, 4))
    ]
    with closing(Engine(lambda: Runner(Loader("cpu")))) as engine:
        jobs = [engine.submit(model, request, key=str(i % 2)) for i, request in enumerate(requests)]
        for request, job in zip(requests, jobs, strict=True):
            assert job.result(60).image.tobytes() == alone(model, request.num_steps).draw(request).image.tobytes()


def test_numbers_that_are_none_are_an_error(tiny: Pipeline) -> None:
    row = tiny.start(replace(FOX, num_steps=1), tiny.encode)
    row.x = row.x * float("nan")
    with pytest.raises(NotFiniteError):
        tiny.finish(row)


def test_larger_batches_are_used_once_they_are_proven() -> None:
    asked: list[list[int]] = []

    def agrees(parts: Sequence[int]) -> bool:
        asked.append(list(parts))
        return sum(parts) <= 6

    batches = Batches(1, 16, agrees)
    assert [batches.size_for(rows) for rows in (1, 2, 3, 5)] == [1, 2, 3, 6]
    assert asked == [[1, 1], [2, 1], [3, 1], [4, 2]]
    assert (batches.size_for(16), batches.capacity) == (6, 6)  # 8 is not right, so nothing larger is tried
    assert batches.smaller(6)
    assert batches.capacity == 4
    assert [Batches(2, 16, lambda parts: True).size_for(rows) for rows in (1, 3, 9)] == [2, 4, 12]
    assert Batches(1, 16, None).size_for(5) == 5


def test_the_cache_of_prompts_is_bounded_in_bytes() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(prompt)
        return torch.zeros(10), torch.zeros(15)  # 100 bytes

    cache = PromptCache(250)
    for prompt in "aababcabc":
        cache.get("model", encode, prompt)
    assert encoded == list("abcabc")
    assert cache.hits == 3
    assert cache.bytes == 200


def test_the_loader_keeps_unets_within_its_bytes_and_shares_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[int, object]] = []

    class Kept:
        def __init__(self, model: str, steps: int, like: object) -> None:
            from fulgurite.cards import card

            self.card, self.networks = card(model), steps
            loaded.append((steps, like))

    monkeypatch.setattr(Pipeline, "load", lambda model, *, steps, device, dtype, like: Kept(model, steps, like))
    loader = Loader("cpu", most_bytes=12 * 10**9 // (1 if loader_bytes() == 4 else 2))  # one of SDXL's, not two
    assert loader(LIGHTNING, 20) is loader(LIGHTNING, 8)
    assert loader.switch_seconds(LIGHTNING, 8) == 0 < loader.switch_seconds(LIGHTNING, 4)
    loader(LIGHTNING, 5)
    assert loader.switch_seconds(LIGHTNING, 8) > 0 == loader.switch_seconds(LIGHTNING, 4)
    assert loaded == [(20, None), (5, 20)]
    assert not loader.drop_others(LIGHTNING, 4)


def loader_bytes() -> int:
    return Loader("cpu").dtype.itemsize


def test_a_device_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(FulguriteError, match="FULGURITE_DEVICE: cannot compute on 'abacus' here"):
        usable_device("abacus")
