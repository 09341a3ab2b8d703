"""What replicas on a Ray cluster of this machine draw beside one engine: python bench/cluster.py [--replicas 2]

Pictures of the embedded model, many at once, by each in turn, each warm and in a process of its own; then one alone.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor

from fulgurite import Picture, Request
from fulgurite.cluster import open_cluster
from fulgurite.engine import open_engine
from fulgurite.settings import read_settings
from fulgurite.threads import share_cores

MODEL = "fulgurite/spark-lightning"
ALONE = 20  # pictures that wait for nobody


def requests(count: int) -> list[Request]:
    return [Request(f"a red fox, {i}", width=256, height=256, num_steps=4, seed=i) for i in range(count)]


def measured(replicas: int | None, count: int) -> dict[str, float]:
    """Pictures a second of so many at once, and milliseconds of one alone."""
    settings = read_settings(replicas=replicas, queue_size=10_000, device="cpu")
    engine = open_cluster(settings, print) if replicas else open_engine(settings, print)

    def drawn(asked: list[Request]) -> list[Picture]:
        jobs: list[Future[Picture]] = [engine.submit(MODEL, request) for request in asked]
        return [job.result() for job in jobs]

    drawn(requests(8 * (replicas or 1)) * 4)  # batches are proven once
    rate = count / seconds_of(lambda: drawn(requests(count)))
    alone = [seconds_of(lambda request=request: drawn([request])) for request in requests(ALONE)]  # type: ignore[misc]
    engine.close()
    return {"a_second": rate, "alone_ms": 1000 * statistics.median(alone)}


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--replicas", type=int, default=2)
    arguments.add_argument("--pictures", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    share_cores()
    os.environ["RAY_ADDRESS"] = "local"
    found: dict[str, list[dict[str, float]]] = {"one engine": [], f"{given.replicas} replicas": []}
    for _ in range(given.rounds):
        for name, replicas in zip(found, (None, given.replicas), strict=True):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found[name].append(process.submit(measured, replicas, given.pictures).result())
    for name, runs in found.items():
        for what in ("a_second", "alone_ms"):
            values = sorted(run[what] for run in runs)
            print(f"{name}: {what} {statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
