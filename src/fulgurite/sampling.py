"""Schedules and the Euler step: stateless functions, one sigma per row of the batch.

The noise of a latent is measured by sigma (Karras et al., arXiv 2206.00364): ``x = clean + sigma * noise``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """The steps of one run: timesteps ``[N]`` for the network, sigmas ``[N + 1]``, of which the last is 0."""

    timesteps: Tensor
    sigmas: Tensor

    def to(self, device: str | torch.device) -> "Schedule":
        return Schedule(self.timesteps.to(device), self.sigmas.to(device))


def train_sigmas() -> Tensor:
    """Sigma at each of the 1000 training timesteps, ``[1000]``: Stable Diffusion's "scaled linear" betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float32) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


def trailing_schedule(steps: int) -> Schedule:
    """Evenly spaced timesteps that start at the last one, 999 (Lin et al., arXiv 2305.08891, section 3.3)."""
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps must be between 1 and {TRAIN_STEPS}, not {steps}")
    timesteps = torch.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps, dtype=torch.float64)[:steps].round().long() - 1
    sigmas = train_sigmas()[timesteps]
    return Schedule(timesteps, torch.cat([sigmas, sigmas.new_zeros(1)]))


def starting_noise(seed: int, shape: tuple[int, ...], sigma: float) -> Tensor:
    """One row's starting latent ``shape``, drawn on the CPU in float32, so that it depends on the seed alone."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) * sigma


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` shaped so that it broadcasts over the rows of ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def scale_input(x: Tensor, sigma: Tensor) -> Tensor:
    """The latents as the network was trained to see them, of about unit variance."""
    return x / (per_row(sigma, x) ** 2 + 1) ** 0.5


def to_denoised(prediction: Tensor, x: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """What the network's prediction says the clean latent is: ``kind`` is "epsilon", "v" or "x0".

    ``x`` is not scaled; ``sigma`` is ``[B]``. Raises ValueError for another kind.
    """
    s = per_row(sigma, x)
    if kind == "epsilon":
        return x - s * prediction
    if kind == "v":
        return x / (s**2 + 1) - prediction * s / (s**2 + 1) ** 0.5
    if kind == "x0":
        return prediction
    raise ValueError(f'kind must be "epsilon", "v" or "x0", not {kind!r}')


def euler_step(x: Tensor, denoised: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """From ``sigma`` to ``next_sigma``, both ``[B]``, along the line through the denoised latent."""
    slope = (x - denoised) / per_row(sigma, x)
    return x + slope * per_row(next_sigma - sigma, x)
