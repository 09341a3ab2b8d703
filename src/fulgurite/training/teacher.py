"""Stage three: the UNet, from prompts and latents, to predict v (arXiv 2202.00512).

The last timestep is trained on pure noise, which is what sampling starts from: SDXL's schedule leaks a little of the
picture there, enough to fix its brightness (Lin et al., arXiv 2305.08891).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.kernels.cpu import accelerate_training
from fulgurite.models import UNet
from fulgurite.models.unet import ResnetBlock, SpatialTransformer
from fulgurite.pipeline import size_conditioning
from fulgurite.sampling import TRAIN_STEPS, train_sigmas
from fulgurite.training.drawing import seeded
from fulgurite.training.latents import LatentSet
from fulgurite.training.loop import HERE, Run, Stage
from fulgurite.training.precision import autocast
from fulgurite.training.prompts import Wording

UNCONDITIONAL = 0.1  # how often the prompt says nothing, for classifier-free guidance
PURE_NOISE = 0.04  # how often a row starts from pure noise at the last timestep


def noised(latents: Tensor, timesteps: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at their timesteps' noise, of unit variance, and the v that the network should predict.

    At the last timestep the input is the noise alone.
    """
    sigma = sigmas[timesteps].view(-1, 1, 1, 1)
    signal, spread = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    pure = (timesteps == TRAIN_STEPS - 1).view(-1, 1, 1, 1)
    x = torch.where(pure, spread * noise, signal * latents + spread * noise)
    return x, signal * noise - spread * latents


@torch.no_grad()
def initialize(unet: UNet) -> None:
    """Starts as a shallow network: every residual branch silent, as diffusion UNets have done since DDPM."""
    silent: list[nn.Conv2d | nn.Linear] = [unet.conv_out]
    silent += [module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock)]
    silent += [module.proj_out for module in unet.modules() if isinstance(module, SpatialTransformer)]
    for layer in silent:
        nn.init.zeros_(layer.weight)


def train_teacher(
    latents: LatentSet,
    wording: Wording,
    card: Card,
    encoders: nn.ModuleDict,
    folder: Path,
    steps: int,
    run: Run = HERE,
    batch: int = 32,
) -> UNet:
    """Trains in ``folder``, going on from its checkpoint; returns the averaged network."""
    device = run.device
    torch.manual_seed(0)
    unet = UNet(card.unet).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialize(unet)
    if run.kind == "cpu":
        accelerate_training(unet)
    encoders = encoders.requires_grad_(False)
    stage = Stage(folder, nn.ModuleDict({"unet": unet}), peak=1e-3, steps=steps, decay=0.9985, run=run)
    sigmas = train_sigmas().to(device)
    sizes = size_conditioning(latents.size).to(device).expand(batch, -1)

    def loss(ids: Tensor, x: Tensor, timesteps: Tensor, target: Tensor) -> Tensor:
        with autocast(run.kind):
            (first, _), (second, pooled) = (encoder(ids) for encoder in encoders.values())
            v = unet(x, timesteps, torch.cat([first, second], dim=-1), pooled, sizes)
        return F.mse_loss(v.float(), target)

    while stage.step < steps:
        rng = seeded("teacher", stage.number)
        clean, scenes = latents.batch(batch, rng)
        prompts = [wording.describe(None if rng.random() < UNCONDITIONAL else scene, rng) for scene in scenes]
        timesteps = ((1 - torch.rand(batch) ** 2) * TRAIN_STEPS).long().clamp_max(TRAIN_STEPS - 1)
        timesteps[torch.rand(batch) < PURE_NOISE] = TRAIN_STEPS - 1
        clean, timesteps, ids = (y.to(device) for y in (clean, timesteps, wording.tokenizer(prompts)))
        x, target = noised(clean, timesteps, torch.randn(clean.shape).to(device), sigmas)
        stage.update({"v": loss(ids, x, timesteps, target)})
    average = stage.average["unet"]
    assert isinstance(average, UNet)
    return average.eval()
