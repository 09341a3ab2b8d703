"""3x3 convolutions in float32 by minimal filtering: a quarter of the products, for four times the weights."""

import torch
from torch import Tensor, nn

from fulgurite.kernels import compiled
from fulgurite.kernels.tiled import TiledConv2d, bias_of
from fulgurite.models.layers import Upsample

MOST_WEIGHTS = 1 << 22  # of a layer: larger ones would take a model's memory several times over
FEW_PIXELS = 64  # of a picture, below which transforming takes longer than it saves


class WinogradConv2d(nn.Module):
    """A convolution, of small pictures by plain products where there are some for it."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = compiled.filters(plain.weight.detach()), bias_of(plain.bias, plain.weight)
        self.tiled = TiledConv2d(plain) if TiledConv2d.fits(plain) else None

    @staticmethod
    def fits(plain: nn.Conv2d) -> bool:
        usual = (plain.stride, plain.padding, plain.dilation, plain.groups) == ((1, 1), (1, 1), (1, 1), 1)
        return usual and plain.weight.numel() <= MOST_WEIGHTS and compiled.fits_filters(plain.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.tiled and x.shape[2] * x.shape[3] < FEW_PIXELS:
            return self.tiled(x)
        return compiled.convolve_large(x, self.weight, self.bias)


class WinogradUpsample(nn.Module):
    """Nearest neighbours and a convolution, which reads the smaller picture."""

    def __init__(self, plain: Upsample) -> None:
        super().__init__()
        conv = plain.conv
        self.weight, self.bias = compiled.filters(conv.weight.detach()), bias_of(conv.bias, conv.weight)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        size = size or torch.Size((2 * x.shape[2], 2 * x.shape[3]))
        return compiled.convolve_large(x, self.weight, self.bias, size)
