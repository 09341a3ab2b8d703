"""Whether prompts in other words draw the same: with names that captions do not have, and words that say nothing.

The evaluator knows captions alone, so a picture is held against the caption of its scene, among 100, whatever its
prompt was. Of the words that say nothing those of the thesaurus are ones that training never showed.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch

from fulgurite.training.evaluation.reader import seen
from fulgurite.training.evaluation.scores import Evaluation, Way, found, share
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.prompts import Wording
from fulgurite.training.scenes import Scene, caption

KINDS = "captions", "other names", "other names, and words that say nothing"


def told(wording: Wording, scene: Scene, number: int) -> tuple[str, ...]:
    """A scene's caption, and the same in other words: a prompt of each kind."""
    said, otherwise = wording.said(scene, random.Random(f"said {number}"))
    rng = random.Random(f"words {number}")
    in_other_words = wording.whole(lambda: wording(scene, rng, otherwise))
    return caption(scene, rng, said), caption(scene, rng, otherwise), in_other_words


@torch.no_grad()
def rows_of(evaluation: Evaluation, way: Way, prompts: Sequence[Sequence[str]]) -> list[str]:
    """Lines of the table for pictures that a way draws of the prompts of each kind, of the same scenes in order."""
    unet, captions, rows = evaluation.network(way), evaluation.reader.captions(prompts[0]), []
    for kind, texts in zip(KINDS, prompts, strict=True):
        pictures = evaluation.pictures(unet, way, texts, range(len(texts)))
        likeness = evaluation.reader.likeness(evaluation.reader.pictures(seen(pictures)), captions)
        hits = found(likeness, prompts[0])
        rows.append(f"| {way.name}, {kind} | {len(texts)} | {share(int(hits.sum()), len(texts))} |")
    return rows


def wordings(evaluation: Evaluation, ways: Sequence[Way], wording: Wording, count: int) -> str:
    """A Markdown table of how often the evaluator finds the caption of what was asked for in other words.

    ``count``: scenes, at most.
    """
    prompts = list(zip(*(told(wording, scene, i) for i, scene in enumerate(evaluation.scenes[:count])), strict=True))
    head = "drawn by", "pictures", "whose caption is found among 100"
    parts = {
        (way.name, fingerprint(evaluation.made_of(way), prompts)): partial(rows_of, evaluation, way, prompts)
        for way in ways
    }
    return evaluation.table("wordings", head, parts)
