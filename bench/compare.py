"""Ours beside diffusers and OpenVINO, on the same weights and the same work: make bench, or with what it installs

    bench/peers/.venv/bin/python bench/compare.py [--works spark sdxl-512 sdxl-1024] [--ways ...] [--rounds 7]

A process for each way. The reference stays, and each of the others in turn draws beside it, a picture each and so on,
so that whatever else the machine does slows both down; a ratio is the median of those of the rounds. A first picture,
which pays for compiling, is not counted. What ran is printed as it ends; the last line is all of it as JSON, also where
it is interrupted. Where two ways do not fit into memory, --alone has the reference draw its pictures and leave before
each of the others comes.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fulgurite.benchmark import (
    HOSTED_DOLLARS,
    PARTS,
    PICTURE,
    dollars_a_thousand,
    flop_counts,
    matrix_ceiling,
    peak_memory,
)
from fulgurite.kernels.cpu import has_bfloat16
from fulgurite.pipeline import usual_dtype
from fulgurite.request import plan
from fulgurite.threads import share_cores
from peers.ways import WAYS
from peers.works import WORKS, Work

Rounds = list[dict[str, float]]  # a way's seconds by part, a picture each
COLUMNS = (PICTURE, *PARTS)
FAST = ("ours-fast-decoder", "ours-int8-fast-decoder")
LARGE = "diffusers-float32"  # of SDXL's sizes it holds 14 GB
HALF = "diffusers-bfloat16"
INT8 = ("ours-int8", "ours-int8-fast-decoder")  # of the embedded model few layers are large enough for it
SETTLED = 0.1  # seconds, within which the threads of who ran before no longer spin for more to do
FITTING = f"; else all that suit the work: at SDXL's sizes, where two ways take 20 GB of memory, not {LARGE}"


def serve(way: str, work: str, options: dict[str, int], connection: Connection) -> None:
    """A way's process: gets ready, then draws a picture for every message, and tells of each."""
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        drawer = WAYS[way](WORKS[work](**options))
        while True:
            image, seconds = drawer.draw()
            connection.send((seconds, np.asarray(image), peak_memory("cpu")))
            connection.recv()
    except EOFError:  # the other end is closed: there is no more to do
        pass
    except BaseException:
        connection.send(traceback.format_exc())


class Process:
    """A way in a process of its own, from its first picture until it is closed, and then again.

    Raises RuntimeError, with what went wrong there.
    """

    def __init__(self, way: str, work: str, options: dict[str, int], patience: float) -> None:
        self.way, self.rounds = way, Rounds()
        self._work, self._options, self._patience = work, options, patience
        self._connection: Connection | None = None
        self.first: float | None = None  # seconds of its first picture, from its process's start
        self.memory: int | None = None

    def begin(self) -> None:
        """Loads it all and draws the picture that is not counted."""
        context, started = multiprocessing.get_context("spawn"), time.perf_counter()
        self._connection, theirs = context.Pipe()
        told = self.way, self._work, self._options, theirs
        self._process = context.Process(target=serve, args=told, daemon=True)
        with patch.dict(os.environ):
            if self.way.startswith("ours"):
                share_cores()  # as our program does
            self._process.start()
        theirs.close()
        _, self.picture, self.memory = self._answer()
        self.first = time.perf_counter() - started

    def draw(self) -> dict[str, float]:
        if not self._connection:
            self.begin()
        assert self._connection
        time.sleep(SETTLED)
        self._connection.send("again")
        seconds, _, self.memory = self._answer()
        self.rounds.append(seconds)
        return seconds

    def _answer(self) -> Any:
        assert self._connection
        try:
            if not self._connection.poll(self._patience):
                raise RuntimeError(f"{self.way}: nothing for {self._patience:.0f} s")
            answer = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"{self.way}: its process ended, {self._process.exitcode}: out of memory?") from None
        except RuntimeError:
            self.close()
            raise
        if isinstance(answer, str):
            raise RuntimeError(f"{self.way}: {answer}")
        return answer

    def close(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None
            self._process.join(10)
            self._process.kill()
            self._process.join()

    def summary(self) -> dict[str, Any]:
        """Medians with the lowest and the highest, in seconds; of what was drawn before counting, the first."""
        spread = {}
        for part in COLUMNS if self.rounds else ():
            values = [each[part] for each in self.rounds]
            spread[part] = [statistics.median(values), min(values), max(values)]
        return {"seconds": spread, "rounds": len(self.rounds), "first": self.first, "peak_memory": self.memory}


def suiting(name: str, work: Work) -> list[str]:
    """The ways that differ at a work, and can draw it beside another way on a machine of 24 GB."""
    unsuited = (LARGE,) if name.startswith("sdxl") else INT8
    unsuited += () if work.card.fast_decoder else FAST
    if not has_bfloat16():  # then there are no instructions for 8 bits either, and diffusers compiled is as large
        unsuited += (HALF, *INT8, *(("diffusers-compiled",) if name.startswith("sdxl") else ()))
    return [way for way in WAYS if way not in unsuited]


def flops_of(way: str, work: Work) -> dict[str, int]:
    """A way's floating-point operations by part, with the decoder that it runs."""
    return flop_counts(work.card, replace(work.request, decoder="fast") if way in FAST else work.request)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in decibels; infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def compare(
    name: str, work: Work, options: dict[str, int], ways: list[str], given: argparse.Namespace, results: list[dict]
) -> None:
    """Adds one work's results to ``results``, and prints them as they come."""
    to = plan(work.card, work.request)
    flops = {way: flops_of(way, work) for way in (given.reference, *ways)}
    size, tera = f"{work.request.width}x{work.request.height}", flops[given.reference][PICTURE] / 1e12
    print(f"\n{name}: {work.card.id}, {size}, {to.steps} steps; {tera:.3f} TFLOP", flush=True)
    ours = Process(given.reference, name, options, given.patience)
    ceilings, rows, failed = [], {}, {}

    def draw_ours() -> dict[str, float]:
        ceilings.append(matrix_ceiling("cpu", usual_dtype("cpu")))
        return ours.draw()

    result = {"work": name, "size": size, "steps": to.steps, "flops": flops, "ways": rows, "failed": failed}
    results.append(result)
    print(f"{'':20}" + "".join(f"{column:>9}" for column in COLUMNS) + "   times as long as " + ours.way, flush=True)
    try:
        if not given.alone:
            ours.begin()
        for way in ways:
            before = [draw_ours() for _ in range(given.rounds if given.alone else 0)]
            if given.alone:
                ours.close()
            other = Process(way, name, options, given.patience)
            ratios = []
            try:
                other.begin()
                for i in range(given.rounds):
                    one, two = before[i] if given.alone else draw_ours(), other.draw()
                    ratios.append({part: two[part] / one[part] for part in COLUMNS})
            except RuntimeError as error:
                failed[way] = str(error)
                print(f"{way:20} failed: {error}", flush=True)
            finally:
                other.close()
                if ratios:
                    middle = {part: statistics.median(each[part] for each in ratios) for part in COLUMNS}
                    rows[way] = other.summary() | {"ratios": middle, "psnr": psnr(ours.picture, other.picture)}
                    print(f"{way:20}" + "".join(f"{middle[column]:9.2f}" for column in COLUMNS), flush=True)
        while len(ours.rounds) < given.rounds:
            draw_ours()
    finally:
        ours.close()
        rows[ours.way] = ours.summary()
        result["ceiling"] = statistics.median(ceilings) if ceilings else None
        print_table(result, given)


def print_table(result: dict, given: argparse.Namespace) -> None:
    """Milliseconds, with what else there is to know of a way."""
    if not result["ceiling"]:
        return
    print(f"\n{'ms':20}" + "".join(f"{column:>9}" for column in COLUMNS), end="")
    print("   from   to (picture)  of ceiling  peak GB  first s   PSNR" + ("  $/1000" if given.price else ""))
    for way, row in result["ways"].items():
        if not row["seconds"]:
            continue
        row["of_ceiling"] = {
            part: flop / row["seconds"][part][0] / result["ceiling"] for part, flop in result["flops"][way].items()
        }
        middle, low, high = row["seconds"][PICTURE]
        shown = "".join(f"{1000 * row['seconds'][column][0]:9.1f}" for column in COLUMNS)
        shown += f" {1000 * low:7.0f} {1000 * high:7.0f}  {row['of_ceiling'][PICTURE]:11.0%}"
        shown += f" {row['peak_memory'] / 1e9:8.2f} {row['first']:8.1f} {row.get('psnr', math.nan):6.1f}"
        if given.price:
            row["dollars_a_thousand"] = dollars_a_thousand(middle, given.price)
            shown += f" {row['dollars_a_thousand']:7.3f}"
        print(f"{way:20}{shown}", flush=True)
    hosted = f"; the hosted API asks ${HOSTED_DOLLARS:.2f} for 1000 pictures" if given.price else ""
    print(f"matrix ceiling, {usual_dtype('cpu')}: {result['ceiling'] / 1e9:.0f} GFLOP/s{hosted}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--works", nargs="+", choices=WORKS, default=["spark"], metavar="WORK", help=", ".join(WORKS)
    )
    arguments.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help=", ".join(WAYS) + FITTING)
    arguments.add_argument(
        "--reference", choices=WAYS, default="ours", metavar="WAY", help="whom the others are beside"
    )
    arguments.add_argument("--alone", action="store_true", help="never two ways at a time")
    arguments.add_argument("--rounds", type=int, default=7, help="pictures of each way that are counted")
    arguments.add_argument("--steps", type=int, help="1, 2, 4 or 8; else 4 of the embedded model, 1 of SDXL's sizes")
    arguments.add_argument("--price", type=float, help="what an hour of this machine costs, in dollars")
    arguments.add_argument("--patience", type=float, default=1800, help="seconds for one picture, or for getting ready")
    given = arguments.parse_args()
    options = {"steps": given.steps} if given.steps else {}
    results: list[dict] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # so that what was found by then is still printed
    try:
        for name in given.works:
            work = WORKS[name](**options)
            ways = [way for way in given.ways or suiting(name, work) if way != given.reference]
            compare(name, work, options, ways, given, results)
    finally:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        print(json.dumps({"machine": machine | {"torch": torch.__version__}, "works": results}))


if __name__ == "__main__":
    sys.exit(main())
