"""How well a model draws what it is told, by a judge of its own: an encoder of pictures and captions.

Trained by contrast (Radford et al., arXiv 2103.00020) on renders alone, never on generated pictures, it gives two
numbers for pictures drawn from held-out captions: how often it finds a picture's caption among 100, and the Frechet
distance (Heusel et al., arXiv 1706.08500) of its features of them to those of held-out renders. What renders
themselves get is the ceiling.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.models import VAE, CLIPTextConfig, CLIPTextEncoder, Tokenizer, UNet
from fulgurite.sampling import starting_noise, trailing_schedule
from fulgurite.training.loop import Stage
from fulgurite.training.scenes import Scene, caption, random_scene, render
from fulgurite.training.sources import Sprites
from fulgurite.training.steps import Guide, Sayer, on, walked
from fulgurite.training.vae import to_pixels
from fulgurite.weights import Networks
from fulgurite.weights.load import load_unet

SIDE = 64  # pixels, of what the encoder sees
FEATURES = 64
PICTURES = 4000  # rendered beforehand to train on
AMONG = 100  # captions, of which one is right
REFERENCE = 2000  # held-out renders that distances are to
BATCH = 32


class PictureEncoder(nn.Module):
    """Pictures ``[B, 3, 64, 64]`` to features ``[B, FEATURES]``."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 192)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1, groups=after // 16), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * (SIDE // 16) ** 2, FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


class Reader(nn.Module):
    """Pictures and captions in one space, where those that belong together are near."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.pictures = PictureEncoder()
        self.captions = CLIPTextEncoder(
            CLIPTextConfig(vocabulary, 96, 384, 2, 2, length, "gelu", FEATURES, eos_token_id=vocabulary - 1)
        )
        self.scale = nn.Parameter(torch.tensor(2.5))  # of likeness, as a logarithm

    def likeness(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """Of features ``[B, F]`` and ``[C, F]``: ``[B, C]``, logits."""
        return F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T * self.scale.exp()


def seen(pixels: Tensor) -> Tensor:
    """Pixels ``[B, 3, H, W]`` as the encoder sees them."""
    return F.interpolate(pixels, (SIDE, SIDE), mode="area")


def scenes_of(sprites: Sprites, kind: str, count: int) -> list[Scene]:
    return [random_scene(random.Random(f"{kind} {i}"), sprites) for i in range(count)]


def rendered(scenes: list[Scene], sprites: Sprites) -> Tensor:
    """Renders as the encoder sees them ``[N, 3, 64, 64]``."""
    return torch.cat([seen(to_pixels(render(scene, sprites)[None])) for scene in scenes])


def train_reader(sprites: Sprites, tokenizer: Tokenizer, vocabulary: int, folder: Path, steps: int) -> Reader:
    """Trains the judge in ``folder``, going on from its checkpoint."""
    torch.manual_seed(0)
    reader = Reader(vocabulary, tokenizer.length)
    stage = Stage(folder, nn.ModuleDict({"reader": reader}), peak=1e-3, steps=steps, decay=0.99, save_every=100)
    scenes = scenes_of(sprites, "reader", PICTURES)
    pictures = rendered(scenes, sprites) if stage.step < steps else torch.empty(0)
    while stage.step < steps:
        rng = random.Random(f"reader {stage.step}")
        picks = rng.sample(range(PICTURES), 128)
        ids = tokenizer([caption(scenes[i], rng) for i in picks])
        with torch.autocast("cpu", torch.bfloat16):
            features, said = reader.pictures(pictures[picks]), reader.captions(ids)[1]
        logits, right = reader.likeness(features.float(), said.float()), torch.arange(len(picks))
        stage.update({"contrast": (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2})
    average = stage.average["reader"]
    assert isinstance(average, Reader)
    return average.eval()


def found(likeness: Tensor, among: int = AMONG) -> np.ndarray:
    """Whether each picture's own caption, of the same row, is the likeliest among so many: ``[N]``, 0 or 1.

    ``likeness``: of all pictures and all captions ``[N, N]``. The other captions are drawn at random, always the same.
    """
    rng, n = random.Random("among"), len(likeness)
    hits = []
    for i in range(n):
        others = rng.sample([j for j in range(n) if j != i], min(among, n) - 1)
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


def score(name: str, features: np.ndarray, hits: np.ndarray, reference: np.ndarray) -> Score:
    """Intervals: the binomial's for retrieval; for the distance, of 100 samples drawn with replacement."""
    share = float(hits.mean())
    rng = np.random.default_rng(0)
    again = [frechet(features[rng.integers(0, len(features), len(features))], reference) for _ in range(100)]
    within = 1.96 * float((share * (1 - share) / len(hits)) ** 0.5)
    return Score(name, len(hits), (share, within), (frechet(features, reference), 1.96 * float(np.std(again))))


@torch.no_grad()
def drawn(unet: UNet, vae: VAE, card: Card, say: Sayer, captions: list[str], steps: int, guided: bool) -> Tensor:
    """Pictures of captions as the encoder sees them ``[N, 3, 64, 64]``, each row from its own number's noise."""
    schedule, shape = on(trailing_schedule(steps), say.device), card.native_shapes[0]
    latent = card.vae.latent_channels, shape[1] // card.vae.downscale, shape[0] // card.vae.downscale
    pictures = []
    for start in range(0, len(captions), BATCH):
        rows = captions[start : start + BATCH]
        seeds = range(start, start + len(rows))
        x = torch.stack([starting_noise(seed, latent, float(schedule.sigmas[0])) for seed in seeds]).to(say.device)
        guide = Guide(say([""] * len(rows), shape), card.guidance_strength) if guided else None
        first = torch.zeros(len(rows), dtype=torch.long, device=say.device)
        x = walked(unet, x, first, steps, schedule, say(rows, shape), card.prediction, guide)
        with torch.autocast(say.device, torch.bfloat16):
            pixels = vae.decode(x / card.vae.scaling_factor)
        pictures.append(seen(pixels.float().clamp(-1, 1)).cpu())
    return torch.cat(pictures)


@torch.no_grad()
def through(vae: VAE, pictures: Tensor) -> Tensor:
    """Pixels ``[B, 3, H, W]`` there and back through the autoencoder."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = vae.encode(pictures)
        return vae.decode(mean).float().clamp(-1, 1)


def evaluate(
    card: Card, networks: Networks, unet: Path, students: Path, sprites: Sprites, folder: Path, count: int, steps: int
) -> list[Score]:
    """Scores of renders, the undistilled model and every student in ``students``, over ``count`` held-out captions.

    Pictures' features are kept in ``folder``, a file each way of drawing: a run that stopped goes on there.
    """
    tokenizer = networks.tokenizers[0]
    reader = train_reader(sprites, tokenizer, card.text_encoders[0].vocab_size, folder / "reader", steps)
    scenes, rng = scenes_of(sprites, "held out", count), random.Random("captions")
    captions = [caption(scene, rng) for scene in scenes]
    encoders = nn.ModuleDict(dict(zip(("first", "second"), networks.text_encoders, strict=True)))
    say = Sayer(tokenizer, encoders, "cpu")
    with torch.no_grad():
        said = reader.captions(tokenizer(captions))[1]

    def kept(name: str, pictures: Callable[[], Tensor]) -> np.ndarray:
        path = folder / f"{name}-{count}.npy"
        if not path.exists():
            with torch.no_grad():
                np.save(path, reader.pictures(pictures()).numpy())
        return np.load(path)

    def again() -> Tensor:
        parts = (scenes[i : i + BATCH] for i in range(0, count, BATCH))
        return torch.cat(
            [seen(through(networks.vae, to_pixels(np.stack([render(s, sprites) for s in part])))) for part in parts]
        )

    def pictured(file: Path | None, n: int, guided: bool) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            network = load_unet(unet, card, "cpu", torch.float32, file).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return drawn(network, networks.vae, card, say, captions, n, guided)

        return draw

    reference = kept(f"reference-{REFERENCE}", lambda: rendered(scenes_of(sprites, "reference", REFERENCE), sprites))
    ways = {"renders": lambda: rendered(scenes, sprites), "renders, autoencoded": again}
    ways |= {f"teacher, {n} steps": pictured(None, n, True) for n in (32, 20, 8, 4, 2, 1)}
    files = sorted(students.glob("*.safetensors"), key=lambda path: (-int(path.stem.split("-")[0]), path.stem))
    ways |= {f"student {f.stem}": pictured(f, int(f.stem.split("-")[0]), False) for f in files}
    scores = []
    for name, pictures in ways.items():
        features = kept(name.replace(",", "").replace(" ", "-"), pictures)
        with torch.no_grad():
            hits = found(reader.likeness(torch.from_numpy(features), said))
        scores.append(score(name, features, hits, reference))
        print(as_row(scores[-1]), flush=True)
    (folder / "scores.json").write_text(json.dumps([s.__dict__ for s in scores], indent=1))
    return scores


def as_row(s: Score) -> str:
    """A line of a Markdown table."""
    (share, within), (distance, wide) = s.retrieval, s.distance
    return f"| {s.name} | {100 * share:.1f} ± {100 * within:.1f} % | {distance:.2f} ± {wide:.2f} |"
