"""Whether two things stand as the prompt says: "a fox on a car", "a fox in front of a car", "a fox and a car".

The evaluator is asked which two things a picture shows, and how they stand. Beside what a model draws are renders,
which are the evaluator's ceiling.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fulgurite.training.evaluation import Evaluation, Way, found, share
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


def standing_so(evaluation: Evaluation, picture: Tensor, scene: Scene) -> bool:
    """Whether a picture's features ``[1, F]`` show the scene's things as they stand, of all ways in which they can."""
    first, second = (placed.thing for placed in scene.things)
    ways = [(stand, both) for stand in ARRANGEMENTS for both in ((first, second), (second, first))]
    said = evaluation.reader.captions([asked(*both, stand) for stand, both in ways])
    return ways[int(evaluation.reader.likeness(picture, said).argmax())] == (scene.arrangement, (first, second))


@torch.no_grad()
def rows_of(evaluation: Evaluation, way: Way | None, count: int) -> list[str]:
    """Lines of the table for pictures that a way draws, or for renders."""
    name, unet, rows = way.name if way else "renders", way and evaluation.network(way), []
    for arrangement in ARRANGEMENTS:
        scenes = arranged(evaluation.sprites, arrangement, count)
        both = ([placed.thing for placed in scene.things] for scene in scenes)
        prompts = [asked(first, second, arrangement) for first, second in both]
        if way and unet:
            pictures = evaluation.pictures(unet, way, prompts, range(count))
        else:
            pictures = rendered(scenes, evaluation.sprites)
        features = evaluation.reader.pictures(seen(pictures))
        hits = found(evaluation.reader.likeness(features, evaluation.reader.captions(prompts)), prompts)
        stand = [standing_so(evaluation, features[i : i + 1], scene) for i, scene in enumerate(scenes)]
        shares = f"{share(int(hits.sum()), count)} | {share(sum(stand), count)}"
        rows.append(f"| {name}, {LINKS[arrangement][0][0]} | {count} | {shares} |")
    return rows


def arrangements(evaluation: Evaluation, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of how often the evaluator sees two things, and them standing as asked.

    Which two is asked among 100 prompts of the same arrangement; how they stand among six ways, since each arrangement
    has them in either order. ``count``: pictures of each arrangement.
    """
    head = "drawn by", "pictures", "whose prompt is found among 100", "show them standing so, of six ways"
    parts = {("renders", fingerprint(evaluation.data, count)): partial(rows_of, evaluation, None, count)}
    for way in ways:
        parts[way.name, fingerprint(evaluation.made_of(way), count)] = partial(rows_of, evaluation, way, count)
    return evaluation.table("arrangements", head, parts)
