"""What step-level batching does for those who wait: python bench/serving.py [--seconds 40] [--loads 0.5 0.8 2]

Open-loop Poisson arrivals of pictures of 1, 2, 4 and 8 steps, several sizes and prompts that repeat, drawn by the
embedded model: by our engine, by one picture at a time, and by static batches of equal requests, over the same networks
in one run. Load 1 is all that one picture at a time can do; beyond, what counts is the throughput. Slowdown is latency
over the request's own time alone.

The model is the distilled one, which has a UNet for each number of steps, as SDXL-Lightning has: pictures share a step
only with those of as many steps. `--model fulgurite/spark` draws any number of steps with one UNet.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fulgurite import Picture, Pipeline, Request
from fulgurite.engine import Engine, Load, Loader, Runner
from fulgurite.engine.batches import most_rows
from fulgurite.engine.cache import PromptCache
from fulgurite.request import plan

STEPS = (1, 2, 4, 8)
WAYS = ("ours", "one at a time", "static batches")
CACHE_BYTES = 64_000_000
SIZES = ((256, 256), (320, 256), (256, 384))
PROMPTS = [
    f"a {color} {thing}" for color in ("red", "blue", "golden", "dark green") for thing in ("fox", "boat", "tree")
]
Submit = Callable[[Request], "Future[Picture]"]


@dataclass(frozen=True)
class Bench:
    """What is asked of whom."""

    model: str
    make_load: Callable[[], Load]
    sizes: Sequence[tuple[int, int]]  # widths and heights, each as often as the others
    exact: bool = True
    warm: int = 6  # pictures of each size and number of steps, before any is timed

    def picture(self, chance: random.Random, steps: int | None = None, size: tuple[int, int] | None = None) -> Request:
        width, height = size or chance.choice(self.sizes)
        steps = steps or chance.choice(STEPS)
        return Request(chance.choice(PROMPTS), "", height, width, steps, seed=chance.getrandbits(32))

    def ready(self, way: str) -> tuple[Submit, Callable[[], None]]:
        """One way of serving, warm: how to ask it, and how to close it."""
        load, chance = self.make_load(), random.Random(0)
        warm = [self.picture(chance, steps, size) for steps in STEPS for size in self.sizes for _ in range(self.warm)]
        if way == "ours":
            engine = Engine(lambda: Runner(load, exact=self.exact), queue_size=100_000)
            wait([engine.submit(self.model, request) for request in warm])  # batches are proven once
            return partial(engine.submit, self.model), engine.close
        static = Static(partial(load, self.model), most_alike if way == "static batches" else lambda *_: 1)
        wait([static.submit(request) for request in warm])
        return static.submit, static.close

    def offer(self, way: str, rate: float, seconds: float, seed: int) -> list[tuple[int, float]]:
        """What ``offered`` gives, of one way."""
        submit, close = self.ready(way)
        found = offered(submit, self.picture, rate, seconds, seed)
        close()
        return found

    def own_times(self) -> dict[int, float]:
        """Seconds of a picture that nobody else waits beside, by its steps."""
        submit, close = self.ready("one at a time")
        chance, times = random.Random(0), {}
        for steps in STEPS:
            runs = []
            for _ in range(15):
                started = time.perf_counter()
                submit(self.picture(chance, steps)).result()
                runs.append(time.perf_counter() - started)
            times[steps] = statistics.median(runs)
        close()
        return times

    def overhead(self) -> dict[str, float]:
        """Milliseconds between two steps of eight pictures, or as many as fit, of a network that does nothing."""
        calls: list[tuple[float, int, float]] = []  # when it was called, for how many rows, and when it returned

        def nothing(x: torch.Tensor, *_: object) -> torch.Tensor:
            called = time.perf_counter()
            result = torch.zeros_like(x)
            calls.append((called, len(x), time.perf_counter()))
            return result

        pipeline = self.make_load()(self.model, max(STEPS))
        nothing.read = pipeline.networks.unet.read  # type: ignore[attr-defined]
        idle = Pipeline(pipeline.card, replace(pipeline.networks, unet=nothing), str(pipeline.device), pipeline.dtype)
        engine, (width, height) = Engine(lambda: Runner(OneLoaded(idle))), self.sizes[0]
        for _ in range(20):
            asked = [Request(PROMPTS[i], "", height, width, max(STEPS)) for i in range(8)]
            wait([engine.submit(self.model, request, lambda *_: None) for request in asked])
        engine.close()
        rows = max(n for _, n, _ in calls)
        gaps = [b[0] - a[2] for a, b in itertools.pairwise(calls) if a[1] == b[1] == rows]
        return {"rows": rows, "ms": round(1000 * statistics.median(gaps), 3)}


class Static:
    """Takes what is first and, up to ``most``, all that equal it in steps and size, and draws them to the end."""

    def __init__(self, pipeline_for: Callable[[int], Pipeline], most: Callable[[Request, Pipeline], int]) -> None:
        self._pipeline_for, self._most = pipeline_for, most
        self._prompts = PromptCache(CACHE_BYTES)  # as our engine has
        self._waiting: list[tuple[Request, Future[Picture]]] = []
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Picture]:
        job: Future[Picture] = Future()
        with self._changed:
            self._waiting.append((request, job))
            self._changed.notify()
        return job

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._batch():
            try:
                pictures = self._drawn([request for request, _ in batch])
            except Exception as error:
                for _, job in batch:
                    job.set_exception(error)
            else:
                for picture, (_, job) in zip(pictures, batch, strict=True):
                    job.set_result(picture)

    def _drawn(self, requests: Sequence[Request]) -> list[Picture]:
        pipeline = self._pipeline_for(requests[0].num_steps)
        encode = partial(self._prompts.get, pipeline.card.id, pipeline.encode)
        rows = [pipeline.start(request, encode) for request in requests]
        for _ in range(rows[0].plan.steps):
            pipeline.step(rows, sum(row.plan.network_rows for row in rows))
        return [pipeline.finish(row) for row in rows]

    def _batch(self) -> list[tuple[Request, Future[Picture]]]:
        def kind(request: Request) -> tuple[int, int, int]:
            return request.num_steps, request.width, request.height

        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            first = self._waiting[0][0]
            equal = [one for one in self._waiting if kind(one[0]) == kind(first)]
            equal = equal[: self._most(first, self._pipeline_for(first.num_steps))]
            self._waiting = [one for one in self._waiting if one not in equal]
            return equal


def most_alike(request: Request, pipeline: Pipeline) -> int:
    """Pictures in a static batch: as many as our engine would step together."""
    to = plan(pipeline.card, request)
    return most_rows(pipeline.device.type == "cuda", to.latent_shape) // to.network_rows


def offered(
    submit: Submit, picture: Callable[[random.Random], Request], rate: float, seconds: float, seed: int
) -> list[tuple[int, float]]:
    """Steps and latency of each picture, of so many arrivals a second; all are waited for. Then the throughput."""
    chance, ended = random.Random(seed), queue.SimpleQueue[tuple[int, float]]()
    started = due = time.perf_counter()
    jobs = []
    while (due := due + chance.expovariate(rate)) < started + seconds:
        request = picture(chance)
        time.sleep(max(0.0, due - time.perf_counter()))
        job = submit(request)
        job.add_done_callback(
            lambda _, n=request.num_steps, due=due: ended.put((n, time.perf_counter() - due))  # type: ignore[misc]
        )
        jobs.append(job)
    for job in jobs:
        job.result()
    found = [ended.get() for _ in jobs]
    return [*found, (0, len(jobs) / (time.perf_counter() - started))]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


class OneLoaded:
    """A loader of what is loaded."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, model: str, steps: int) -> Pipeline:
        return self._pipeline

    def switch_seconds(self, model: str, steps: int) -> float:
        return 0.0

    def drop_others(self, model: str, steps: int) -> None:
        pass


def alone(call: Callable[..., Any], *arguments: object) -> Any:
    """What a call gives in a new process: threads of several ways in one would slow each other down."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def embedded(dtype: str) -> Loader:
    """The embedded models on this CPU, in their usual precision or another."""
    loader = Loader("cpu")
    loader.dtype = getattr(torch, dtype) if dtype else loader.dtype
    return loader


def measured(
    bench: Bench,
    loads: Sequence[float],
    seconds: float,
    ways: Sequence[str] = WAYS,
    run: Callable[..., Any] = alone,
    keep: Callable[[dict[str, Any]], object] = lambda row: None,
) -> dict[str, Any]:
    """Offers each load to each way, printing a line for each; everything found, ready for JSON.

    ``keep`` is given each row as soon as it is there.
    """
    own = run(bench.own_times)
    capacity = len(STEPS) / sum(own.values())
    told = ", ".join(f"{n} steps {1000 * seconds:.0f}" for n, seconds in own.items())
    print(f"alone, ms: {told}; one at a time: {capacity:.2f}/s")
    spent = run(bench.overhead)
    print(f"the engine's own time between two steps of {spent['rows']} rows: {spent['ms']:.2f} ms", flush=True)
    rows = []
    for load in loads:
        for name in ways:
            *found, (_, throughput) = run(bench.offer, name, load * capacity, seconds, int(100 * load))
            row: dict[str, Any] = {"load": load, "way": name, "pictures": len(found), "throughput": throughput}
            for steps in STEPS:
                slow = [latency / own[steps] for n, latency in found if n == steps]
                row[f"p50_{steps}"], row[f"p99_{steps}"] = (round(percentile(slow, share), 2) for share in (0.5, 0.99))
            rows.append(row)
            keep(row)
            shown = "  ".join(f"{n}: {row[f'p50_{n}']:>6} {row[f'p99_{n}']:>6}" for n in STEPS)
            print(f"load {load}  {name:<14}  {throughput:5.2f}/s  slowdown p50 p99 by steps  {shown}", flush=True)
    machine = {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"machine": machine, "model": bench.model, "own_seconds": own, "overhead": spent, "rows": rows}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="fulgurite/spark-lightning")
    arguments.add_argument("--seconds", type=float, default=40)
    arguments.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 2.0])
    arguments.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    arguments.add_argument("--dtype", default="", help="float32 or bfloat16; else what the device is quickest in")
    arguments.add_argument("--inexact", action="store_true", help="our engine with its setting `exact` off")
    options = arguments.parse_args()
    bench = Bench(options.model, partial(embedded, options.dtype), SIZES, not options.inexact)
    print(json.dumps(measured(bench, options.loads, options.seconds, options.ways)))


if __name__ == "__main__":
    main()
