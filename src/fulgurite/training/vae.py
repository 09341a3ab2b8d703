"""Stage one: the autoencoder (Rombach et al., arXiv 2112.10752, section 3.1).

Vector art is flat areas with sharp edges: an absolute error on pixels and on their differences keeps both. The
adversarial part comes when there is a UNet (``decoder.py``).
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fulgurite.models import VAE, VAEConfig
from fulgurite.models.vae import Attention, ResnetBlock
from fulgurite.training.drawing import seeded
from fulgurite.training.loop import HERE, Run, Stage
from fulgurite.training.precision import autocast
from fulgurite.training.scenes import render, training_scene
from fulgurite.training.sources import Sprites

CROP = 96  # pixels: the network is convolutional, so parts of pictures teach it as much for less
PICTURES = 3000  # rendered beforehand
BATCH = 16
KL_WEIGHT = 1e-5
FIRST_LOG_VARIANCE = -6.0  # from 0, the noise drowns what the encoder has to say, and it falls silent for good
LAST_CONSTANT = 1.0  # about two and a half times the spread of what the last block starts with
QUIET_STEPS = 800  # over these, the terms that a constant picture pleases most rise from nothing


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Pictures ``[B, H, W, 3]``, uint8, to the network's pixels ``[B, 3, H, W]`` in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def render_pictures(sprites: Sprites, count: int, seed: str) -> np.ndarray:
    """Scenes as pictures ``[N, 256, 256, 3]``, uint8."""
    rng = random.Random(seed)
    return np.stack([render(training_scene(rng, sprites), sprites) for _ in range(count)])


def crops(rng: random.Random, pictures: np.ndarray, count: int) -> Tensor:
    """A random crop of each of ``count`` pictures: many pictures a step, since each has few colours."""
    room = pictures.shape[1] - CROP
    picks = [(rng.randrange(len(pictures)), rng.randint(0, room), rng.randint(0, room)) for _ in range(count)]
    return to_pixels(np.stack([pictures[i, y : y + CROP, x : x + CROP] for i, y, x in picks]))


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_losses(pixels: Tensor, again: Tensor) -> dict[str, Tensor]:
    differences = [(a - b).abs().mean() for a, b in zip(edges(pixels), edges(again), strict=True)]
    squared = (pixels - again).square().mean()  # leaves the plateau of the mean colour, where the absolute error sits
    return {"pixels": (pixels - again).abs().mean(), "squared": squared, "edges": torch.stack(differences).sum() * 0.5}


@torch.no_grad()
def initialize(vae: VAE) -> None:
    """Starts as a linear network: every residual branch silent, every other convolution keeping variance.

    The last group norm sees constants much larger than the picture, with both signs in every group. Without them it
    takes each picture's mean colour away, and many hundreds of steps go by before the network has found that out.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, Attention):
            for parameter in module.to_out.parameters():
                nn.init.zeros_(parameter)
    *_, last_block = (module for module in vae.decoder.up_blocks.modules() if isinstance(module, ResnetBlock))
    last = last_block.conv2.bias
    assert last is not None
    last[0::2], last[1::2] = LAST_CONSTANT, -LAST_CONSTANT
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[vae.config.latent_channels :] = FIRST_LOG_VARIANCE


def train_vae(sprites: Sprites, config: VAEConfig, folder: Path, steps: int, run: Run = HERE) -> VAE:
    """Trains an autoencoder in ``folder``, going on from its checkpoint, and returns the averaged network."""
    device = run.device
    torch.manual_seed(0)
    vae = VAE(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialize(vae)
    stage = Stage(folder, nn.ModuleDict({"vae": vae}), peak=1e-3, steps=steps, decay=0.998, run=run)

    def reconstruct(pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(run.kind):
            mean, log_variance = (y.float() for y in vae.encode(pixels))
            again = vae.decode(mean + (0.5 * log_variance).exp() * noise).float()
        return again, 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()

    cell = config.downscale
    pictures = render_pictures(sprites, PICTURES, "vae") if stage.step < steps else np.empty(0)
    while stage.step < steps:
        rng = seeded("vae", stage.number)
        pixels = crops(rng, pictures, BATCH).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        noise = torch.randn(BATCH, config.latent_channels, CROP // cell, CROP // cell).to(device)
        again, divergence = reconstruct(pixels, noise)
        losses = reconstruction_losses(pixels, again)
        rise = min(1.0, stage.step / QUIET_STEPS)
        stage.update({**losses, "edges": rise * losses["edges"], "kl": rise * KL_WEIGHT * divergence})
    average = stage.average["vae"]
    assert isinstance(average, VAE)
    return average.eval()


@torch.no_grad()
def normalize_latents(vae: VAE, pixels: Tensor) -> None:
    """Folds each latent channel's mean and spread into the two 1x1 convolutions, so that latents are of unit scale."""
    channels = vae.config.latent_channels
    mean, _ = vae.encode(pixels)
    centre, spread = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into.bias is not None
    assert out.bias is not None
    out.bias += out.weight[:, :, 0, 0] @ centre
    out.weight *= spread[None, :, None, None]
    into.bias[:channels] = (into.bias[:channels] - centre) / spread
    into.weight[:channels] /= spread[:, None, None, None]
    into.bias[channels:] -= 2 * spread.log()
