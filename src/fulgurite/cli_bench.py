"""`fulgurite bench`: what a picture costs on this machine. Beside other programs: bench/compare.py."""

import json
import statistics
from typing import Annotated

import typer


def bench(
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "futuristic spacecraft",
    model: Annotated[str, typer.Option(help="The model's id.")] = "fulgurite/spark-lightning",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, 256 to 2048 each; else the model's own.")] = None,
    steps: Annotated[int, typer.Option(help="The most steps to spend, 1 to 20.")] = 4,
    precision: Annotated[str | None, typer.Option(help="Of this machine's numbers, as for `fulgurite serve`.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pictures that are timed, after one that is not.")] = 7,
    price: Annotated[float | None, typer.Option(min=0, help="What this machine costs an hour, in dollars.")] = None,
) -> None:
    """Measures a picture part by part. The last line is JSON."""
    from fulgurite.cli import checked, parsed_size  # here: it imports this file

    given = {"prompt": prompt, "num_steps": steps, "seed": 12345}
    if size is not None:
        given["width"], given["height"] = parsed_size(size)
    checked(given)  # before torch is imported: a mistake is told at once

    import torch
    from rich.console import Console
    from rich.table import Table

    from fulgurite.benchmark import (
        HOSTED_DOLLARS,
        PARTS,
        PICTURE,
        dollars_a_thousand,
        draw_in_parts,
        flop_counts,
        matrix_ceiling,
        peak_memory,
    )
    from fulgurite.cards import card
    from fulgurite.engine import Loader
    from fulgurite.request import Request, plan
    from fulgurite.settings import read_settings

    if size is None and (shapes := card(model).native_shapes):
        given["width"], given["height"] = shapes[0]
    request = Request(**checked(given).model_dump())
    loader = Loader.from_settings(read_settings(precision=precision))
    pipeline = loader(model, steps)
    draw_in_parts(pipeline, request)
    found = [draw_in_parts(pipeline, request)[1] for _ in range(rounds)]
    ceiling, to = matrix_ceiling(pipeline.device, pipeline.dtype), plan(pipeline.card, request)
    flops = flop_counts(pipeline.card, request)

    table = Table("part", "ms", "from", "to", "GFLOP", "GFLOP/s", "of the ceiling", box=None)
    rows = []
    for part in (*PARTS, PICTURE):
        seconds = [each[part] for each in found]
        middle = statistics.median(seconds)
        row = {"part": part, "seconds": middle, "lowest": min(seconds), "highest": max(seconds)}
        shown = [part, *(f"{1000 * value:.1f}" for value in (middle, min(seconds), max(seconds)))]
        if part in flops:
            row |= {"flop": flops[part], "of_ceiling": flops[part] / middle / ceiling}
            shown += [f"{flops[part] / 1e9:.1f}", f"{flops[part] / middle / 1e9:.0f}", f"{row['of_ceiling']:.0%}"]
        rows.append(row)
        table.add_row(*shown)
    width, height = to.drawn_size
    kind, memory = loader.precision, peak_memory(pipeline.device)
    console = Console()
    console.print(f"{model}, {width}x{height}, {to.steps} steps, {kind} on {pipeline.device}, medians of {rounds}")
    console.print(table)
    console.print(f"The ceiling, matrix products: {ceiling / 1e9:.0f} GFLOP/s. Peak memory: {memory / 1e9:.2f} GB.")
    report: dict[str, object] = {
        "model": model,
        "size": [width, height],
        "steps": to.steps,
        "precision": kind,
        "device": str(pipeline.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ceiling": ceiling,
        "peak_memory": memory,
        "parts": rows,
    }
    if price is not None:
        cost = dollars_a_thousand(statistics.median(each[PICTURE] for each in found), price)
        report["dollars_a_thousand"] = cost
        console.print(f"1000 pictures at ${price:g} an hour: ${cost:.3f}; of the hosted API: ${HOSTED_DOLLARS:.2f}.")
    typer.echo(json.dumps(report))
