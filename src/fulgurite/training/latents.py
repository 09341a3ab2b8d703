"""Scenes as latents on disk: the autoencoder sees each scene once, the teacher many times with fresh captions."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fulgurite.models import VAE
from fulgurite.training.files import whole
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.precision import autocast
from fulgurite.training.scenes import Scene, caption, render, training_scene
from fulgurite.training.sources import Sprites
from fulgurite.training.vae import to_pixels
from fulgurite.training.workers import workers

CHUNK = 32  # scenes encoded together
TASK = 3 * CHUNK  # scenes a worker is given at a time, which an interrupted run waits for
AT_A_GPU = 8  # processes that share one, each of which takes some of its memory
FEW = 50  # scenes that tell one set of things and of their weights from another


def scene_at(sprites: Sprites, size: tuple[int, int], index: int) -> Scene:
    """The data set's scene of this number: it depends on size and number alone."""
    return training_scene(random.Random(f"scene {size} {index}"), sprites, size)


@torch.inference_mode()
def encode_scenes(
    sprites_folder: Path, names: frozenset[str] | None, vae: VAE, size: tuple[int, int], numbers: range
) -> np.ndarray:
    """Latents ``[N, C, h, w]``, float16, of the scenes of these numbers."""
    torch.set_num_threads(1)  # one process a core
    sprites = Sprites.open(sprites_folder, names)
    device = next(vae.parameters()).device
    rows = []
    for start in range(numbers.start, numbers.stop, CHUNK):
        chunk = range(start, min(start + CHUNK, numbers.stop))
        pixels = to_pixels(np.stack([render(scene_at(sprites, size, i), sprites) for i in chunk]))
        with autocast(device.type):
            mean, _ = vae.encode(pixels.to(device, memory_format=torch.channels_last))
        rows.append(mean.half().cpu().numpy())
    return np.concatenate(rows)


class LatentFiles:
    """Latents in a file each, as an array that is read where it is looked at: memory does not hold a million's."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __getitem__(self, picks: list[int] | slice) -> np.ndarray:
        files = self.files[picks] if isinstance(picks, slice) else [self.files[i] for i in picks]
        return np.stack([np.load(file) for file in files])


@dataclass(frozen=True)
class LatentSet:
    """Latents of many scenes of one size, and the scenes, to be captioned anew each time."""

    size: tuple[int, int]
    latents: np.ndarray | LatentFiles  # [N, C, h, w], float16
    scenes: list[Scene] | list[str]  # or a caption each

    def batch(self, count: int, rng: random.Random) -> tuple[torch.Tensor, list]:
        """Some scenes at random: latents ``[B, C, h, w]``, float32, and what is in them."""
        picks = rng.choices(range(len(self.scenes)), k=count)
        return torch.from_numpy(self.latents[picks]).float(), [self.scenes[i] for i in picks]


def said(what: Scene | str, rng: random.Random) -> str:
    """A caption: of a scene a new one each time."""
    return what if isinstance(what, str) else caption(what, rng)


def build_latents(
    sprites_folder: Path, names: frozenset[str] | None, vae: VAE, size: tuple[int, int], count: int, folder: Path
) -> LatentSet:
    """Encodes scenes 0..count of the things with these names, or of all, into ``folder``; done once, then read back."""
    sprites = Sprites.open(sprites_folder, names)
    scenes = [scene_at(sprites, size, i) for i in range(count)]
    path = folder / f"latents-{size[0]}x{size[1]}-{count}-{fingerprint(vae.encoder, vae.quant_conv, scenes[:FEW])}.npy"
    if not path.exists():
        ranges = [range(i, min(i + TASK, count)) for i in range(0, count, TASK)]
        cores, here = os.cpu_count() or 1, next(vae.parameters()).device.type == "cpu"
        with workers(cores if here else min(cores, AT_A_GPU)) as pool, whole(path) as new:
            jobs = [pool.submit(encode_scenes, sprites_folder, names, vae, size, numbers) for numbers in ranges]
            np.save(new, np.concatenate([job.result() for job in jobs]))
    return LatentSet(size, np.load(path), scenes)
