"""The whole way from prompt to pixels, for one batch, to be read top to bottom."""

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fulgurite.cards import Card, card
from fulgurite.models import AttentionGuidance
from fulgurite.sampling import (
    Schedule,
    euler_step,
    scale_input,
    starting_noise,
    to_denoised,
    trailing_schedule,
)
from fulgurite.weights import Networks, load_networks

DEFAULT_GUIDANCE = 7.5
PREVIEW_SIDE = 128  # pixels, of a preview's longer side
Preview = Callable[[], Image.Image | None]  # the picture as it would be now, small and rough
OnStep = Callable[[int, int, Preview], None]  # steps done, steps in all


@dataclass(frozen=True)
class Request:
    """One picture asked for, in the hosted API's terms and bounds."""

    prompt: str
    negative_prompt: str = ""
    height: int = 1024  # pixels, 256..2048
    width: int = 1024
    num_steps: int = 20  # the most steps that may be spent, 1..20
    guidance: float = DEFAULT_GUIDANCE  # 7.5: as the model's card says
    seed: int | None = None  # 0..2**64 - 1; None: a random one


@dataclass(frozen=True)
class Picture:
    """A picture made, and how."""

    image: Image.Image
    request: Request  # with its seed filled in
    model: str
    steps: int  # run, not asked for
    drawn_size: tuple[int, int]  # width, height that the network drew, before cropping or resampling
    seconds: float
    notes: tuple[str, ...]  # what was not done as asked, each a sentence for people


@dataclass(frozen=True)
class Conditions:
    """What the network is told besides the latent; guided, the prompts are two: what is wanted, and what is not."""

    context: Tensor  # [1 or 2, S, D]
    pooled: Tensor  # [1 or 2, P]
    sizes: Tensor  # [1, 6]
    strength: float
    distilled: bool


class Pipeline:
    """A model, ready to draw.

    >>> from fulgurite import Pipeline
    >>> draw = Pipeline.load("fulgurite/spark")
    >>> picture = draw("a red rocket", width=256, height=256, num_steps=2, seed=7)
    >>> picture.image.size, picture.steps
    ((256, 256), 2)
    """

    def __init__(self, card: Card, networks: Networks, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.card, self.networks = card, networks
        self.device, self.dtype = torch.device(device), dtype

    @classmethod
    def load(
        cls, model: str, *, steps: int = 20, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Pipeline":
        """Loads a model by its id, with the checkpoint for the largest schedule within ``steps``.

        Raises UnknownModelError, NotPulledError or WeightsError.
        """
        of_model = card(model)
        return cls(of_model, load_networks(of_model, of_model.steps_for(steps), device, dtype), device, dtype)

    def __call__(self, prompt: str, *, on_step: OnStep | None = None, **parameters: Any) -> Picture:
        """Draws one picture; ``parameters`` are those of Request."""
        return self.draw(Request(prompt, **parameters), on_step)

    @torch.inference_mode()
    def draw(self, request: Request, on_step: OnStep | None = None) -> Picture:
        """Draws what is asked for."""
        started = time.perf_counter()
        seed = secrets.randbits(32) if request.seed is None else request.seed
        request = replace(request, seed=seed)
        steps, strength = self.card.steps_for(request.num_steps), guidance_strength(self.card, request)
        drawn = drawn_size(self.card, request.width, request.height)

        prompts = [request.prompt] + ([request.negative_prompt] if strength != 1 else [])
        context, pooled = encode_prompts(self.networks, prompts, self.device)
        sizes = size_conditioning(drawn if self.card.native_shapes else (request.width, request.height))
        conditions = Conditions(context, pooled, sizes.to(self.device), strength, bool(self.card.schedules))
        schedule = trailing_schedule(steps)
        noise = starting_noise(seed, latent_shape(self.card, drawn), float(schedule.sigmas[0]))
        latents = self._denoise(noise[None], schedule, conditions, on_step)
        image = to_image(self._decode(latents)[0])

        return Picture(
            image=fitted(image, request.width, request.height, self.card),
            request=request,
            model=self.card.id,
            steps=steps,
            drawn_size=drawn,
            seconds=time.perf_counter() - started,
            notes=notes(self.card, self.networks, request, steps, drawn),
        )

    def _denoise(self, x: Tensor, schedule: Schedule, conditions: Conditions, on_step: OnStep | None) -> Tensor:
        """Noise ``[1, C, h, w]`` to a clean latent, in float32 whatever the network's precision."""
        x = x.to(self.device)
        sigmas, timesteps = schedule.sigmas.to(self.device), schedule.timesteps.to(self.device)
        for i, timestep in enumerate(timesteps):
            sigma, next_sigma = sigmas[i : i + 1], sigmas[i + 1 : i + 2]
            prediction = self._predict(scale_input(x, sigma).to(self.dtype), timestep[None], conditions).float()
            denoised = to_denoised(prediction, x, sigma, self.networks.prediction)
            x = euler_step(x, denoised, sigma, next_sigma)
            if on_step:
                on_step(i + 1, len(timesteps), partial(preview, denoised[0], self.card.preview_rgb))
        return x

    def _predict(self, x: Tensor, timestep: Tensor, to: Conditions) -> Tensor:
        """The network's prediction ``[1, C, h, w]``, guided where that is asked for."""
        unet = self.networks.unet
        if to.strength == 1:
            return unet(x, timestep, to.context, to.pooled, to.sizes)
        if to.distilled:
            guidance = AttentionGuidance(to.context[1:], torch.tensor([to.strength], device=self.device))
            return unet(x, timestep, to.context[:1], to.pooled[:1], to.sizes, guidance)
        # Classifier-free guidance (Ho and Salimans, arXiv 2207.12598). What is predicted is linear in the clean
        # latent for every kind of prediction, so guiding the one guides the other.
        both = unet(x.expand(2, -1, -1, -1), timestep.expand(2), to.context, to.pooled, to.sizes.expand(2, -1))
        wanted, unwanted = both.float().chunk(2)
        return unwanted + to.strength * (wanted - unwanted)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.networks.vae
        return vae.decode((latents / vae.config.scaling_factor).to(self.dtype)).float()


def guidance_strength(card: Card, request: Request) -> float:
    """The strength that the API's guidance stands for; 1: none is computed.

    It rises from 1 at 0 through the card's at 7.5: for an undistilled model that of classifier-free guidance, for
    a distilled one that of attention guidance away from a negative prompt. A distilled model has its teacher's
    guidance in its weights, so without a negative prompt 7.5 leaves it alone, and other values are relative to that.
    """
    share = request.guidance / DEFAULT_GUIDANCE
    if card.schedules and not request.negative_prompt:
        return share
    return 1 + share * (card.guidance_strength - 1)


def drawn_size(card: Card, width: int, height: int) -> tuple[int, int]:
    """The width and height that the network draws for a picture of the size asked for."""
    if card.native_shapes:
        return min(card.native_shapes, key=lambda s: abs(math.log(s[0] / s[1]) - math.log(width / height)))
    cell = card.vae.downscale
    return math.ceil(width / cell) * cell, math.ceil(height / cell) * cell


def latent_shape(card: Card, size: tuple[int, int]) -> tuple[int, int, int]:
    cell = card.vae.downscale
    return card.vae.latent_channels, size[1] // cell, size[0] // cell


def size_conditioning(size: tuple[int, int]) -> Tensor:
    """SDXL's six numbers for a picture that is neither cropped nor scaled, ``[1, 6]``."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def encode_prompts(networks: Networks, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts to both encoders' states side by side ``[B, S, D1 + D2]`` and the second's pooled state ``[B, P]``."""
    states = []
    for tokenizer, encoder in zip(networks.tokenizers, networks.text_encoders, strict=True):
        hidden, pooled = encoder(tokenizer(list(prompts)).to(device))
        states.append(hidden)
    return torch.cat(states, dim=-1), pooled


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels ``[3, H, W]`` in -1..1 to a picture."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def preview(latent: Tensor, rgb: tuple[tuple[float, ...], ...]) -> Image.Image | None:
    """A clean latent ``[C, h, w]`` as a small picture, by the card's linear map instead of the VAE."""
    if not rgb:
        return None
    weights = torch.tensor(rgb)
    pixels = torch.einsum("chw,cd->dhw", latent.float().cpu(), weights[:-1]) + weights[-1][:, None, None]
    image = to_image(pixels)
    scale = PREVIEW_SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def fitted(image: Image.Image, width: int, height: int, card: Card) -> Image.Image:
    """The picture at the size asked for: cropped where the network drew that size, else resampled to cover it."""
    if not card.native_shapes:
        return image.crop((0, 0, width, height))
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def notes(card: Card, networks: Networks, request: Request, steps: int, drawn: tuple[int, int]) -> tuple[str, ...]:
    """What was not done as asked: fewer steps, another size, a prompt cut short."""
    found = []
    if steps != request.num_steps:
        found.append(f"ran {steps} steps, the largest schedule of this model within the {request.num_steps} allowed")
    if card.native_shapes and drawn != (request.width, request.height):
        found.append(f"drawn at {drawn[0]}x{drawn[1]} and resampled to {request.width}x{request.height}")
    if request.negative_prompt and request.guidance == 0:
        found.append("negative_prompt had no effect, since guidance was 0")
    for name in ("prompt", "negative_prompt"):
        if any(tokenizer.encode(getattr(request, name))[1] for tokenizer in networks.tokenizers):
            found.append(f"{name} was cut to its first {networks.tokenizers[0].length - 2} tokens")
    return tuple(found)
