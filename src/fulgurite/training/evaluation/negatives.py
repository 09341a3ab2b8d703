"""Whether negative prompts work: where a prompt leaves open what is drawn, naming what it draws should take that away.

Prompts are kinds of things ("a flower"), the negative prompt names the thing that is drawn most often
("tulip"), and the evaluator says what each shows. Noise is the same with and without the negative prompt, so one
without effect leaves every share as it was. What the prompt itself names is not asked: then both predictions hold it,
and there is no difference to be guided by. An unrelated thing's name tells how much any negative prompt disturbs.

Undistilled models are guided by classifier-free guidance (arXiv 2207.12598), students by normalized attention guidance
(arXiv 2505.21179), both as the pipeline does.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fulgurite.models import AttentionGuidance, UNet
from fulgurite.training.drawing import Guidance, Guide, decoded, drawn
from fulgurite.training.evaluation.reader import seen
from fulgurite.training.evaluation.scores import Evaluation, Way, share
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.scenes import a_or_an, plain
from fulgurite.training.sources import Thing

MOST, SHARED = 15, 3  # at most so many kinds, each of at least so many things
OFTEN = 0.5  # a kind is asked about if one of its things is in this share of its pictures
STRENGTHS = 3.0, 5.0, 9.0  # of guidance: what the API's 7.5, 15 and 30 stand for with the cards that there are


@dataclass
class Tally:
    """What was found in pictures of several kinds."""

    pictures: int = 0
    avoided: int = 0  # show the thing that the negative prompt names
    right: int = 0  # show some thing of the prompt's kind
    seconds: float = 0.0  # of all steps, without decoding

    def add(self, found: Sequence[Thing], seconds: float, kind: str, avoided: Thing) -> None:
        self.pictures += len(found)
        self.avoided += sum(thing is avoided for thing in found)
        self.right += sum(kind in thing.kinds for thing in found)
        self.seconds += seconds


def common_kinds(things: Sequence[Thing]) -> list[str]:
    """Those that the most things are of."""
    counted = Counter(kind for thing in things for kind in set(thing.kinds))
    return [kind for kind, count in counted.most_common(MOST) if count >= SHARED]


@torch.no_grad()
def things_drawn(
    evaluation: Evaluation, unet: UNet, way: Way, prompt: str, negative: str, strength: float, count: int
) -> tuple[list[Thing], float]:
    """What is found in pictures of the first ``count`` seeds, of all things, and the seconds of the steps."""
    card, things, shape = evaluation.card, evaluation.sprites.things, evaluation.card.native_shapes[0]
    to, away = evaluation.say([prompt] * count, shape), evaluation.say([negative] * count, shape)
    guide: Guidance = None
    if way.guided:
        guide = Guide(away, strength)
    elif negative:
        strengths = torch.full((count,), strength, device=away.context.device)
        guide = AttentionGuidance(away.context, strengths, card.guidance_tau)
    began = time.perf_counter()
    latents = drawn(unet, card, shape, to, guide, range(count), way.steps).cpu()
    seconds = time.perf_counter() - began
    features = evaluation.reader.pictures(seen(decoded(evaluation.vae, latents.to(to.context.device))).cpu())
    said = evaluation.reader.captions([a_or_an(plain(thing.name)) for thing in things])
    return [things[i] for i in evaluation.reader.likeness(features, said).argmax(dim=1)], seconds


def tallied(evaluation: Evaluation, way: Way, count: int) -> dict[str, Tally]:
    """Without negative prompts, with them by strength, and with an unrelated thing's name; in turns, kind by kind.

    Where kinds draw no thing often enough to take it away, there is nothing.
    """
    unet, things, usual = evaluation.network(way), evaluation.sprites.things, evaluation.card.guidance_strength
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    for kind in common_kinds(things):
        prompt = a_or_an(kind)
        found, seconds = things_drawn(evaluation, unet, way, prompt, "", usual, count)
        avoided = max((thing for thing in things if kind in thing.kinds), key=found.count)
        if found.count(avoided) < OFTEN * count:
            continue
        tallies["no negative prompt"].add(found, seconds, kind, avoided)
        unrelated = random.Random(kind).choice([thing for thing in things if kind not in thing.kinds])
        asked = [(f"strength {strength:g}", avoided, strength) for strength in STRENGTHS]
        for name, negative, strength in (*asked, (f"strength {usual:g}, unrelated", unrelated, usual)):
            found, seconds = things_drawn(evaluation, unet, way, prompt, plain(negative.name), strength, count)
            tallies[name].add(found, seconds, kind, avoided)
    return tallies


def as_row(name: str, tally: Tally) -> str:
    """A line of a Markdown table."""
    shares = f"{share(tally.avoided, tally.pictures)} | {share(tally.right, tally.pictures)}"
    return f"| {name} | {tally.pictures} | {shares} | {tally.seconds / tally.pictures:.3f} |"


def rows_of(evaluation: Evaluation, way: Way, count: int) -> list[str]:
    return [as_row(f"{way.name}, {name}", tally) for name, tally in tallied(evaluation, way, count).items()]


def negatives(evaluation: Evaluation, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of what negative prompts take away, and what they cost; ``count``: pictures a kind."""
    head = "drawn by", "pictures", "show what is to be avoided", "show what the prompt asks for", "seconds a picture"
    parts = {}
    for way in ways:
        made_of = fingerprint(evaluation.made_of(way), count, STRENGTHS, evaluation.card.guidance_tau)
        parts[way.name, made_of] = partial(rows_of, evaluation, way, count)
    return evaluation.table("negatives", head, parts)
