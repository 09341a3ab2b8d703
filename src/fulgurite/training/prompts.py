"""Prompts for scenes as people write them, in other words than captions have: "portrait of a majestic lion, 8k"."""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from fulgurite.models import Tokenizer
from fulgurite.models.tokenizer import words_of
from fulgurite.training.phrases import MORE_FAULTS, MORE_LINKS, MORE_STYLES, OPENINGS, PRAISE, SHADES
from fulgurite.training.scenes import (
    LINKS,
    STYLE_WORDS,
    Placed,
    Said,
    Scene,
    a_or_an,
    caption,
    linked,
    name_of,
    no_caption,
    plain,
    styled,
)
from fulgurite.training.sources import Thing
from fulgurite.training.thesaurus import AROUND, Thesaurus, plural
from fulgurite.training.words import FILLERS

AS_BEFORE = 0.25  # how often a caption is described by itself: what is known is to stay
SAYS_NOTHING = 0.1  # how often there is no scene
OTHERWISE = 0.4  # how often a prompt is in other words, in stages that learn captions and others alike
TRIES = 20
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
        links = MORE_LINKS if rng.random() < 0.5 else LINKS
        text = linked(scene, [self.thing(placed, name, rng) for placed, name in things], links, rng)
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
        said = Said(names, rng.random() < 0.15, styled(scene, rng))
        return said, replace(said, names=others)

    def names(self, thing: Thing, rng: random.Random) -> tuple[str, str]:
        """A name that captions have, and one for the same: it is another only of a name that means nothing else."""
        others = self.thesaurus.names.get(thing.name)
        if others and rng.random() < 0.6:
            return plain(thing.name), rng.choice(others)
        name = name_of(thing, rng)
        return name, name

    def colour(self, colour: str, rng: random.Random) -> str:
        return rng.choice(SHADES[colour]) if rng.random() < 0.3 else colour

    def adjective(self, rng: random.Random) -> str:
        return rng.choice(FILLERS) if rng.random() < 0.3 else common(self.thesaurus.adjectives, rng)

    def doing(self, rng: random.Random) -> str:
        """What it does, or where it is: "sitting in the grass"."""
        noun, verb = common(self.thesaurus.nouns, rng), common(self.thesaurus.verbs, rng)
        where = f"{rng.choice(AROUND)} {rng.choice(('the', 'a', 'some', 'its'))} {noun}"
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

    def describe(self, scene: Scene | None, rng: random.Random) -> str:
        """A caption or other words for a scene, or what says nothing of any."""
        if scene is None:
            told = no_caption(rng)
            return told if rng.random() >= OTHERWISE else self.whole(lambda: self.no_scene(told, rng))
        if rng.random() >= OTHERWISE:
            return caption(scene, rng)
        _, said = self.said(scene, rng)
        return self.whole(lambda: self(scene, rng, said))

    def whole(self, words: Callable[[], str]) -> str:
        """The first of some tries that the tokenizer does not cut, or else the last."""
        for _ in range(TRIES):
            text = words()
            if not self.tokenizer.encode(text)[1]:
                break
        return text

    def taught(self) -> set[str]:
        """The names of things, colours and styles that captions do not have, and all things' names for several.

        And what may stand between two things.
        """
        others = set(chain(*self.thesaurus.names.values()))
        named = {*others, *map(plural, (*others, *self.thesaurus.captions))}
        links = chain(*chain(*MORE_LINKS.values()))
        return {" ".join(words_of(name)) for name in (*named, *links, *chain(*SHADES.values(), *MORE_STYLES.values()))}


def common(words: Sequence[str], rng: random.Random) -> str:
    """One of the words, of which the commonest come first, and these oftener."""
    return words[int(len(words) * rng.random() ** 2)]
