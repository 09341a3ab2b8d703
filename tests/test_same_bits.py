"""The same bits whoever shares the batch: random interleavings of random jobs, each against its request drawn alone."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from conftest import DTYPES, SPARK, Loads, drawn, needs_weights
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fulgurite import Picture, Pipeline, Request
from fulgurite.cards import Card
from fulgurite.engine import Engine, Load, Loader, Runner
from fulgurite.errors import NotFiniteError
from fulgurite.pipeline import Encoded, Row, usual_dtype
from fulgurite.request import Preview

SPARK_LIGHTNING = "fulgurite/spark-lightning"
NAMES = ("a red fox", "a blue boat at sea", "night")
Latents = list[torch.Tensor]  # clean, as each step saw them


@dataclass(frozen=True)
class Asked:
    """A job of an interleaving."""

    request: Request
    key: str
    joins: int  # once so many steps of all jobs together were made
    cancelled: int  # once so many of its own were made; 0: never


def requests(most_steps: int, widths: Sequence[int]) -> st.SearchStrategy[Request]:
    return st.builds(
        Request,
        prompt=st.sampled_from(NAMES),
        negative_prompt=st.sampled_from(("", "", "blurry")),
        num_steps=st.integers(1, most_steps),
        width=st.sampled_from(widths),
        height=st.just(256),
        guidance=st.sampled_from((0.0, 7.5, 7.5, 9.0)),
        seed=st.integers(0, 2**64 - 1),
        decoder=st.sampled_from(("full", "fast")),
    )


def mixes(most_steps: int, widths: Sequence[int], most: int) -> st.SearchStrategy[list[Asked]]:
    joins, cancelled = st.integers(0, 12), st.sampled_from((0, 0, 0, 1, 2))
    jobs = st.builds(Asked, requests(most_steps, widths), st.sampled_from("ab"), joins, cancelled)
    return st.lists(jobs, min_size=2, max_size=most, unique=True)


ALIKE = [Asked(Request("night", width=256, height=256, num_steps=3, seed=seed), "a", 0, 0) for seed in range(6)]


class Interleaving:
    """Submits and cancels jobs at the steps that they name, on the engine's thread, so that it goes the same again."""

    def __init__(self, engine: Engine, model: str, asked: Sequence[Asked]) -> None:
        self._engine, self._model = engine, model
        self._to_come, self._steps = deque(sorted(asked, key=lambda one: one.joins)), 0
        self._lock = threading.RLock()
        self.jobs: dict[Asked, Future[Picture]] = {}
        self.latents: dict[Asked, Latents] = {one: [] for one in asked}

    def run(self) -> None:
        while True:
            with self._lock:
                if not self._to_come:  # under the lock: the engine's thread joins the last ones as well
                    break
                self._steps = max(self._steps, self._to_come[0].joins)  # nobody who would be joined is left
                self._join()
            wait(list(self.jobs.values()))
        wait(list(self.jobs.values()))

    def _join(self) -> None:
        while self._to_come and self._to_come[0].joins <= self._steps:
            one = self._to_come.popleft()
            self.jobs[one] = self._engine.submit(self._model, one.request, partial(self._stepped, one), one.key)

    def _stepped(self, one: Asked, done: int, steps: int, preview: Preview) -> None:
        with self._lock:
            self.latents[one].append(latent(preview))
            self._steps += 1
            if done == one.cancelled:
                self._engine.cancel(self.jobs[one])
            self._join()


def latent(preview: Preview) -> torch.Tensor:
    assert isinstance(preview, partial)
    return preview.args[0].clone()


def alone(pipeline: Pipeline, request: Request) -> tuple[Latents, Picture]:
    latents: Latents = []
    return latents, pipeline.draw(request, lambda done, steps, preview: latents.append(latent(preview)))


def check(load: Load, pipeline_for: Callable[[int], Pipeline], model: str, asked: Sequence[Asked]) -> None:
    """Every latent of every step, and the bytes of the pictures that were not cancelled."""
    with closing(Engine(lambda: Runner(load))) as engine:
        mix = Interleaving(engine, model, asked)
        mix.run()
        for one, job in mix.jobs.items():
            latents, picture = alone(pipeline_for(one.request.num_steps), one.request)
            made = mix.latents[one]
            stopped = 0 < one.cancelled <= len(latents)
            if not stopped:
                assert job.result().image.tobytes() == picture.image.tobytes()
            assert len(made) == (one.cancelled if stopped else len(latents))
            assert all(map(torch.equal, made, latents[: len(made)]))


class Counted(Pipeline):
    """Knows how many rows a step had at most."""

    most = 0

    def step(self, rows: Sequence[Row], batch: int) -> None:
        self.most = max(self.most, batch)
        super().step(rows, batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distilled", [False, True])
def test_a_picture_is_the_same_to_the_bit_whoever_shares_its_batch(
    tiny: Pipeline, dtype: torch.dtype, distilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = in_precision(tiny, replace(tiny.card, native_shapes=(), schedules=(1, 2, 4) if distilled else ()), dtype)
    monkeypatch.setattr("fulgurite.engine.engine.card", lambda model: pipeline.card)

    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(mixes(most_steps=5, widths=(256, 300), most=9))
    @example(ALIKE)
    def interleaved(asked: list[Asked]) -> None:
        check(Loads(pipeline), lambda steps: pipeline, SPARK, asked)

    interleaved()
    smallest = 1 if distilled else 2
    assert (pipeline.most > smallest) == pipeline.agrees((16, 16), [smallest, smallest])  # else this compared nothing


def in_precision(tiny: Pipeline, card: Card, dtype: torch.dtype, kind: type[Counted] = Counted) -> Counted:
    nets = tiny.networks
    networks = replace(
        nets,
        text_encoders=tuple(type(e)(e.config).to(dtype) for e in nets.text_encoders),
        unet=type(nets.unet)(nets.unet.config).to(dtype),
        vae=type(nets.vae)(nets.vae.config).to(dtype),
        fast_decoder=type(nets.fast_decoder)(nets.fast_decoder.config).to(dtype),
    )
    return kind(card, networks, "cpu", dtype)


class Poisoned(Counted):
    """Starts one prompt's picture from what is no number."""

    def start(self, request: Request, encode: Callable[[str], Encoded]) -> Row:
        row = super().start(request, encode)
        return replace(row, x=row.x * float("nan")) if request.prompt == "poison" else row


def test_a_row_that_is_no_numbers_fails_alone_and_changes_no_bit_of_the_others(tiny: Pipeline) -> None:
    pipeline = in_precision(tiny, tiny.card, usual_dtype("cpu"), Poisoned)
    requests = [Request("night", width=256, height=256, num_steps=3, seed=seed) for seed in range(4)]
    with closing(Engine(lambda: Runner(Loads(pipeline)))) as engine:
        poisoned = engine.submit(SPARK, replace(requests[0], prompt="poison"))
        jobs = [engine.submit(SPARK, request) for request in requests]
        assert isinstance(poisoned.exception(60), NotFiniteError)
        for request, job in zip(requests, jobs, strict=True):
            assert job.result(60).image.tobytes() == pipeline.draw(request).image.tobytes()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As a server has them: how a kernel cuts its work depends on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_weights
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [SPARK, SPARK_LIGHTNING])
def test_the_embedded_models_latents_are_the_same_to_the_bit_whoever_shares_the_batch(
    model: str, dtype: torch.dtype
) -> None:
    loader = Loader("cpu", precision=str(dtype).removeprefix("torch."))

    def undecoded(model: str, steps: int) -> Pipeline:
        pipeline = loader(model, steps)
        pipeline.finish = lambda row: drawn(model, row.request)  # type: ignore[method-assign]
        return pipeline

    class Undecoded(Loads):
        def __call__(self, model: str, steps: int) -> Pipeline:
            return undecoded(model, steps)

    @settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(mixes(most_steps=8, widths=(256, 300), most=6))
    @example(ALIKE)
    def interleaved(asked: list[Asked]) -> None:
        check(Undecoded(undecoded(model, 8)), cache(partial(undecoded, model)), model, asked)

    interleaved()


@needs_weights
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("model", [SPARK, SPARK_LIGHTNING])
def test_the_embedded_models_pictures_share_batches_and_keep_their_bytes(model: str) -> None:
    asked = [
        Asked(Request(f"a red fox {i % 3}", "blurry" if i % 4 == 0 else "", 256, 256, steps, seed=i), str(i % 2), i, 0)
        for i, steps in enumerate((1, 2, 4, 8, 4, 4, 2, 1, 4))
    ]
    check(Loader("cpu"), partial(Loader("cpu"), model), model, asked)
