"""How the time of the embedded model's pictures grows with their steps, batch and area, beside the arithmetic.

Draws docs/growth.svg, and prints what is in it as one line of JSON: bench/peers/.venv/bin/python bench/growth.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from fulgurite import Pipeline, Request
from fulgurite.benchmark import PICTURE, draw_in_parts, flop_counts
from fulgurite.kernels import compiled, cpu
from fulgurite.pipeline import Row

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "growth"  # the same numbers give the same file
from matplotlib import pyplot  # noqa: E402

MODEL = "fulgurite/spark-lightning"
SIDES, STEPS, BATCHES = (256, 384, 512, 768, 1024, 1536, 2048), (1, 2, 4, 8), (1, 2, 4, 8, 16)
Curve = dict[str, list[float]]  # "x", and at each of it "ms" and "gflop"


def request(**parameters: int) -> Request:
    return Request("futuristic spacecraft", **({"width": 256, "height": 256, "num_steps": 1, "seed": 7} | parameters))


def middle(call: Callable[[], object], rounds: int) -> float:
    """The median milliseconds of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])


def of_area(rounds: int) -> dict[str, Curve]:
    """A step and a decode, by the picture's side in pixels."""
    loaded = Pipeline.load(MODEL, steps=1)
    loaded.card = replace(loaded.card, native_shapes=())  # at every size asked for, instead of at 256x256 alone
    found = {part: Curve(x=[], ms=[], gflop=[]) for part in ("step", "decode")}
    for side in SIDES:
        asked = request(width=side, height=side)
        draw_in_parts(loaded, asked)
        runs = [draw_in_parts(loaded, asked)[1] for _ in range(rounds)]
        flops = flop_counts(loaded.card, asked)
        for part, curve in found.items():
            curve["x"].append(side)
            curve["ms"].append(1000 * statistics.median(run[part] for run in runs))
            curve["gflop"].append(flops[part] / 1e9)
    return found


def of_steps(rounds: int) -> dict[str, Curve]:
    """A picture, by its steps; each number of them has a checkpoint of its own."""
    curve = Curve(x=[], ms=[], gflop=[])
    for steps in STEPS:
        loaded = Pipeline.load(MODEL, steps=steps)
        asked = request(num_steps=steps)
        curve["x"].append(steps)
        curve["ms"].append(middle(lambda loaded=loaded, asked=asked: draw_in_parts(loaded, asked), rounds))
        curve["gflop"].append(flop_counts(loaded.card, asked)[PICTURE] / 1e9)
    return {PICTURE: curve}


def of_batch(rounds: int) -> dict[str, Curve]:
    """A step, by the pictures that take it together."""
    loaded, curve = Pipeline.load(MODEL, steps=1), Curve(x=[], ms=[], gflop=[])
    flop = flop_counts(loaded.card, request())["step"]

    encoded = loaded.encode("futuristic spacecraft")
    for batch in BATCHES:
        rows = [loaded.start(request(), lambda prompt: encoded) for _ in range(batch)]

        def step(rows: list[Row] = rows) -> None:
            for row in rows:
                row.done = 0
            loaded.step(rows, len(rows))

        curve["x"].append(batch)
        curve["ms"].append(middle(step, rounds))
        curve["gflop"].append(batch * flop / 1e9)
    return {"step": curve}


def draw(panels: dict[str, dict[str, Curve]], file: Path) -> None:
    """Time as lines with dots, on the left; arithmetic as dashes of the same colour, on the right. All logarithmic.

    Both axes span as many decades and meet at the end of the last curve: where a line lies above its dashes, it reaches
    fewer operations a second than there.
    """
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.8), layout="constrained")
    for left, (title, curves) in zip(axes, panels.items(), strict=True):
        right = left.twinx()
        for i, (part, curve) in enumerate(curves.items()):
            left.plot(curve["x"], curve["ms"], f"C{i}o-", label=f"{part}, ms")
            right.plot(curve["x"], curve["gflop"], f"C{i}--", label=f"{part}, GFLOP")
        for axis in (left, right):
            axis.set_yscale("log")
            axis.set_xscale("log", base=2)
        ratio = curve["gflop"][-1] / curve["ms"][-1]
        heights = [height for each in curves.values() for height in (*each["ms"], *(y / ratio for y in each["gflop"]))]
        left.set_ylim(min(heights) / 1.5, max(heights) * 1.5)
        right.set_ylim(min(heights) / 1.5 * ratio, max(heights) * 1.5 * ratio)
        x = next(iter(curves.values()))["x"]
        left.set_xticks(x, [str(value) for value in x])
        left.minorticks_off()
        left.set_xlabel(title)
        left.set_ylabel("ms")
        right.set_ylabel("GFLOP")
        lines = [*left.get_lines(), *right.get_lines()]
        left.legend(lines, [line.get_label() for line in lines], fontsize="small", loc="upper left")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "growth.svg")
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    cpu.keep_memory()  # as `fulgurite serve` does, and
    compiled.keep_apart()
    panels = {
        "side of the picture, pixels": of_area(given.rounds),
        "steps, at 256x256": of_steps(given.rounds),
        "pictures in a batch, at 256x256": of_batch(given.rounds),
    }
    draw(panels, given.out)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "panels": panels}))


if __name__ == "__main__":
    main()
