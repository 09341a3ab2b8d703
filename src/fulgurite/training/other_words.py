"""Stage four: the text encoders, taught to read prompts in other words than captions have.

People write names that captions do not know, and much that no small picture can show: "portrait of a majestic lion
in the forest, cinematic lighting, 8k". Here each scene is described twice, by a caption and so; what the encoders as
they were made of the caption, they learn to make of the other as well. What has to agree is what the finished UNet
predicts, and the states behind the prompt, which have no words of their own; so words that say nothing may take any
number of places.
"""

import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.models import Tokenizer
from fulgurite.models.tokenizer import words_of
from fulgurite.sampling import TRAIN_STEPS, train_sigmas
from fulgurite.training.distil import Ground, network
from fulgurite.training.loop import Stage
from fulgurite.training.phrases import LINKS, MORE_FAULTS, MORE_STYLES, OPENINGS, PLACES, PRAISE, SHADES
from fulgurite.training.scenes import STYLE_WORDS, Placed, Said, Scene, a_or_an, caption, name_of, no_caption, plain
from fulgurite.training.sources import Thing
from fulgurite.training.steps import seeded
from fulgurite.training.teacher import noised
from fulgurite.training.thesaurus import Thesaurus, plural
from fulgurite.training.words import FILLERS

AS_BEFORE = 0.25  # how often a caption is described by itself: what is known is to stay
SAYS_NOTHING = 0.1  # how often there is no scene
READ = 4  # times as many pairs of prompts are read as a batch has rows: drawing takes longer
DRAWN = 2  # of a batch's rows one in so many is drawn
PURE_NOISE = 0.25  # how often what is drawn begins there
TRIES = 20
V, POOLED = 10.0, 0.3  # weights of what the UNet predicts, and of the pooled states
DETERMINERS = "the", "my", "one", "this", "some", "her", "his"
SEVERAL = "two", "three", "some", "many", "the", "cute"
BACKGROUNDS = (
    " on a {} background", " on {}", ", {} background", " against a {} background", " with a {} background",
    ", {} backdrop", " in front of a {} background",
)  # fmt: skip
GRADIENTS = (
    " on a {} to {} gradient background", " on a {} and {} gradient", ", gradient background from {} to {}",
    " on a gradient from {} to {}",
)  # fmt: skip


def held_out_word(word: str) -> bool:
    """Whether training never shows it: one in ten of the thesaurus's words that say nothing, for evaluation."""
    return zlib.crc32(word.encode()) % 10 == 0


@dataclass(frozen=True)
class Wording:
    """Describes scenes as people do, with the words of a thesaurus, in prompts that are not cut."""

    thesaurus: Thesaurus
    tokenizer: Tokenizer

    @classmethod
    def of(cls, thesaurus: Thesaurus, tokenizer: Tokenizer, held_out: bool = False) -> "Wording":
        """With the words that say nothing which training shows, or with those that it does not."""

        def some(words: Sequence[str]) -> tuple[str, ...]:
            return tuple(word for word in words if held_out_word(word) == held_out)

        parts: Any = {part: some(getattr(thesaurus, part)) for part in ("nouns", "adjectives", "verbs")}
        return cls(replace(thesaurus, **parts), tokenizer)

    def __call__(self, scene: Scene, rng: random.Random, said: Said) -> str:
        """Words for the scene."""
        things = zip(scene.things, said.names, strict=True)
        text = f" {rng.choice(LINKS)} ".join(self.thing(placed, name, rng) for placed, name in things)
        if rng.random() < 0.3:
            text = f"{rng.choice(OPENINGS)} {text}"
        ends = [f", {self.nothing(rng)}" for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 4)))]
        if len(scene.background) == 2:
            ends.append(rng.choice(GRADIENTS).format(*(self.colour(colour, rng) for colour in scene.background)))
        elif scene.background[0] != "white" or said.white:
            ends.append(rng.choice(BACKGROUNDS).format(self.colour(scene.background[0], rng)))
        if said.styled:
            ends.append(f", {rng.choice((*STYLE_WORDS[scene.style], *MORE_STYLES.get(scene.style, ())))}")
        rng.shuffle(ends)
        return text + "".join(ends)

    def thing(self, placed: Placed, name: str, rng: random.Random) -> str:
        several = rng.random() < 0.1
        words = plural(name) if several else name
        if placed.colour:
            words = f"{self.colour(placed.colour, rng)} {words}"
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            words = f"{self.adjective(rng)} {words}"
        if several:
            words = f"{rng.choice(SEVERAL)} {words}"
        else:
            pick = rng.random()
            words = a_or_an(words) if pick < 0.6 else words if pick < 0.8 else f"{rng.choice(DETERMINERS)} {words}"
        if rng.random() < 0.25:
            words = f"{words} {self.doing(rng)}"
        return words

    def said(self, scene: Scene, rng: random.Random) -> tuple[Said, Said]:
        """What a caption is to say of a scene, and the same with other names."""
        names, others = zip(*(self.names(placed.thing, rng) for placed in scene.things), strict=True)
        said = Said(names, rng.random() < 0.15, rng.random() < 0.6)
        return said, replace(said, names=others)

    def names(self, thing: Thing, rng: random.Random) -> tuple[str, str]:
        """A name that captions have, and one for the same: it is another only of a name that means nothing else."""
        others = self.thesaurus.names.get(thing.name)
        if others and rng.random() < 0.6:
            return plain(thing), rng.choice(others)
        name = name_of(thing, rng)
        return name, name

    def colour(self, colour: str, rng: random.Random) -> str:
        return rng.choice(SHADES[colour]) if rng.random() < 0.3 else colour

    def adjective(self, rng: random.Random) -> str:
        return rng.choice(FILLERS) if rng.random() < 0.3 else common(self.thesaurus.adjectives, rng)

    def doing(self, rng: random.Random) -> str:
        """What it does, or where it is: "sitting in the grass"."""
        noun, verb = common(self.thesaurus.nouns, rng), common(self.thesaurus.verbs, rng)
        where = f"{rng.choice(PLACES)} {rng.choice(('the', 'a', 'some', 'its'))} {noun}"
        return rng.choice((where, f"{verb} {where}", verb))

    def nothing(self, rng: random.Random) -> str:
        """Words that say nothing which a picture could show."""
        pick = rng.random()
        if pick < 0.5:
            return rng.choice(PRAISE)
        noun = common(self.thesaurus.nouns, rng)
        return noun if pick < 0.65 else f"{self.adjective(rng)} {noun}" if pick < 0.85 else self.doing(rng)

    def no_scene(self, told: str, rng: random.Random) -> str:
        """Other words for those that say nothing of any scene: for faults that captions know, or for none."""
        if told or rng.random() < 0.3:
            faults = [*told.split(", "), *rng.sample(MORE_FAULTS, rng.randint(1, 4))]
            rng.shuffle(faults)
            return ", ".join(filter(None, faults))
        text = ", ".join(self.nothing(rng) for _ in range(rng.randint(1, 4)))
        return f"{rng.choice(OPENINGS)} {text}" if rng.random() < 0.3 else text

    def pair(self, scene: Scene, rng: random.Random) -> tuple[str, str]:
        """A caption, and other words for the same."""
        as_before = rng.random() < AS_BEFORE
        if rng.random() < SAYS_NOTHING:
            told = no_caption(rng)
            return told, told if as_before else self.whole(lambda: self.no_scene(told, rng))
        said, otherwise = self.said(scene, rng)
        told = caption(scene, rng, said)
        return told, told if as_before else self.whole(lambda: self(scene, rng, otherwise))

    def whole(self, words: Callable[[], str]) -> str:
        """The first of some tries that the tokenizer does not cut, or else the last."""
        for _ in range(TRIES):
            text = words()
            if not self.tokenizer.encode(text)[1]:
                break
        return text

    def taught(self) -> set[str]:
        """The names of things, colours and styles that captions do not have, and all things' names for several."""
        others = set(chain(*self.thesaurus.names.values()))
        named = {*others, *map(plural, others | self.thesaurus.captions)}
        return {" ".join(words_of(name)) for name in (*named, *chain(*SHADES.values(), *MORE_STYLES.values()))}


def common(words: Sequence[str], rng: random.Random) -> str:
    """One of the words, of which the commonest come first, and these oftener."""
    return words[int(len(words) * rng.random() ** 2)]


class Encoders(nn.Module):
    """Both text encoders: token ids ``[B, S]`` to the UNet's context ``[B, S, D]`` and the pooled state ``[B, P]``."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        (first, _), (second, pooled) = (encoder(ids) for encoder in self.encoders)
        return torch.cat([first, second], dim=-1), pooled


def behind_prompts(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which places of token ids ``[B, S]`` are behind the prompt and its end: they have no words of their own."""
    end = (ids == tokenizer.end).int().argmax(dim=1, keepdim=True)
    return torch.arange(ids.shape[1], device=ids.device) > end


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
    seed: int = 0,
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
    width, height = ground.latents.size
    rows = ground.batch // DRAWN
    by_name = evenly(cast(list[Scene], ground.latents.scenes), wording.thesaurus.names)
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * rows, dtype=torch.float32, device=run.device)
    while stage.step < steps:
        rng = seeded("other words", seed, stage.number)
        clean, scenes = ground.latents.batch(READ * ground.batch, rng)
        scenes[rows::2] = [by_name(rng) for _ in scenes[rows::2]]  # of those that are not drawn
        captions, others = zip(*(wording.pair(scene, rng) for scene in scenes), strict=True)
        told, otherwise = tokenizer(list(captions)).to(run.device), wording.tokenizer(list(others)).to(run.device)
        timesteps = (torch.rand(rows) * TRAIN_STEPS).long()
        timesteps[torch.rand(rows) < PURE_NOISE] = TRAIN_STEPS - 1
        clean, timesteps = clean[:rows].to(run.device), timesteps.to(run.device)
        x, _ = noised(clean, timesteps, torch.randn(clean.shape).to(run.device), sigmas)
        with torch.autocast(run.kind, torch.bfloat16):
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

    things = pooled([thing.removesuffix(" face") for thing in names])
    learned = {}
    for i, (thing, others) in enumerate(names.items()):
        nearest = torch.cdist(pooled(others), things).argmin(dim=1) if others else ()
        learned[thing] = tuple(name for name, number in zip(others, nearest, strict=True) if number == i)
    return replace(wording, thesaurus=replace(wording.thesaurus, names=learned))
