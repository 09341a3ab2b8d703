"""Layers of small networks on a CPU: a call of oneDNN takes longer than their product (``products.c``)."""

import torch
from torch import Tensor, nn

from fulgurite.kernels import compiled

FEW_WEIGHTS = 1 << 18  # of a linear layer, below which it is quicker whatever the number of tokens
FEW_CONV_WEIGHTS, FEW_PIXELS = 3 << 18, 256  # of a convolution, of its pictures


def bias_of(bias: Tensor | None, weight: Tensor) -> Tensor:
    """A layer's bias in float32, zeros where it has none."""
    return torch.zeros(len(weight)) if bias is None else bias.detach().float()


class TiledLinear(nn.Module):
    """A linear layer, with what comes after it: "none" or "gelu"."""

    def __init__(self, weight: Tensor, bias: Tensor | None, after: str = "none") -> None:
        super().__init__()
        self.weight, self.gelu = compiled.tiled(weight), after == "gelu"
        self.bias = bias_of(bias, weight)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        return weight.numel() < FEW_WEIGHTS and compiled.fits_tiles(weight)

    def forward(self, x: Tensor) -> Tensor:
        return compiled.linear(x, self.weight, self.bias, self.gelu)

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The layer's output times a factor of its shape."""
        return compiled.linear(x, self.weight, self.bias, self.gelu, factor)


class TiledConv2d(nn.Module):
    """A 3x3 convolution of small pictures."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = compiled.tiled(plain.weight), bias_of(plain.bias, plain.weight)
        self.stride = plain.stride[0]

    @staticmethod
    def fits(plain: nn.Conv2d) -> bool:
        usual = (plain.kernel_size, plain.padding) == ((3, 3), (1, 1)) and plain.stride in ((1, 1), (2, 2))
        few = plain.weight.numel() < FEW_CONV_WEIGHTS
        return usual and plain.dilation == (1, 1) and plain.groups == 1 and few and compiled.fits_tiles(plain.weight)

    @staticmethod
    def takes(size: torch.Size) -> bool:
        """Whether pictures of this height and width are small enough to be quicker so."""
        return size.numel() <= FEW_PIXELS

    def forward(self, x: Tensor) -> Tensor:
        return compiled.convolve(x, self.weight, self.bias, self.stride)
