"""The evaluator of finished models: an encoder of pictures and one of captions, in one space.

Trained by contrast (Radford et al., arXiv 2103.00020) on renders alone, never on generated pictures. It reads
captions by the shipped model's tokenizer, whichever model is scored: models of other words have the same evaluator.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.cards import card
from fulgurite.models import CLIPTextConfig, CLIPTextEncoder
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.loop import HERE, Run, Stage
from fulgurite.training.precision import autocast
from fulgurite.training.scenes import Scene, caption, held_out_together, random_scene, render
from fulgurite.training.sources import Sprites
from fulgurite.training.vae import to_pixels
from fulgurite.weights.load import load_tokenizer, locate

SHIPPED = "fulgurite/spark"
SIDE = 64  # pixels, of what the encoder sees
FEATURES = 64
PICTURES = 24_000  # rendered beforehand to train on
BATCH = 128


def tokenizer_folder() -> Path:
    """Of the shipped model's tokenizer, by which captions are read."""
    return locate(card(SHIPPED), 0).tokenizers[0]


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

    def __init__(self) -> None:
        super().__init__()
        words = card(SHIPPED).text_encoders[0]
        self.tokenizer = load_tokenizer(tokenizer_folder(), words)
        self.pictures = PictureEncoder()
        self.texts = CLIPTextEncoder(
            CLIPTextConfig(
                words.vocab_size, 96, 384, 2, 2, words.max_position_embeddings, "gelu", FEATURES,
                eos_token_id=words.eos_token_id,
            )
        )  # fmt: skip
        self.scale = nn.Parameter(torch.tensor(2.5))  # of likeness, as a logarithm

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Features ``[C, F]`` of captions."""
        return self.texts(self.tokenizer(list(captions)))[1]

    def likeness(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """Of features ``[B, F]`` and ``[C, F]``: ``[B, C]``, logits."""
        return F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T * self.scale.exp()


def seen(pixels: Tensor) -> Tensor:
    """Pixels ``[B, 3, H, W]`` as the encoder sees them."""
    return F.interpolate(pixels, (SIDE, SIDE), mode="area")


def close_up(pixels: Tensor, first: int) -> Tensor:
    """A part of each of the pictures ``[B, 3, H, W]``, of which the first has this number, at a place of its number's.

    As large as what the encoder sees, so that it sees what is lost in a whole picture: how sharp lines are.
    """
    height, width = pixels.shape[2:]
    parts = []
    for number, picture in enumerate(pixels, first):
        rng = random.Random(f"close up {number}")
        top, left = (round(rng.uniform(0.25, 0.75) * (side - SIDE)) for side in (height, width))
        parts.append(picture[:, top : top + SIDE, left : left + SIDE])
    return torch.stack(parts)


def scenes_of(sprites: Sprites, kind: str, count: int, held_out: bool) -> list[Scene]:
    """So many scenes, each from a number of its own; all ``held_out`` from training by what they hold, or none."""

    def scene(rng: random.Random) -> Scene:
        drawn = (random_scene(rng, sprites) for _ in itertools.count())
        return next(scene for scene in drawn if held_out_together(scene) == held_out)

    return [scene(random.Random(f"{kind} {i}")) for i in range(count)]


def rendered(scenes: list[Scene], sprites: Sprites) -> Tensor:
    """Renders ``[N, 3, H, W]``."""
    return torch.cat([to_pixels(render(scene, sprites)[None]) for scene in scenes])


def seen_renders(scenes: list[Scene], sprites: Sprites) -> Tensor:
    """Renders as the encoder sees them ``[N, 3, 64, 64]``, one at a time: whole ones of many scenes take gigabytes."""
    found = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.bfloat16)
    for row, scene in zip(found, scenes, strict=True):
        row.copy_(seen(rendered([scene], sprites))[0])
    return found


def train_reader(sprites: Sprites, folder: Path, steps: int, run: Run = HERE) -> Reader:
    """Trains the evaluator in a folder of its own in ``folder``, going on from its checkpoint."""
    torch.manual_seed(0)
    reader, scenes = Reader(), scenes_of(sprites, "reader", PICTURES, held_out=False)
    folder = folder / f"reader-{fingerprint(reader, tokenizer_folder() / 'merges.txt', scenes, BATCH, steps)}"
    networks = nn.ModuleDict({"reader": reader})
    stage = Stage(folder, networks, peak=1e-3, steps=steps, decay=0.99, save_every=100, run=run)
    pictures = seen_renders(scenes, sprites) if stage.step < steps else torch.empty(0)
    while stage.step < steps:
        rng = random.Random(f"reader {stage.number}")
        picks = rng.sample(range(PICTURES), BATCH)
        with autocast("cpu"):
            features = reader.pictures(pictures[picks].float())
            said = reader.captions([caption(scenes[i], rng) for i in picks])
        logits, right = reader.likeness(features.float(), said.float()), torch.arange(BATCH)
        stage.update({"contrast": (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2})
    average = stage.average["reader"]
    assert isinstance(average, Reader)
    return average.eval()
