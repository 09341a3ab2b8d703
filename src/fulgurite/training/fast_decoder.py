"""Beside the other stages: a tiny decoder that learns from the VAE's own what a latent looks like.

The full decoder's pictures are the lesson, not the scenes: what the one makes of a latent, the other shall make of it.
"""

import random
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from fulgurite.models import VAE, TinyDecoder, TinyDecoderConfig
from fulgurite.models.tiny_decoder import Block
from fulgurite.training.files import whole
from fulgurite.training.loop import HERE, Run, Stage
from fulgurite.training.precision import autocast, half
from fulgurite.training.vae import reconstruction_losses, to_pixels

PICTURES = 3000  # decoded beforehand, at most
BATCH = 4
MOST_NOISE = 0.15  # of unit scale: students' latents are never exactly what the encoder says, some further off
CHUNK = 16  # pictures decoded together


def disturbed(latents: np.ndarray, seed: str) -> Tensor:
    """Latents ``[N, C, h, w]``, float32, each with some noise of its own strength."""
    numbers = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    clean = torch.from_numpy(latents).float()
    strength = MOST_NOISE * torch.rand(len(clean), 1, 1, 1, generator=numbers)
    return clean + strength * torch.randn(clean.shape, generator=numbers)


@torch.inference_mode()
def pictures_of(vae: VAE, latents: Tensor, device: str, path: Path) -> np.ndarray:
    """What the full decoder makes of latents ``[N, C, h, w]``: pictures ``[N, H, W, 3]``, uint8, mapped from ``path``.

    Done once, then read back.
    """
    if not path.exists():
        dtype = half(torch.device(device).type)
        quick = deepcopy(vae).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        rows = []
        for chunk in latents.split(CHUNK):
            pixels = quick.decode((chunk / vae.config.scaling_factor).to(device, dtype)).float()
            rows.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        with whole(path) as new:
            np.save(new, np.concatenate(rows))
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def initialize(decoder: TinyDecoder) -> None:
    """Starts with every block silent, and with convolutions that keep variance."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in decoder.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv.get_parameter("4.weight"))


def train_fast_decoder(
    latents: np.ndarray,
    vae: VAE,
    config: TinyDecoderConfig,
    folder: Path,
    steps: int,
    run: Run = HERE,
) -> TinyDecoder:
    """Trains a tiny decoder of latents ``[N, C, h, w]`` in ``folder``, going on from its checkpoint.

    Latents are as the UNet has them, scaled. Returns the averaged network.
    """
    torch.manual_seed(0)
    decoder = TinyDecoder(config)
    initialize(decoder)
    decoder.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = Stage(folder, nn.ModuleDict({"fast_decoder": decoder}), peak=2e-3, steps=steps, decay=0.998, run=run)
    lessons = disturbed(latents[:PICTURES], "fast decoder")
    path = folder / f"pictures-{len(lessons)}.npy"
    with PartialState().main_process_first():
        pictures = pictures_of(vae, lessons, run.device, path) if stage.step < steps else np.empty(0)
    while stage.step < steps:
        picks = random.Random(f"fast decoder {stage.number}").choices(range(len(lessons)), k=BATCH)
        with autocast(run.kind):
            again = decoder(lessons[picks].to(run.device, memory_format=torch.channels_last)).float()
        stage.update(reconstruction_losses(to_pixels(pictures[picks]).to(run.device), again))
    average = stage.average["fast_decoder"]
    assert isinstance(average, TinyDecoder)
    return average.eval()
