"""How well a model draws what it is told, by an evaluator of its own (``reader.py``).

Of pictures drawn from held-out captions: how often the evaluator finds a picture's caption among 100, and the Frechet
distances (Heusel et al., arXiv 1706.08500) of its features of them to those of held-out renders: of whole pictures, and
of a part of each at full size, as the distillation's paper has both. What renders themselves get is the ceiling.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.kernels import cpu
from fulgurite.kernels.fused import fuse
from fulgurite.models import VAE, UNet
from fulgurite.training.drawing import Guide, Sayer, decoded, drawn
from fulgurite.training.evaluation.reader import close_up, rendered, scenes_of, seen, train_reader
from fulgurite.training.files import whole
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.loop import HERE, Run, TimeIsUpError
from fulgurite.training.precision import autocast, half
from fulgurite.training.scenes import caption
from fulgurite.training.sources import Sprites
from fulgurite.weights import Networks
from fulgurite.weights.files import Files
from fulgurite.weights.load import load_unet

AMONG = 100  # captions, of which one is right
REFERENCE = 2000  # held-out renders that distances are to
CHUNK = 250  # captions drawn and kept together
BATCH = 50  # rows of the UNet's
Network = TypeVar("Network", bound=nn.Module)


def found(likeness: Tensor, captions: Sequence[str], among: int = AMONG) -> np.ndarray:
    """Whether each picture's own caption, of the same row, is the likeliest among so many: ``[N]``, 0 or 1.

    ``likeness``: of all pictures and all captions ``[N, N]``. The other captions, which are others in their words, are
    drawn at random, always the same.
    """
    rng, hits = random.Random("among"), []
    for i, own in enumerate(captions):
        others = [j for j, other in enumerate(captions) if other != own]
        others = rng.sample(others, min(among - 1, len(others)))
        hits.append(float(likeness[i, i] > likeness[i, others].max()))
    return np.array(hits)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance between normal distributions fitted to two sets of features ``[N, F]``."""
    spread = np.cov(a.T), np.cov(b.T)
    crossed = np.sqrt(np.linalg.eigvals(spread[0] @ spread[1]).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(spread[0]) + np.trace(spread[1]) - 2 * crossed)


@dataclass(frozen=True)
class Score:
    """What one way of drawing got, each number with the half width of its 95 % confidence interval."""

    name: str
    pictures: int
    retrieval: tuple[float, float]  # share of pictures whose caption was found
    distance: tuple[float, float]
    close_up: tuple[float, float]  # distance of a part of each picture


def score(name: str, features: np.ndarray, hits: np.ndarray, reference: np.ndarray) -> Score:
    """Of features ``[N, 2, F]``: of whole pictures, and of a part of each."""
    share = float(hits.mean())
    within = 1.96 * float((share * (1 - share) / len(hits)) ** 0.5)
    whole, part = (distance(features[:, i], reference[:, i]) for i in range(2))
    return Score(name, len(hits), (share, within), whole, part)


def distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Frechet's, with the half width of its 95 % interval, by 100 samples drawn with replacement."""
    rng = np.random.default_rng(0)
    again = [frechet(features[rng.integers(0, len(features), len(features))], reference) for _ in range(100)]
    return frechet(features, reference), 1.96 * float(np.std(again))


def share(hits: int, count: int) -> str:
    """With its 95 % confidence interval (Wilson's, right near 0 and 1 too): over seeds, not over prompts."""
    squared = 1.96**2
    centre = (hits + squared / 2) / (count + squared)
    half = 1.96 * (hits * (count - hits) / count + squared / 4) ** 0.5 / (count + squared)
    return f"{100 * hits / count:.0f} % ({100 * (centre - half):.0f} to {100 * (centre + half):.0f})"


@dataclass(frozen=True)
class Way:
    """One way of drawing: a UNet, how many steps it takes, and whether with guidance."""

    name: str
    unet: Path
    loras: tuple[Path, ...]
    steps: int
    guided: bool


def ways_of(unet: Path, students: dict[int, Files]) -> list[Way]:
    """The undistilled model guided, then its students by their steps."""
    ways = [Way(named("teacher", n), unet, (), n, guided=True) for n in (32, 20, 8, 4, 2, 1)]
    return ways + [Way(named("student", n), files.unet, files.loras, n, guided=False) for n, files in students.items()]


def named(who: str, steps: int) -> str:
    return f"{who}, {steps} step{'s' * (steps > 1)}"


class Evaluation:
    """A model under evaluation: its networks, held-out captions, and what the evaluator makes of pictures of them.

    Features of pictures are kept in ``folder``, a file for each way and chunk of captions: a run that stopped goes on
    there. Of other weights or other data nothing that is kept is used.
    """

    def __init__(
        self,
        card: Card,
        networks: Networks,
        sprites: Sprites,
        folder: Path,
        count: int,
        steps: int,
        run: Run = HERE,
    ) -> None:
        """``steps``: of the evaluator's training. The networks are in ``half``."""
        self.card, self.vae, self.sprites, self.folder, self.run = card, networks.vae, sprites, folder, run
        self.scenes, rng = scenes_of(sprites, "captions", count, held_out=True), random.Random("captions")
        self.captions = [caption(scene, rng) for scene in self.scenes]
        self.reader = train_reader(sprites, folder, steps, run)
        self.data = fingerprint(self.reader, self.scenes, self.captions)
        self.model = fingerprint(self.data, networks.vae, *networks.text_encoders, card.guidance_strength)
        self.say = Sayer(networks.tokenizers, networks.text_encoders, run.device)
        with torch.no_grad():
            self.said = torch.cat([self.reader.captions([text]) for text in self.captions])
        quick(self.vae, run)
        reference = scenes_of(sprites, "reference", REFERENCE, held_out=True)
        self.reference = self.kept(
            "reference", self.data, len(reference), lambda start, stop: rendered(reference[start:stop], sprites)
        )

    def made_of(self, way: Way) -> str:
        return fingerprint(self.model, way.unet, *way.loras)

    def kept(self, name: str, made_of: str, count: int, pictures: Callable[[int, int], Tensor]) -> np.ndarray:
        """The evaluator's features ``[N, 2, F]`` of ``count`` pictures, whole and a part of each, chunk by chunk.

        ``pictures``: those of the numbers ``start`` to ``stop``, ``[N, 3, H, W]``.
        """
        chunks = []
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            path = self.folder / f"{as_file(name)}-{made_of}" / f"{start}-{stop}.npy"
            if not path.exists():
                if self.run.over():
                    raise TimeIsUpError(f"The time is up, at picture {start} of {count} of: {name}.")
                with torch.no_grad():
                    shown = pictures(start, stop)
                    looked_at = self.reader.pictures(seen(shown)), self.reader.pictures(close_up(shown, start))
                with whole(path) as new:
                    np.save(new, torch.stack(looked_at, dim=1).numpy())
            chunks.append(np.load(path))
        return np.concatenate(chunks)

    def table(self, name: str, head: Sequence[str], parts: Mapping[tuple[str, str], Callable[[], list[str]]]) -> str:
        """A Markdown table, told as it comes and kept as ``name.md``. Its parts' rows are kept as chunks are.

        ``parts``: by their names, and what they are made of.
        """
        rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for (part, made_of), make in parts.items():
            path = self.folder / name / f"{as_file(part)}-{made_of}.md"
            if not path.exists():
                if self.run.over():
                    raise TimeIsUpError(f"The time is up, at {part} of {name}.")
                with whole(path) as new:
                    new.write_text("\n".join(make()))
            rows += path.read_text().splitlines()
            print(path.read_text(), flush=True)
        table = "\n".join(rows) + "\n"
        (self.folder / f"{name}.md").write_text(table)
        return table

    def score(self, name: str, made_of: str, pictures: Callable[[int, int], Tensor]) -> Score:
        features = self.kept(name, made_of, len(self.captions), pictures)
        with torch.no_grad():
            hits = found(self.reader.likeness(torch.from_numpy(features[:, 0]), self.said), self.captions)
        return score(name, features, hits, self.reference)

    def renders(self, start: int, stop: int) -> Tensor:
        return rendered(self.scenes[start:stop], self.sprites)

    def autoencoded(self, start: int, stop: int) -> Tensor:
        scenes = self.scenes[start:stop]
        return torch.cat([through(self.vae, rendered([scene], self.sprites).to(self.run.device)) for scene in scenes])

    def drawn_by(self, way: Way) -> Callable[[int, int], Tensor]:
        """Draws the captions ``start`` to ``stop``, each from the noise of its own number."""
        unet = None

        def draw(start: int, stop: int) -> Tensor:
            nonlocal unet
            unet = unet or self.network(way)
            return self.pictures(unet, way, self.captions[start:stop], range(start, stop))

        return draw

    def pictures(self, unet: UNet, way: Way, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """What a way's network draws of the prompts, ``[N, 3, H, W]``."""
        shape, pictures = self.card.native_shapes[0], []
        for start in range(0, len(prompts), BATCH):
            some = slice(start, start + BATCH)
            to = self.say(prompts[some], shape)
            away = Guide(self.say([""] * len(to.context), shape), self.card.guidance_strength) if way.guided else None
            latents = drawn(unet, self.card, shape, to, away, seeds[some], way.steps)
            pictures.append(decoded(self.vae, latents).cpu())
        return torch.cat(pictures)

    def network(self, way: Way) -> UNet:
        unet = load_unet(way.unet, self.card, self.run.device, half(self.run.kind), way.loras)
        fuse(unet)
        return quick(unet, self.run)


def as_file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def quick(network: Network, run: Run) -> Network:
    """The network with the layers that serving has, in place."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.kind == "cpu":
        cpu.accelerate(network)
    return network


@torch.no_grad()
def through(vae: VAE, pictures: Tensor) -> Tensor:
    """Pixels ``[B, 3, H, W]`` there and back through the autoencoder."""
    with autocast(pictures.device.type):
        mean, _ = vae.encode(pictures.to(half(pictures.device.type)))
        return vae.decode(mean).float().clamp(-1, 1).cpu()


def evaluate(evaluation: Evaluation, ways: Sequence[Way]) -> list[Score]:
    """Scores of renders and of every way, told as they come, and kept as ``scores.md`` and ``scores.json``."""
    drawn_by: list[tuple[str, str, Callable[[int, int], Tensor]]] = [
        ("renders", evaluation.data, evaluation.renders),
        ("renders, autoencoded", evaluation.model, evaluation.autoencoded),
    ]
    drawn_by += [(way.name, evaluation.made_of(way), evaluation.drawn_by(way)) for way in ways]
    scores = []
    for drawer in drawn_by:
        scores.append(evaluation.score(*drawer))
        print(as_row(scores[-1]), flush=True)
    table = "| drawn by | captions | retrieval | distance | close up |\n|---|---|---|---|---|\n"
    (evaluation.folder / "scores.md").write_text(table + "".join(f"{as_row(s)}\n" for s in scores))
    (evaluation.folder / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=1))
    return scores


def as_row(s: Score) -> str:
    """A line of a Markdown table."""
    (share, within), (whole, wide), (part, apart) = s.retrieval, s.distance, s.close_up
    distances = f"{whole:.2f} ± {wide:.2f} | {part:.2f} ± {apart:.2f}"
    return f"| {s.name} | {s.pictures} | {100 * share:.1f} ± {100 * within:.1f} % | {distances} |"
