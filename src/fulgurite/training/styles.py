"""Whether styles carry over: things drawn in a style that training never showed them in, asked for by name.

Beside them the same things in the styles that it did show, and renders of both, which are the evaluator's ceiling.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fulgurite.models import UNet
from fulgurite.training.evaluation import Evaluation, Way, share
from fulgurite.training.reader import rendered, seen
from fulgurite.training.scenes import Placed, Scene, a_or_an, held_out_style, plain
from fulgurite.training.sources import SPRITE, Thing

Pair = tuple[Thing, str]  # a thing and a style


def asked(pair: Pair) -> str:
    thing, style = pair
    return f"{a_or_an(plain(thing))}, {style}"


def pairs_by_kind(things: Sequence[Thing]) -> dict[str, list[Pair]]:
    """Of the things that are held out of a style: that pair, and those that training shows."""
    kinds: dict[str, list[Pair]] = {"held out": [], "shown": []}
    for thing in things:
        if apart := held_out_style(thing):
            for style in thing.sprites:
                kinds["held out" if style == apart else "shown"].append((thing, style))
    return kinds


def renders(evaluation: Evaluation, pair: Pair, count: int) -> Tensor:
    """Renders of a thing in a style on white."""
    (thing, style), rng = pair, random.Random(asked(pair))
    sides = [rng.uniform(0.85, 0.89) for _ in range(count)]
    placed = [Placed(thing, thing.sprites[style], None, (0.5, 0.5), side) for side in sides]
    return rendered([Scene((each,), style, ("white",), (SPRITE, SPRITE)) for each in placed], evaluation.sprites)


def drawn_by(evaluation: Evaluation, way: Way, unet: UNet, pair: Pair, count: int) -> Tensor:
    """Pictures of the first ``count`` seeds."""
    return evaluation.pictures(unet, way, [asked(pair)] * count, range(count))


@torch.no_grad()
def rows_of(evaluation: Evaluation, way: Way | None, count: int) -> list[str]:
    """Lines of the table for pictures that a way draws, or for renders."""
    name = way.name if way else "renders"
    look = partial(drawn_by, evaluation, way, evaluation.network(way)) if way else partial(renders, evaluation)
    known = [(thing, style) for thing in evaluation.sprites.things for style in thing.sprites]
    said = evaluation.reader.captions([asked(pair) for pair in known])
    rows = []
    for kind, pairs in pairs_by_kind(evaluation.sprites.things).items():
        right, styled = 0, 0
        for pair in pairs:
            likeness = evaluation.reader.likeness(evaluation.reader.pictures(seen(look(pair, count))), said)
            own = [i for i, (thing, _) in enumerate(known) if thing is pair[0]]
            right += sum(known[i] == pair for i in likeness.argmax(dim=1))
            styled += sum(known[own[i]] == pair for i in likeness[:, own].argmax(dim=1))
        total = count * len(pairs)
        rows.append(f"| {name}, {kind} | {len(pairs)} | {total} | {share(right, total)} | {share(styled, total)} |")
    return rows


def styles(evaluation: Evaluation, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of how often the evaluator sees the pair that was asked for; ``count``: pictures a pair.

    Of all things in all their styles, and of the thing's own styles alone.
    """
    head = "drawn by", "pairs", "pictures", "show the pair", "of the thing's styles, show this one"
    parts = {("renders", evaluation.data): partial(rows_of, evaluation, None, count)}
    parts |= {(way.name, evaluation.made_of(way)): partial(rows_of, evaluation, way, count) for way in ways}
    return evaluation.table("styles", head, parts)
