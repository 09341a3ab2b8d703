"""The discriminator of adversarial distillation: tells the student's latents from the teacher's, or from data.

As in SDXL-Lightning (Lin et al., arXiv 2402.13929) it is the teacher's own UNet, the encoder half and the middle: it
takes latents of any noise, and the prompt, and knows pictures from the start. A small head on the features of each
resolution gives every place a logit (as in latent adversarial diffusion distillation, arXiv 2403.12015); the paper has
one, on the middle's, and the small model's middle says next to nothing of whose a latent is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.models import UNet

GROUPS = 8


@dataclass(frozen=True)
class Noisy:
    """Latents as the UNet sees them, of unit variance ``[B, C, h, w]``, and the timesteps of their noise ``[B]``."""

    x: Tensor
    timesteps: Tensor


class Head(nn.Module):
    """Features ``[B, C, h, w]`` to a logit for each place ``[B, 1, h, w]``, by what lies around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 64
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class AsItIs(nn.Module):
    """In the place of a block that is left out."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class Discriminator(nn.Module):
    """Looks at where a step ended, knowing where it began (``conditional``) or not.

    Knowing it, it holds the student to the teacher's path. The relaxed form lets the student leave the path, which it
    cannot always follow in few steps, for any place that the teacher might have reached (arXiv 2402.13929, section 3).
    """

    def __init__(self, unet: UNet, conditional: bool, resolutions: int | None = None) -> None:
        """Takes ``unet`` as its own, and drops what it has no use for.

        ``resolutions``: how many it looks at, from the finest; all, and so the middle too, where that is not said.
        """
        super().__init__()
        del unet.up_blocks, unet.conv_norm_out, unet.conv_out
        widths = unet.config.block_out_channels[:resolutions]
        if len(widths) < len(unet.down_blocks):
            unet.down_blocks, unet.mid_block = unet.down_blocks[: len(widths)], AsItIs()  # type: ignore[assignment]
        self.unet, self.conditional = unet, conditional
        seen = 2 if conditional else 1
        self.heads = nn.ModuleList(Head(channels * seen) for channels in widths)

    def forward(self, end: Noisy, begin: Noisy, context: Tensor, pooled: Tensor, sizes: Tensor) -> list[Tensor]:
        """Of each resolution, the finest first, a logit for each place ``[B, 1, h, w]``: above 0, not the student's."""
        seen = (end, begin) if self.conditional else (end,)
        features = zip(*(self.features(z, context, pooled, sizes) for z in seen), strict=True)
        # In float32: in bfloat16 on a CPU the gradients of the second convolution's weights were at times not numbers.
        with torch.autocast(end.x.device.type, enabled=False):
            return [head(torch.cat(of, dim=1).float()) for head, of in zip(self.heads, features, strict=True)]

    def features(self, z: Noisy, context: Tensor, pooled: Tensor, sizes: Tensor) -> list[Tensor]:
        """Of each resolution what the UNet finds last on its way down; of the coarsest, the middle's."""
        middle, skips, _ = self.unet.encode(z.x, z.timesteps, context, pooled, sizes)
        return list({found.shape[2:]: found for found in (*skips, middle)}.values())[: len(self.heads)]


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """What the discriminator lessens, for its logits of what is real and of the student's latents."""
    return mean_of([F.softplus(-r).mean() + F.softplus(f).mean() for r, f in zip(real, fake, strict=True)])


def student_loss(fake: Sequence[Tensor]) -> Tensor:
    """What the student lessens: the non-saturating form (Goodfellow et al., arXiv 1406.2661, section 3)."""
    return mean_of([F.softplus(-f).mean() for f in fake])


def unsteadiness(here: Sequence[Tensor], near: Sequence[Tensor]) -> Tensor:
    """How much its logits of what is real change with a little noise, squared.

    Lessened too, it keeps the discriminator from telling the two apart by what a student cannot follow: the gradient
    penalty R1 without a second derivative (adversarial post-training, Lin et al., arXiv 2501.08316).
    """
    return mean_of([(a - b).square().mean() for a, b in zip(here, near, strict=True)])


def mean_of(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()
