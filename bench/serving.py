"""What step-level batching does for those who wait: python bench/serving.py [--seconds 40] [--loads 0.5 0.8 1.1]

Open-loop Poisson arrivals of pictures of 1, 2, 4 and 8 steps, several sizes and prompts that repeat, drawn by the
embedded model: by our engine, by one picture at a time, and by static batches of equal requests, over the same networks
in one run. Load 1 is all that one picture at a time can do. Slowdown is latency over the request's own time alone.
"""

import argparse
import json
import multiprocessing
import platform
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from fulgurite import Picture, Pipeline, Request
from fulgurite.engine import Engine, Loader, Runner

MODEL = "fulgurite/spark"
STEPS = (1, 2, 4, 8)
PROMPTS = [
    f"a {color} {thing}" for color in ("red", "blue", "golden", "dark green") for thing in ("fox", "boat", "tree")
]
SIZES = ((256, 256), (320, 256), (256, 384))
MOST = 8  # pictures in a static batch: as many as the engine's sixteen rows hold
Submit = Callable[[Request], "Future[Picture]"]


def picture(chance: random.Random, steps: int | None = None) -> Request:
    width, height = chance.choice(SIZES)
    steps = steps or chance.choice(STEPS)
    return Request(chance.choice(PROMPTS), "", height, width, steps, seed=chance.getrandbits(32))


class Static:
    """Takes what is first and all that equal it in steps and size, up to ``most``, and draws them to the end."""

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._pipeline, self._most = pipeline, most
        self._waiting: list[tuple[Request, Future[Picture]]] = []
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work)
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
            rows = [self._pipeline.start(request, self._pipeline.encode) for request, _ in batch]
            for _ in range(rows[0].plan.steps):
                self._pipeline.step(rows, 2 * len(rows))
            for row, (_, job) in zip(rows, batch, strict=True):
                job.set_result(self._pipeline.finish(row))

    def _batch(self) -> list[tuple[Request, Future[Picture]]]:
        def kind(request: Request) -> tuple[int, int, int]:
            return request.num_steps, request.width, request.height

        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            equal = [one for one in self._waiting if kind(one[0]) == kind(self._waiting[0][0])][: self._most]
            self._waiting = [one for one in self._waiting if one not in equal]
            return equal


def offered(submit: Submit, rate: float, seconds: float, seed: int) -> list[tuple[int, float]]:
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
    wait(jobs)
    found = [ended.get() for _ in jobs]
    return [*found, (0, len(jobs) / (time.perf_counter() - started))]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ready(way: str) -> tuple[Submit, Callable[[], None]]:
    """One way of serving, warm: how to ask it, and how to close it."""
    pipeline, chance = Loader("cpu")(MODEL, 20), random.Random(0)
    if way == "ours":
        engine = Engine(lambda: Runner(OneLoaded(pipeline)), queue_size=100_000)
        wait([engine.submit(MODEL, picture(chance, 8)) for _ in range(8)])  # batches are proven once
        return lambda request: engine.submit(MODEL, request), engine.close
    static = Static(pipeline, MOST if way == "static batches" else 1)
    wait([static.submit(picture(chance, 8)) for _ in range(8)])
    return static.submit, static.close


def offer(way: str, rate: float, seconds: float, seed: int) -> list[tuple[int, float]]:
    """What ``offered`` gives, of one way in a process of its own: threads of several would slow each other down."""
    submit, close = ready(way)
    found = offered(submit, rate, seconds, seed)
    close()
    return found


def own_times() -> dict[int, float]:
    """Seconds of a picture that nobody else waits beside, by its steps."""
    submit, close = ready("one at a time")
    chance, times = random.Random(0), {}
    for steps in STEPS:
        runs = []
        for _ in range(15):
            started = time.perf_counter()
            submit(picture(chance, steps)).result()
            runs.append(time.perf_counter() - started)
        times[steps] = statistics.median(runs)
    close()
    return times


def overhead() -> float:
    """Milliseconds of a step of eight pictures, over a network that does nothing."""
    pipeline = Loader("cpu")(MODEL, 20)
    networks = replace(pipeline.networks, unet=lambda x, *_: x)
    engine, times = Engine(lambda: Runner(OneLoaded(Pipeline(pipeline.card, networks, "cpu", pipeline.dtype)))), []
    jobs = [
        engine.submit(MODEL, Request(f"a fox {i}", num_steps=20), lambda *_: times.append(time.perf_counter()))
        for i in range(8)
    ]
    wait(jobs)
    stats = engine.stats()
    engine.close()
    middle = times[len(times) // 4 : -len(times) // 4]
    per_step = stats["rows"] / 2 / stats["steps"]
    return 1000 * (middle[-1] - middle[0]) / (len(middle) / per_step)


class OneLoaded:
    """A loader of what is loaded."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, model: str, steps: int) -> Pipeline:
        return self._pipeline

    def switch_seconds(self, model: str, steps: int) -> float:
        return 0.0

    def drop_others(self, model: str, steps: int) -> bool:
        return False


def alone(call: Callable[..., Any], *arguments: object) -> Any:
    """What a call gives in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=40)
    arguments.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.1])
    options = arguments.parse_args()
    own = alone(own_times)
    capacity = len(STEPS) / sum(own.values())
    told = ", ".join(f"{n} steps {1000 * seconds:.0f}" for n, seconds in own.items())
    print(f"alone, ms: {told}; one at a time: {capacity:.1f}/s")
    spent = alone(overhead)
    print(f"the engine's own time in a step of 8 pictures: {spent:.2f} ms")
    rows = []
    for load in options.loads:
        for name in ("ours", "one at a time", "static batches"):
            *found, (_, throughput) = alone(offer, name, load * capacity, options.seconds, int(100 * load))
            row: dict[str, object] = {"load": load, "way": name, "throughput": round(throughput, 2)}
            for steps in STEPS:
                slow = [latency / own[steps] for n, latency in found if n == steps]
                row[f"p50_{steps}"], row[f"p99_{steps}"] = (round(percentile(slow, share), 2) for share in (0.5, 0.99))
            rows.append(row)
            shown = "  ".join(f"{n}: {row[f'p50_{n}']:>6} {row[f'p99_{n}']:>6}" for n in STEPS)
            print(f"load {load}  {name:<14}  {throughput:5.2f}/s  slowdown p50 p99 by steps  {shown}", flush=True)
    machine = {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, "own_seconds": own, "overhead_ms": spent, "rows": rows}))


if __name__ == "__main__":
    main()
