"""Whether negative prompts work: how often what a prompt shows is still found where the negative prompt names it.

Undistilled models are guided away from it by classifier-free guidance (arXiv 2207.12598), students by normalized
attention guidance (arXiv 2505.21179), both as the pipeline does.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.models import AttentionGuidance
from fulgurite.training.evaluation import BATCH, Judged, Way
from fulgurite.training.reader import seen
from fulgurite.training.scenes import COLOURS, with_article
from fulgurite.training.steps import Guidance, Guide, decoded, drawn

KINDS = "background, named", "style, not named"  # elements of prompts


@dataclass(frozen=True)
class Asked:
    """A prompt with an element, what names the element, and captions of which one has it."""

    prompt: str
    element: str
    captions: tuple[str, ...]
    right: int  # of the captions, the one with the element


def asked_for(names: Sequence[str], kind: str, count: int) -> list[Asked]:
    """Prompts that name the background's colour, or that name no style and so are drawn in the commonest."""
    rng, colours, found = random.Random(f"negative {kind}"), [colour for colour in COLOURS if colour != "white"], []
    for _ in range(count):
        subject, right = with_article(rng.choice(list(names)), rng), rng.randrange(len(colours))
        if kind == "background, named":
            captions = [f"{subject} on a {colour} background" for colour in colours]
            found.append(Asked(captions[right], f"{colours[right]} background", (*captions, subject), right))
        else:
            found.append(Asked(subject, "3d", (f"{subject}, 3d", f"{subject}, flat"), 0))
    return found


@torch.no_grad()
def still_found(judged: Judged, way: Way, asked: Sequence[Asked], negative: bool) -> tuple[float, float]:
    """In what share of pictures the judge finds the element's caption likeliest, and the seconds that a picture took.

    Seconds are those of all steps, without decoding.
    """
    unet, card, shape = judged.network(way), judged.card, judged.card.native_shapes[0]
    hits, seconds = 0, 0.0
    for start in range(0, len(asked), BATCH):
        rows = asked[start : start + BATCH]
        to, away = (
            judged.say(texts, shape) for texts in ([a.prompt for a in rows], [a.element * negative for a in rows])
        )
        guide: Guidance = None
        if way.guided:
            guide = Guide(away, card.guidance_strength)
        elif negative:
            guide = AttentionGuidance(away.context, torch.full((len(rows),), card.guidance_strength))
        began = time.perf_counter()
        latents = drawn(unet, card, shape, to, guide, range(start, start + len(rows)), way.steps)
        seconds += time.perf_counter() - began
        features = judged.reader.pictures(seen(decoded(judged.vae, latents)).cpu())
        hits += sum(likeliest(judged, feature, a) == a.right for feature, a in zip(features, rows, strict=True))
    return hits / len(asked), seconds / len(asked)


def likeliest(judged: Judged, feature: Tensor, asked: Asked) -> int:
    """The number of the caption that is likeliest for a picture's features ``[F]``."""
    said = judged.reader.captions(judged.say.tokenizers[0](list(asked.captions)))[1]
    return int(judged.reader.likeness(feature[None], said)[0].argmax())


def negatives(judged: Judged, ways: Sequence[Way], count: int) -> str:
    """A Markdown table of what negative prompts take away, and what they cost."""
    names = [thing.name for thing in judged.sprites.things]
    rows = [
        "| drawn by | element | found | with it as the negative prompt | seconds a picture |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        for kind in KINDS:
            asked = asked_for(names, kind, count)
            (without, cost), (with_it, more) = (still_found(judged, way, asked, negative) for negative in (False, True))
            rows.append(f"| {way.name} | {kind} | {without:.0%} | {with_it:.0%} | {cost:.3f}, {more:.3f} |")
            print(rows[-1], flush=True)
    table = "\n".join(rows) + "\n"
    (judged.folder / "negatives.md").write_text(table)
    return table
