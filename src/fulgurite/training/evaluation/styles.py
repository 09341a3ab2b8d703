"""Whether styles carry over: things drawn in a style that training never showed them in, asked for by name.

Beside them the same things in the styles that it did show, and renders of both, which are the evaluator's ceiling.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fulgurite.models import UNet
from fulgurite.training.evaluation.reader import rendered, seen
from fulgurite.training.evaluation.scores import Evaluation, Way, share
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.scenes import a_or_an, held_out_style, plain, scene_of
from fulgurite.training.sources import Thing

Pair = tuple[Thing, str]  # a thing and a style


def asked(pair: Pair) -> str:
    thing, style = pair
    return f"{a_or_an(plain(thing.name))}, {style}"


def pairs_by_kind(things: Sequence[Thing]) -> dict[str, list[Pair]]:
    """Of the things that are held out of a style: that pair, and those that training shows."""
    kinds: dict[str, list[Pair]] = {"held out": [], "shown": []}
    for thing in things:
        if apart := held_out_style(thing):
            for style in thing.sprites:
                kinds["held out" if style == apart else "shown"].append((thing, style))
    return kinds


def render(evaluation: Evaluation, pair: Pair) -> Tensor:
    """The one render of a thing in a style on white."""
    thing, style = pair
    return rendered([scene_of([thing], style)], evaluation.sprites)


def drawn_by(evaluation: Evaluation, way: Way, unet: UNet, count: int, pair: Pair) -> Tensor:
    """Pictures of the first ``count`` seeds."""
    return evaluation.pictures(unet, way, [asked(pair)] * count, range(count))


@torch.no_grad()
def rows_of(evaluation: Evaluation, way: Way | None, count: int) -> list[str]:
    """Lines of the table for pictures that a way draws, or for renders."""
    name = way.name if way else "renders"
    look = partial(drawn_by, evaluation, way, evaluation.network(way), count) if way else partial(render, evaluation)
    known = [(thing, style) for thing in evaluation.sprites.things for style in thing.sprites]
    said = evaluation.reader.captions([asked(pair) for pair in known])
    rows = []
    for kind, pairs in pairs_by_kind(evaluation.sprites.things).items():
        total, right, styled = 0, 0, 0
        for pair in pairs:
            likeness = evaluation.reader.likeness(evaluation.reader.pictures(seen(look(pair))), said)
            own = [i for i, (thing, _) in enumerate(known) if thing is pair[0]]
            total += len(likeness)
            right += sum(known[i] == pair for i in likeness.argmax(dim=1))
            styled += sum(known[own[i]] == pair for i in likeness[:, own].argmax(dim=1))
        rows.append(f"| {name}, {kind} | {len(pairs)} | {total} | {share(right, total)} | {share(styled, total)} |")
    return rows


def styles(evaluation: Evaluation, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of how often the evaluator sees the pair that was asked for; ``count``: pictures a pair.

    Of all things in all their styles, and of the thing's own styles alone.
    """
    head = "drawn by", "pairs", "pictures", "show the pair", "of the thing's styles, show this one"
    parts = {("renders", evaluation.data): partial(rows_of, evaluation, None, count)}
    for way in ways:
        parts[way.name, fingerprint(evaluation.made_of(way), count)] = partial(rows_of, evaluation, way, count)
    return evaluation.table("styles", head, parts)
