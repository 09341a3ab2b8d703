"""`fulgurite bench`: what a picture costs on this machine. Beside other programs: bench/compare.py."""

import json
import statistics
from typing import Annotated, Any

import typer

from fulgurite.cli_ledger import CARDS


def bench(
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "futuristic spacecraft",
    model: Annotated[str, typer.Option(help="The model's id.")] = "fulgurite/spark-lightning",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, 256 to 2048 each; else the model's own.")] = None,
    steps: Annotated[int, typer.Option(help="The most steps to spend, 1 to 20.")] = 4,
    precision: Annotated[str | None, typer.Option(help="Number format, as in `fulgurite serve`.")] = None,
    decoder: Annotated[str, typer.Option(help="full, or the quicker fast.")] = "full",
    rounds: Annotated[int, typer.Option(min=1, help="Pictures that are timed, after one that is not.")] = 7,
    cards: CARDS = None,
    price: Annotated[float | None, typer.Option(min=0, help="What this machine costs an hour, in dollars.")] = None,
) -> None:
    """Measures a picture part by part. The last line is JSON."""
    from fulgurite.cli import checked, parsed_size  # here: it imports this file

    given = {"prompt": prompt, "num_steps": steps, "seed": 12345, "decoder": decoder}
    if size is not None:
        given["width"], given["height"] = parsed_size(size)
    checked(given)  # before torch is imported: a mistake is told at once

    from fulgurite.benchmark import dollars_a_thousand, draw_in_parts, flop_counts, matrix_ceiling, peak_memory
    from fulgurite.cards import add, card
    from fulgurite.engine import Loader
    from fulgurite.request import Request, plan
    from fulgurite.settings import read_settings

    settings = read_settings(precision=precision, cards=cards)
    add(settings.cards)
    if size is None:
        given["width"], given["height"] = card(model).usual_size
    request = Request(**checked(given).model_dump())
    loader = Loader.from_settings(settings)
    pipeline = loader(model, steps)
    draw_in_parts(pipeline, request)
    found = [draw_in_parts(pipeline, request)[1] for _ in range(rounds)]
    memory = peak_memory(pipeline.device)  # before the ceiling, whose matrices are large
    ceiling, to = matrix_ceiling(pipeline.device, pipeline.dtype), plan(pipeline.card, request)
    parts = measured(found, flop_counts(pipeline.card, request), ceiling)
    report = {
        "model": model,
        "size": list(to.drawn_size),
        "steps": to.steps,
        "decoder": decoder,
        "precision": loader.precision,
        "device": str(pipeline.device),
        "rounds": rounds,
        "ceiling": ceiling,
        "peak_memory": memory,
        "parts": parts,
    }
    if price is not None:
        report |= {"price": price, "dollars_a_thousand": dollars_a_thousand(parts[-1]["seconds"], price)}
    show(report)


def measured(found: list[dict[str, float]], flops: dict[str, int], ceiling: float) -> list[dict[str, Any]]:
    """A row for each part of the picture, and one of all: medians, spread, and the share of the ceiling reached."""
    from fulgurite.benchmark import PARTS, PICTURE

    rows = []
    for part in (*PARTS, PICTURE):
        seconds = [each[part] for each in found]
        middle = statistics.median(seconds)
        row = {"part": part, "seconds": middle, "lowest": min(seconds), "highest": max(seconds)}
        if part in flops:
            row |= {"flop": flops[part], "of_ceiling": flops[part] / middle / ceiling}
        rows.append(row)
    return rows


def show(report: dict[str, Any]) -> None:
    """A table for people, then all of it as a line of JSON."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from fulgurite.benchmark import HOSTED_DOLLARS

    console, table = Console(), Table("part", "ms", "from", "to", "GFLOP", "GFLOP/s", "of the ceiling", box=None)
    for row in report["parts"]:
        shown = [row["part"], *(f"{1000 * row[value]:.1f}" for value in ("seconds", "lowest", "highest"))]
        if "flop" in row:
            rate = row["flop"] / row["seconds"]
            shown += [f"{row['flop'] / 1e9:.1f}", f"{rate / 1e9:.0f}", f"{row['of_ceiling']:.0%}"]
        table.add_row(*shown)
    (width, height), steps, of_device = report["size"], report["steps"], f"{report['precision']} on {report['device']}"
    console.print(f"{report['model']}, {width}x{height}, {steps} steps, {of_device}, medians of {report['rounds']}")
    console.print(table)
    memory = f" Peak memory: {report['peak_memory'] / 1e9:.2f} GB." if report["peak_memory"] else ""
    console.print(f"The ceiling, matrix products: {report['ceiling'] / 1e9:.0f} GFLOP/s.{memory}")
    if "price" in report:
        cost = f"1000 pictures at ${report['price']:g} an hour: ${report['dollars_a_thousand']:.3f}"
        console.print(f"{cost}; of the hosted API: ${HOSTED_DOLLARS:.2f}.")
    typer.echo(json.dumps(report | {"threads": torch.get_num_threads(), "torch": torch.__version__}))
