"""The tokenizer's vocabulary, learned from captions, and grown by more text into the places that those left unused."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from fulgurite.models.tokenizer import END, START, clip_bpe, read_vocabulary, words_of
from fulgurite.training.scenes import caption, names_of, no_caption, random_scene
from fulgurite.training.sources import Sprites

UNUSED = "<|unused"


def train_tokenizer(captions: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of ``size`` in CLIP's order: bytes, bytes that end a word, merges, start, end; and its merges."""
    letters = sorted(ByteLevel.alphabet())
    alphabet = letters + [letter + "</w>" for letter in letters]
    bpe = clip_bpe({START: 0, END: 1}, [])
    trainer = BpeTrainer(
        vocab_size=2 * size, initial_alphabet=letters, end_of_word_suffix="</w>", special_tokens=[START, END],
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    merges = learned[: size - len(alphabet) - 2]
    words = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    words |= dict.fromkeys(f"{UNUSED}{i}|>" for i in range(size - len(words) - 2))
    words |= dict.fromkeys([START, END])
    return {word: i for i, word in enumerate(words)}, merges  # type: ignore[return-value]


def write_tokenizer(sprites: Sprites, size: int, folder: Path) -> None:
    """Learns the vocabulary from captions, and writes it as CLIP's tokenizer is published; beside it, their words."""
    rng = random.Random("tokenizer")
    texts = [caption(random_scene(rng, sprites), rng) for _ in range(20_000)]
    texts += [no_caption(rng) for _ in range(1_000)]
    vocab, merges = train_tokenizer(texts, size)
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder, vocab, merges)
    add_words(folder, words_of(" ".join(chain(texts, *map(names_of, sprites.things)))))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": END}), encoding="utf-8")


def write_vocabulary(folder: Path, vocab: dict[str, int], merges: Iterable[tuple[str, str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def add_words(folder: Path, words: Iterable[str]) -> None:
    """Adds words, and names of several, to the list of those that the text encoders know, in a tokenizer's folder."""
    listed = folder / "words.txt"
    known = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    listed.write_text("\n".join([*sorted({*known, *words}), ""]), encoding="utf-8")


@dataclass(frozen=True)
class Grown:
    """A vocabulary with more merges."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    new: list[tuple[int, int, int]]  # its new tokens in their order, each with the two that it is of


def grow(folder: Path, texts: Iterable[str]) -> Grown:
    """Learns more merges from texts, as many as the vocabulary in ``folder`` has unused places for.

    What was learned before keeps its numbers.
    """
    vocab, merges = read_vocabulary(folder)
    numbers = {number: token for token, number in vocab.items()}
    free = sorted(number for number, token in numbers.items() if token.startswith(UNUSED))
    if not free:
        return Grown(vocab, merges, [])

    bpe = clip_bpe(vocab, merges)
    counts: Counter[str] = Counter()
    for text in texts:
        split = bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(text))
        counts.update(word for word, _ in split)
    words = [(bpe.model.tokenize(word), count) for word, count in counts.items()]
    pieces = [([token.value for token in tokens], count) for tokens, count in words]

    new = []
    for number, (a, b) in zip(free, next_merges(pieces), strict=False):
        del vocab[numbers[number]]
        new.append((number, vocab[a], vocab[b]))
        vocab[a + b] = number
        merges.append((a, b))
    return Grown(dict(sorted(vocab.items(), key=lambda item: item[1])), merges, new)


def next_merges(words: list[tuple[list[str], int]]) -> Iterable[tuple[str, str]]:
    """The commonest pair of neighbours, then that of what this makes, and so on (Sennrich et al., arXiv 1508.07909).

    ``words``: each as its pieces, which are merged in place, and how often it occurs.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    having = defaultdict(set)
    for i, (pieces, count) in enumerate(words):
        for pair in pairwise(pieces):
            pairs[pair] += count
            having[pair].add(i)
    while pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            return
        yield best
        for i in having.pop(best):
            pieces, count = words[i]
            for pair in pairwise(pieces):
                pairs[pair] -= count
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces[:] = merged
            for pair in pairwise(pieces):
                pairs[pair] += count
                having[pair].add(i)
        del pairs[best]
