"""Whether two things stand as the prompt says: "a fox on a car", "a fox in front of a car", "a fox and a car".

The evaluator is asked which thing it sees where each of the two should be. Beside what a model draws are renders,
which are the evaluator's ceiling: there too, one thing hides some of the other.
"""

import math
import random
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fulgurite.training.evaluation.reader import rendered, seen
from fulgurite.training.evaluation.scores import Evaluation, Way, share
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.scenes import ALONE, ARRANGEMENTS, LINKS, Scene, a_or_an, places, plain, scene_of
from fulgurite.training.sources import Sprites, Thing

STYLE = "3d"  # what is drawn where the prompt names none


def things_in_style(sprites: Sprites) -> list[Thing]:
    """All things that a prompt without a style may show, one of each name."""
    return list({plain(thing.name): thing for thing in sprites.things if STYLE in thing.sprites}.values())


def asked(first: Thing, second: Thing, arrangement: str) -> str:
    """A prompt for the two, standing so."""
    onward, _ = LINKS[arrangement]
    return f"{a_or_an(plain(first.name))} {onward[0]} {a_or_an(plain(second.name))}"


def arranged(sprites: Sprites, arrangement: str, count: int) -> list[Scene]:
    """Scenes of two things on white, any two as often as others."""
    rng, known = random.Random(f"arranged {arrangement}"), things_in_style(sprites)
    return [scene_of(rng.sample(known, 2), STYLE, arrangement) for _ in range(count)]


def closer(pictures: Tensor, centre: tuple[float, float], side: float) -> Tensor:
    """What is in one place of the pictures ``[N, 3, H, W]``, as large as a thing that is alone: ``[N, 3, S, S]``."""
    height, width = pictures.shape[2:]
    thing = side * min(height, width)
    window = round(thing / ALONE)
    margin = math.ceil((window - thing) / 2)  # for that the window may reach beyond the picture's edge
    padded = F.pad(pictures, [margin] * 4, mode="replicate")
    left, top = (margin + round(c * n - window / 2) for c, n in zip(centre, (width, height), strict=True))
    return padded[..., top : top + window, left : left + window]


@torch.no_grad()
def rows_of(evaluation: Evaluation, way: Way | None, count: int) -> list[str]:
    """Lines of the table for pictures that a way draws, or for renders."""
    name, unet, rows = way.name if way else "renders", way and evaluation.network(way), []
    known = things_in_style(evaluation.sprites)
    names = evaluation.reader.captions([a_or_an(plain(thing.name)) for thing in known])
    for arrangement in ARRANGEMENTS:
        scenes = arranged(evaluation.sprites, arrangement, count)
        if way and unet:
            both = ([placed.thing for placed in scene.things] for scene in scenes)
            prompts = [asked(first, second, arrangement) for first, second in both]
            pictures = evaluation.pictures(unet, way, prompts, range(count))
        else:
            pictures = rendered(scenes, evaluation.sprites)
        hits = []
        for i, place in enumerate(places(arrangement)):
            there = evaluation.reader.pictures(seen(closer(pictures, *place)))
            likeliest = evaluation.reader.likeness(there, names).argmax(dim=1)
            own = [known.index(scene.things[i].thing) for scene in scenes]
            hits.append(likeliest == torch.tensor(own))
        shares = [share(int(hit.sum()), count) for hit in (*hits, hits[0] & hits[1])]
        rows.append(f"| {name}, {LINKS[arrangement][0][0]} | {count} | {' | '.join(shares)} |")
    return rows


def arrangements(evaluation: Evaluation, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of how often the evaluator sees each of two things where it is to stand, and both.

    Of all things, by their names alone. ``count``: pictures of each arrangement.
    """
    head = "drawn by", "pictures", "the first is where it should be", "the second is", "both are"
    parts = {("renders", fingerprint(evaluation.data, count)): partial(rows_of, evaluation, None, count)}
    for way in ways:
        parts[way.name, fingerprint(evaluation.made_of(way), count)] = partial(rows_of, evaluation, way, count)
    return evaluation.table("arrangements", head, parts)
