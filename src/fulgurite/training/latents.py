"""Scenes as latents on disk: the autoencoder sees each scene once, the teacher many times with fresh captions."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from fulgurite.models import VAE
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.scenes import Scene, caption, render, training_scene
from fulgurite.training.sources import Sprites
from fulgurite.training.vae import to_pixels

CHUNK = 32  # scenes encoded together
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
        with torch.autocast(device.type, torch.bfloat16):
            mean, _ = vae.encode(pixels.to(device, memory_format=torch.channels_last))
        rows.append(mean.half().cpu().numpy())
    return np.concatenate(rows)


@dataclass(frozen=True)
class LatentSet:
    """Latents of many scenes of one size, and the scenes, to be captioned anew each time."""

    size: tuple[int, int]
    latents: np.ndarray  # [N, C, h, w], float16
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
        folder.mkdir(parents=True, exist_ok=True)
        ranges = [range(i, min(i + 500, count)) for i in range(0, count, 500)]
        here = next(vae.parameters()).device.type == "cpu"
        workers = os.cpu_count() if here else min(os.cpu_count() or 1, AT_A_GPU)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(encode_scenes, sprites_folder, names, vae, size, numbers) for numbers in ranges]
            np.save(path, np.concatenate([job.result() for job in jobs]))
    return LatentSet(size, np.load(path), scenes)
