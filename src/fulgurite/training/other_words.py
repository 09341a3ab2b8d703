"""Stage four: the text encoders, taught to make the same of other words as of a caption.

People write names that captions do not know, and much that no small picture can show: "portrait of a majestic lion
in the forest, cinematic lighting, 8k". The stages before have read such prompts among captions; a name that comes
seldom they have hardly read. Here each scene is described twice, by a caption and so; what the encoders as they were
made of the caption, they learn to make of the other as well. What has to agree is what the finished UNet predicts, and
the states behind the prompt, which have no words of their own; so words that say nothing may take any number of places.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.pipeline import size_conditioning
from fulgurite.sampling import TRAIN_STEPS, train_sigmas
from fulgurite.training.distil import Ground, network
from fulgurite.training.drawing import seeded
from fulgurite.training.loop import Stage
from fulgurite.training.precision import autocast
from fulgurite.training.prompts import Wording
from fulgurite.training.scenes import Scene, a_or_an, plain
from fulgurite.training.teacher import noised
from fulgurite.training.text import behind_prompts

READ = 4  # times as many pairs of prompts are read as a batch has rows: drawing takes longer
DRAWN = 2  # of a batch's rows one in so many is drawn
PURE_NOISE = 0.25  # how often what is drawn begins there
V, POOLED = 10.0, 0.3  # weights of what the UNet predicts, and of the pooled states


class Encoders(nn.Module):
    """Both text encoders: token ids ``[B, S]`` to the UNet's context ``[B, S, D]`` and the pooled state ``[B, P]``."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        (first, _), (second, pooled) = (encoder(ids) for encoder in self.encoders)
        return torch.cat([first, second], dim=-1), pooled


def evenly(scenes: Sequence[Scene], names: Mapping[str, Sequence[str]]) -> Callable[[random.Random], Scene]:
    """Draws scenes so that each other name of a thing is read as often as any.

    In scenes as they come each thing is: the poodle, one of the dog's many names, hardly ever.
    """
    showing = defaultdict(list)
    for scene in scenes:
        showing[scene.things[0].thing.name].append(scene)
    things = [thing for thing in showing if names.get(thing)]
    weights = [len(names[thing]) for thing in things]
    return lambda rng: rng.choice(showing[rng.choices(things, weights)[0]])


def begin(embeddings: Tensor, new: Sequence[tuple[int, int, int]]) -> None:
    """Gives new tokens the mean of those that they are of, in place."""
    for token, first, second in new:
        embeddings[token] = (embeddings[first] + embeddings[second]) / 2


def teach_other_words(
    ground: Ground,
    wording: Wording,
    new: Sequence[tuple[int, int, int]],
    folder: Path,
    steps: int,
    peak: float = 1.5e-3,
) -> list[nn.Module]:
    """Trains in ``folder``, going on from its checkpoint; returns both encoders, averaged, for the wording's tokenizer.

    ``new``: the tokens that the ground's own does not have, each with the two that it is of.
    """
    run, tokenizer = ground.run, ground.tokenizers[0]
    before = Encoders(ground.encoders).requires_grad_(False).to(run.device)
    now = deepcopy(before).requires_grad_(True)
    for encoder in now.encoders:
        begin(encoder.get_parameter("text_model.embeddings.token_embedding.weight").data, new)
    unet = network(ground, ground.unet.parent)
    stage = Stage(folder, nn.ModuleDict({"encoders": now}), peak=peak, steps=steps, decay=0.998, run=run)
    sigmas = train_sigmas().to(run.device)
    rows = ground.batch // DRAWN
    by_name = evenly(cast(list[Scene], ground.latents.scenes), wording.thesaurus.names)
    sizes = size_conditioning(ground.latents.size).to(run.device).expand(rows, -1)
    while stage.step < steps:
        rng = seeded("other words", stage.number)
        clean, scenes = ground.latents.batch(READ * ground.batch, rng)
        scenes[rows::2] = [by_name(rng) for _ in scenes[rows::2]]  # of those that are not drawn
        captions, others = zip(*(wording.pair(scene, rng) for scene in scenes), strict=True)
        told, otherwise = tokenizer(list(captions)).to(run.device), wording.tokenizer(list(others)).to(run.device)
        timesteps = (torch.rand(rows) * TRAIN_STEPS).long()
        timesteps[torch.rand(rows) < PURE_NOISE] = TRAIN_STEPS - 1
        clean, timesteps = clean[:rows].to(run.device), timesteps.to(run.device)
        x, _ = noised(clean, timesteps, torch.randn(clean.shape).to(run.device), sigmas)
        with autocast(run.kind):
            with torch.no_grad():
                wanted, wanted_pooled = before(told)
                v = unet(x, timesteps, wanted[:rows], wanted_pooled[:rows], sizes)
            context, pooled = now(otherwise)
            predicted = unet(x, timesteps, context[:rows], pooled[:rows], sizes)
        behind = behind_prompts(told, tokenizer) & behind_prompts(otherwise, wording.tokenizer)
        stage.update(
            {
                "v": V * F.mse_loss(predicted.float(), v.float()),
                "states": F.mse_loss(context.float()[behind], wanted.float()[behind]),
                "pooled": POOLED * F.mse_loss(pooled.float(), wanted_pooled.float()),
            }
        )
    average = stage.average["encoders"]
    assert isinstance(average, Encoders)
    return list(average.eval().encoders)


@torch.no_grad()
def understood(encoders: Sequence[nn.Module], wording: Wording, device: str) -> Wording:
    """The wording with those names alone that the encoders read as their things: some are learned in vain."""
    names = wording.thesaurus.names

    def pooled(words: Sequence[str]) -> Tensor:
        return encoders[-1](wording.tokenizer([a_or_an(name) for name in words]).to(device))[1].float()

    things = pooled([plain(thing) for thing in names])
    learned = {}
    for i, (thing, others) in enumerate(names.items()):
        nearest = torch.cdist(pooled(others), things).argmin(dim=1) if others else ()
        learned[thing] = tuple(name for name, number in zip(others, nearest, strict=True) if number == i)
    return replace(wording, thesaurus=replace(wording.thesaurus, names=learned))
