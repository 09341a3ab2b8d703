"""Batches drawn as the pipeline draws one picture: the sampler's own schedules and steps, a row each its own step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fulgurite.cards import Card
from fulgurite.models import VAE, AttentionGuidance, Tokenizer, UNet
from fulgurite.pipeline import size_conditioning
from fulgurite.sampling import (
    Schedule,
    euler_step,
    scale_input,
    starting_noise,
    to_denoised,
    trailing_schedule,
)
from fulgurite.training.precision import autocast, half

DECODED = 4096  # places of latents together: more do not fit a processor's cache


@dataclass(frozen=True)
class Conditions:
    """The UNet's conditioning, a row each: text states, pooled state, sizes."""

    context: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]
    sizes: Tensor  # [B, 6]

    def nothing(self) -> "Conditions":
        """Of no prompt at all, as SDXL was trained: no states, where the prompt's are."""
        return replace(self, context=torch.zeros_like(self.context), pooled=torch.zeros_like(self.pooled))

    def picked(self, rows: Tensor | slice) -> "Conditions":
        return Conditions(self.context[rows], self.pooled[rows], self.sizes[rows])


class Sayer:
    """Encodes captions into the UNet's conditions."""

    def __init__(self, tokenizers: Sequence[Tokenizer], encoders: Sequence[nn.Module], device: str) -> None:
        self.tokenizers, self.device = tokenizers, device
        self.encoders = [encoder.requires_grad_(False).eval() for encoder in encoders]

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], size: tuple[int, int]) -> Conditions:
        """``size``: width, height in pixels."""
        (first, _), (second, pooled) = (
            encoder(tokenizer(list(captions)).to(self.device))
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
        )
        sizes = size_conditioning(size).to(self.device)
        return Conditions(torch.cat([first, second], dim=-1), pooled, sizes.expand(len(captions), -1))


@dataclass(frozen=True)
class Guide:
    """Classifier-free guidance (arXiv 2207.12598): away from conditions, by a strength above 1."""

    away: Conditions
    strength: float


Guidance = Guide | AttentionGuidance | None


def denoised(
    unet: UNet, x: Tensor, sigma: Tensor, timesteps: Tensor, to: Conditions, kind: str, guide: Guidance = None
) -> Tensor:
    """The clean latents ``[B, C, h, w]`` that the UNet sees in ``x``, at ``sigma`` and ``timesteps`` ``[B]``."""
    own = next(unet.parameters()).dtype if isinstance(unet, UNet) else x.dtype
    scaled = scale_input(x, sigma).to(own, memory_format=torch.channels_last)
    with autocast(x.device.type):
        if not isinstance(guide, Guide):
            prediction = unet(scaled, timesteps, to.context, to.pooled, to.sizes, guide).float()
        else:
            away = guide.away
            both = unet(
                torch.cat([scaled, scaled]), torch.cat([timesteps, timesteps]), torch.cat([to.context, away.context]),
                torch.cat([to.pooled, away.pooled]), torch.cat([to.sizes, away.sizes]),
            ).float()  # fmt: skip
            wanted, unwanted = both.chunk(2)
            prediction = unwanted + guide.strength * (wanted - unwanted)
    return to_denoised(prediction, x, sigma, kind)


@torch.no_grad()
def walked(
    unet: UNet,
    x: Tensor,
    first: Tensor,
    count: int,
    schedule: Schedule,
    to: Conditions,
    kind: str,
    guide: Guidance,
    *,
    stride: int = 1,
) -> Tensor:
    """Latents after ``count`` steps from each row's place ``first`` ``[B]`` in the schedule, ``stride`` places a step.

    A row's last step is the shorter one that ends at the clean latent; there it stays. Guided rows all go as far.
    """
    x, end = x.clone(), len(schedule.timesteps)
    for i in range(count):
        rows = (first + i * stride < end).nonzero()[:, 0]
        if not len(rows):
            break  # all have arrived
        told = to if len(rows) == len(x) else to.picked(rows)
        assert guide is None or told is to
        here = first[rows] + i * stride
        sigma, following = schedule.sigmas[here], schedule.sigmas[(here + stride).clamp_max(end)]
        clean = denoised(unet, x[rows], sigma, schedule.timesteps[here], told, kind, guide)
        x[rows] = euler_step(x[rows], clean, sigma, following)
    return x


@torch.no_grad()
def drawn(
    unet: UNet,
    card: Card,
    size: tuple[int, int],
    to: Conditions,
    guide: Guidance,
    seeds: Sequence[int],
    steps: int,
) -> Tensor:
    """Clean latents ``[B, C, h, w]`` of what the rows are told, each from its own seed's noise as the pipeline's.

    ``size``: width, height in pixels.
    """
    device, (width, height), cell = to.context.device, size, card.vae.downscale
    schedule = trailing_schedule(steps).to(device)
    shape = card.vae.latent_channels, height // cell, width // cell
    x = torch.stack([starting_noise(seed, shape, float(schedule.sigmas[0])) for seed in seeds]).to(device)
    first = torch.zeros(len(x), dtype=torch.long, device=device)
    with autocast(x.device.type):
        to = replace(to, context=unet.read(to.context))
        if isinstance(guide, Guide):
            guide = replace(guide, away=replace(guide.away, context=unet.read(guide.away.context)))
        elif guide:
            guide = replace(guide, context=unet.read(guide.context))
    return walked(unet, x, first, steps, schedule, to, card.prediction, guide)


@torch.no_grad()
def decoded(vae: VAE, latents: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in -1..1."""
    x = (latents / vae.config.scaling_factor).to(half(latents.device.type), memory_format=torch.channels_last)
    with autocast(x.device.type):
        at_once = max(1, DECODED // (x.shape[2] * x.shape[3]))
        return torch.cat([vae.decode(part) for part in x.split(at_once)]).float().clamp(-1, 1)


def seeded(*parts: object) -> random.Random:
    """A generator of its own for these words and numbers; torch's is set by it too."""
    rng = random.Random(" ".join(map(str, parts)))
    torch.manual_seed(rng.getrandbits(63))
    return rng
