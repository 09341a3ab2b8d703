"""The judge of adversarial distillation: whether a latent was reached by the teacher, or by the student.

As in SDXL-Lightning (Lin et al., arXiv 2402.13929) it is the teacher's own UNet, the way down and the middle, with a
small head on the middle's features: it judges latents, at any noise, by the prompt, and knows pictures from the start.
"""

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
    """Features ``[B, C, h, w]`` to a logit for each row ``[B]``: halved twice, then averaged over places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 64
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.GroupNorm(GROUPS, width), nn.SiLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=2), nn.GroupNorm(GROUPS, width), nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).mean(dim=(1, 2, 3))


class Discriminator(nn.Module):
    """Judges where a step ended, knowing where it began (``conditional``) or not.

    Knowing it, it holds the student to the teacher's path. The relaxed form lets the student leave the path, which it
    cannot always follow in few steps, for any place that the teacher might have reached (arXiv 2402.13929, section 3).
    """

    def __init__(self, unet: UNet, conditional: bool) -> None:
        """Takes ``unet`` as its own, and drops its way up."""
        super().__init__()
        del unet.up_blocks, unet.conv_norm_out, unet.conv_out
        self.unet, self.conditional = unet, conditional
        self.head = Head(unet.config.block_out_channels[-1] * (2 if conditional else 1))

    def forward(self, end: Noisy, begin: Noisy, context: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
        """A logit for each row ``[B]``: above 0, the teacher's."""
        seen = (end, begin) if self.conditional else (end,)
        features = [self.unet.encode(z.x, z.timesteps, context, pooled, sizes)[0] for z in seen]
        # In float32: in bfloat16 on a CPU the gradients of the second convolution's weights were at times not numbers.
        with torch.autocast(end.x.device.type, enabled=False):
            return self.head(torch.cat(features, dim=1).float())


def judge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator lessens, for its logits of the teacher's and the student's latents."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def student_loss(fake: Tensor) -> Tensor:
    """What the student lessens: the non-saturating form (Goodfellow et al., arXiv 1406.2661, section 3)."""
    return F.softplus(-fake).mean()
