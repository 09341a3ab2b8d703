"""Whether two things stand as the prompt says: "a fox on a car", "a fox in front of a car", "a fox and a car".

The evaluator is asked what each of the two is and how they stand, the rest given. Beside what a model draws are
renders, which are the evaluator's ceiling.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fulgurite.training.evaluation import Evaluation, Way, share
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.reader import rendered, seen
from fulgurite.training.scenes import ARRANGEMENTS, LINKS, Placed, Scene, a_or_an, places, plain
from fulgurite.training.sources import SPRITE, Sprites, Thing

STYLE = "3d"  # what is drawn where the prompt names none


def asked(first: Thing, second: Thing, arrangement: str) -> str:
    """A prompt for the two, standing so."""
    onward, _ = LINKS[arrangement]
    return f"{a_or_an(plain(first))} {onward[0]} {a_or_an(plain(second))}"


def arranged(sprites: Sprites, arrangement: str, count: int) -> list[Scene]:
    """Scenes of two things on white, any two as often as others."""
    rng, size = random.Random(f"arranged {arrangement}"), (SPRITE, SPRITE)
    known = list({plain(thing): thing for thing in sprites.things if STYLE in thing.sprites}.values())
    scenes = []
    for _ in range(count):
        stand = zip(rng.sample(known, 2), places(arrangement, size), strict=True)
        placed = tuple(Placed(thing, thing.sprites[STYLE], None, centre, side) for thing, (centre, side) in stand)
        scenes.append(Scene(placed, STYLE, ("white",), size, arrangement))
    return scenes


def seen_right(evaluation: Evaluation, picture: Tensor, scene: Scene) -> tuple[bool, bool]:
    """Whether the evaluator finds both things in a picture's features ``[1, F]``, and how they stand."""
    things, arrangement = evaluation.sprites.things, scene.arrangement
    assert arrangement
    first, second = (placed.thing for placed in scene.things)
    right = asked(first, second, arrangement)
    choices = (
        [asked(thing, second, arrangement) for thing in things],
        [asked(first, thing, arrangement) for thing in things],
        [asked(a, b, stand) for stand in ARRANGEMENTS for a, b in ((first, second), (second, first))],
    )
    found = []
    for texts in choices:
        likeness = evaluation.reader.likeness(picture, evaluation.reader.captions(texts))
        found.append(texts[int(likeness.argmax())] == right)
    return found[0] and found[1], found[2]


@torch.no_grad()
def rows_of(evaluation: Evaluation, way: Way | None, count: int) -> list[str]:
    """Lines of the table for pictures that a way draws, or for renders."""
    name, unet, rows = way.name if way else "renders", way and evaluation.network(way), []
    for arrangement in ARRANGEMENTS:
        scenes = arranged(evaluation.sprites, arrangement, count)
        if way and unet:
            both = ([placed.thing for placed in scene.things] for scene in scenes)
            prompts = [asked(first, second, arrangement) for first, second in both]
            pictures = evaluation.pictures(unet, way, prompts, range(count))
        else:
            pictures = rendered(scenes, evaluation.sprites)
        features = evaluation.reader.pictures(seen(pictures))
        right = [seen_right(evaluation, features[i : i + 1], scene) for i, scene in enumerate(scenes)]
        things, stand = (share(sum(found), count) for found in zip(*right, strict=True))
        rows.append(f"| {name}, {LINKS[arrangement][0][0]} | {count} | {things} | {stand} |")
    return rows


def arrangements(evaluation: Evaluation, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of how often the evaluator sees both things standing as asked.

    Each is one of all things; how they stand is one of six, since each arrangement has them in either order.
    ``count``: pictures of each arrangement.
    """
    head = "drawn by", "pictures", "show both standing so", "of the ways in which they can stand, show this one"
    parts = {("renders", fingerprint(evaluation.data, count)): partial(rows_of, evaluation, None, count)}
    for way in ways:
        parts[way.name, fingerprint(evaluation.made_of(way), count)] = partial(rows_of, evaluation, way, count)
    return evaluation.table("arrangements", head, parts)
