"""Batches drawn as the pipeline draws one picture: the sampler's own schedules and steps, a row each its own step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulgurite.models import Tokenizer, UNet
from fulgurite.sampling import Schedule, euler_step, scale_input, to_denoised


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told of each row besides its latent."""

    context: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]
    sizes: Tensor  # [B, 6]


class Sayer:
    """Captions to what the UNet is told of them."""

    def __init__(self, tokenizer: Tokenizer, encoders: nn.ModuleDict, device: str) -> None:
        self.tokenizer, self.encoders, self.device = tokenizer, encoders.requires_grad_(False).eval(), device

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], size: tuple[int, int]) -> Conditions:
        """``size``: width, height in pixels."""
        ids = self.tokenizer(list(captions)).to(self.device)
        (first, _), (second, pooled) = (encoder(ids) for encoder in self.encoders.values())
        width, height = size
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)
        return Conditions(torch.cat([first, second], dim=-1), pooled, sizes.expand(len(captions), -1))


@dataclass(frozen=True)
class Guide:
    """Classifier-free guidance (arXiv 2207.12598): away from conditions, by a strength above 1."""

    away: Conditions
    strength: float


def denoised(
    unet: UNet, x: Tensor, sigma: Tensor, timesteps: Tensor, to: Conditions, kind: str, guide: Guide | None = None
) -> Tensor:
    """The clean latents ``[B, C, h, w]`` that the UNet sees in ``x``, at ``sigma`` and ``timesteps`` ``[B]``."""
    scaled = scale_input(x, sigma).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16):
        if guide is None:
            prediction = unet(scaled, timesteps, to.context, to.pooled, to.sizes).float()
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
    unet: UNet, x: Tensor, first: Tensor, count: int, schedule: Schedule, to: Conditions, kind: str, guide: Guide | None
) -> Tensor:
    """Latents after ``count`` steps of the schedule, from each row's step ``first`` ``[B]``."""
    for i in range(count):
        sigma, following = schedule.sigmas[first + i], schedule.sigmas[first + i + 1]
        x = euler_step(x, denoised(unet, x, sigma, schedule.timesteps[first + i], to, kind, guide), sigma, following)
    return x


def on(schedule: Schedule, device: str) -> Schedule:
    return Schedule(schedule.timesteps.to(device), schedule.sigmas.to(device))


def seeded(*parts: object) -> random.Random:
    """A generator of its own for these words and numbers; torch's is set by it too."""
    rng = random.Random(" ".join(map(str, parts)))
    torch.manual_seed(rng.getrandbits(63))
    return rng
