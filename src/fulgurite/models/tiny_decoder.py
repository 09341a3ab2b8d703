"""The tiny decoder of latents, many times quicker than the VAE's and a little less exact (TAESD, madebyollin/taesdxl).

Parameter names are those of the decoder in diffusers' ``AutoencoderTiny``, so that published checkpoints load as they
are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_BOUND = 3.0  # latents are bent smoothly into -3..3, so that an outlier does not burn


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Sizes of the tiny decoder, from latents to pixels. The defaults are the published ones for SDXL."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # each twice the resolution of the one before
    num_blocks: tuple[int, ...] = (3, 3, 3, 1)


class Block(nn.Module):
    """Three convolutions and what they started from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Latents, scaled as the UNet has them, to pixels."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for i, (width, blocks) in enumerate(zip(widths, config.num_blocks, strict=True)):
            layers += [Block(width) for _ in range(blocks)]
            if i < last:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, widths[i + 1], 3, padding=1, bias=False)]
        layers.append(nn.Conv2d(widths[last], 3, 3, padding=1))
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def forward(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``, about -1..1."""
        return self.decoder["layers"](torch.tanh(latents / LATENT_BOUND) * LATENT_BOUND) * 2 - 1
