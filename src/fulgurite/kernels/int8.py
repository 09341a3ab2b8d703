"""Layers in 8 bits for a CPU: products at twice the speed of bfloat16's, less what rounding activations takes.

Weights have a scale for each output channel. Activations have theirs found as they come (dynamic quantization): in
linear layers one for each token, in convolutions one for each picture. Sums of products of integers are exact and
rows share nothing, so that a row's bits are the same in any batch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.kernels import compiled
from fulgurite.kernels.cpu import PackedBySize
from fulgurite.models.layers import GEGLU, Upsample, VectorLinear

ops = torch.ops.onednn

MOST = 127  # of an 8-bit number, either way
STEPS = 252  # from the lowest to the highest number of a picture: one to spare at each end, as zero is rounded too
ZERO = 128  # of activations: oneDNN is quick with unsigned ones alone
LEAST_LINEAR, LEAST_CONV = 1 << 20, 1 << 17  # weights of a layer, below which bfloat16 is as quick
AT_ONCE = 1 << 20  # of a picture's numbers: in half precision 2 MB, which stay in the cache
SMALLEST = 1e-12  # scale: a row of zeros has one too


class Tokens:
    """Activations ``[..., D]`` as 8-bit numbers, and what 1 stands for in each token, ``[..., 1]``."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        if compiled.fits_pairs(x):
            self.values, self.scale = compiled.quantize(x)
        else:
            # One less than the most, since a half precision may round the scale down and the largest quotients up.
            self.scale = (x.abs().amax(-1, keepdim=True) / (MOST - 1)).clamp_min(SMALLEST)
            self.values = unsigned((x / self.scale).round_().to(torch.int8))


class Picture:
    """A channels-last picture ``[1, C, h, w]`` as 8-bit numbers, what 1 stands for, and which of them is zero.

    The lowest and the highest are at the ends, wherever they lie: after SiLU almost all are above zero. Around them is
    a margin of a pixel: oneDNN's own, with a zero other than 0, can halve its speed.
    """

    def __init__(self, x: Tensor) -> None:
        pixels = x.permute(0, 2, 3, 1)
        in_c = compiled.fits_pairs(pixels)
        low, high = compiled.bounds(pixels) if in_c else (float(end) for end in torch.aminmax(pixels.view(-1)))
        low, high = min(low, 0.0), max(high, 0.0)
        steps, self.zero = math.nan, ZERO  # what is no number spoils its picture, as in any other precision
        if math.isfinite(high - low):
            steps = float(x.new_tensor(STEPS / max(high - low, SMALLEST)))  # to 1, rounded as x is
            self.zero = 1 + round(-low * steps)
        self.scale = 1 / steps
        if in_c:
            self.values = compiled.quantize_picture(pixels, steps, self.zero).permute(0, 3, 1, 2)
        else:
            self.values = within_margin(x, steps, self.zero)


def within_margin(x: Tensor, steps: float, zero: int) -> Tensor:
    """A picture ``[1, C, h, w]`` as 8-bit numbers, so many steps to 1, with zeros around ``[1, C, h + 2, w + 2]``."""
    (_, channels, height, width), shift = x.shape, x.new_tensor(zero - ZERO)
    size = 1, channels, height + 2, width + 2
    signed = torch.empty(size, dtype=torch.int8, memory_format=torch.channels_last).fill_(zero - ZERO)
    rows = max(1, AT_ONCE // (channels * width))
    for some, place in zip(x.split(rows, 2), signed[:, :, 1:-1, 1:-1].split(rows, 2), strict=True):
        place.copy_(torch.add(shift, some, alpha=steps).round_())
    return unsigned(signed)


def unsigned(x: Tensor) -> Tensor:
    """Numbers from -128 to 127 plus 128; in place. torch rounds to signed ones seven times quicker than to these."""
    return x.view(torch.uint8).bitwise_xor_(ZERO)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[O, ...]`` as 8-bit numbers, and what 1 stands for in each output channel, ``[O]``."""
    channels = weight.float().flatten(1)
    scale = channels.abs().amax(1).clamp_min(SMALLEST) / MOST
    return (channels / scale[:, None]).round().to(torch.int8).view(weight.shape), scale


class Int8Linear(nn.Module):
    """A linear layer; weights ``[O, D]`` and the bias ``[O]`` are rounded once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, self.scale = rounded(weight)
        self.weight, self.bias = ops.qlinear_prepack(values, None), bias
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.bias_in_pairs = compiled.in_pairs(self.zeros if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = Tokens(x)
        return self.scaled(self.product(tokens), tokens)

    def product(self, x: Tokens) -> Tensor:
        """Sums of products ``[..., O]`` without the tokens' scale and the bias, in the precision of what ``x`` was."""
        return ops.qlinear_pointwise(
            x.values, 1.0, ZERO, self.weight, self.scale, self.zeros, None, 1.0, 0, x.dtype, "none", [], ""
        )

    def scaled(self, y: Tensor, x: Tokens) -> Tensor:
        """The layer's output, of such sums; in place."""
        if compiled.fits_pairs(y):
            return compiled.dequantize(y, x.scale, self.bias_in_pairs)
        scale = x.scale.to(y.dtype)
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale, out=y)


class Int8GEGLU(nn.Module):
    """Two layers of the same quantized activations."""

    def __init__(self, plain: GEGLU) -> None:
        super().__init__()
        (value, gate), (value_bias, gate_bias) = plain.proj.weight.chunk(2), plain.proj.bias.chunk(2)
        self.value, self.gate = Int8Linear(value, value_bias), Int8Linear(gate, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = Tokens(x)
        value, gate = self.value.product(tokens), self.gate.product(tokens)
        if compiled.fits_pairs(value):
            biases = self.value.bias_in_pairs, self.gate.bias_in_pairs
            return compiled.dequantize(value, tokens.scale, biases[0], gate, biases[1])
        return self.value.scaled(value, tokens).mul_(F.gelu(self.gate.scaled(gate, tokens)))


class Int8Conv2d(PackedBySize):
    """A convolution within a margin of one pixel; weights ``[O, I, kh, kw]`` and the bias ``[O]`` are rounded once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: Sequence[int] = (1, 1)) -> None:
        self.where = stride, [0, 0], [1, 1], 1  # padding, dilation, groups
        values, self.scale = rounded(weight)
        self.zeros = torch.zeros(len(values), dtype=torch.int32)
        super().__init__(values, None if bias is None else bias.float())

    def pack(self, weight: Tensor, size: torch.Size | None = None) -> Tensor:
        pictures = [1, weight.shape[1], *size] if size else None
        return ops.qconv_prepack(weight, self.scale, 1.0, ZERO, *self.where, pictures)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.contiguous(memory_format=torch.channels_last).split(1)
        pictures = [self.of(Picture(row), x.dtype) for row in rows]
        return torch.cat(pictures) if len(pictures) > 1 else pictures[0]

    def of(self, x: Picture, dtype: torch.dtype) -> Tensor:
        product = x.values, x.scale, x.zero, self.weight_for(x.values), self.scale, self.zeros
        return ops.qconv2d_pointwise(*product, self.bias, *self.where, 1.0, 0, dtype, "none", [], "")


class Int8Upsample(nn.Module):
    """Nearest neighbours and a 3x3 convolution as a 2x2 one of four times the channels, for 4/9 of the arithmetic.

    Weights are added beforehand as in cpu.PackedUpsample, whose transposed convolution torch does not have in int8.
    Even and odd rows and columns are a quarter of the channels each.
    """

    def __init__(self, plain: Upsample) -> None:
        super().__init__()
        add = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # even and odd, of 2, from 3
        weight, bias = plain.conv.weight, plain.conv.bias
        assert bias is not None
        quarters = torch.einsum("yak,xbl,oikl->yxoiab", add, add, weight.float()).flatten(0, 2)
        self.conv, self.channels = Int8Conv2d(quarters, bias.repeat(4)), len(weight)
        self.plain = Int8Conv2d(weight, bias)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        (batch, _, height, width), channels = x.shape, self.channels
        if size and size != (2 * height, 2 * width):
            return self.plain(F.interpolate(x, size=size, mode="nearest"))
        large = torch.empty(batch, channels, 2 * height, 2 * width, dtype=x.dtype, memory_format=torch.channels_last)
        for i, quarter in enumerate(self.conv(x).split(channels, dim=1)):
            row, column = divmod(i, 2)
            large[:, :, row::2, column::2] = quarter[:, :, row : row + height, column : column + width]
        return large


def accelerate(network: nn.Module) -> None:
    """Puts these layers in place of the network's own, in place; small ones stay, being as quick in bfloat16."""
    for name, layer in network.named_children():
        match layer:
            case VectorLinear():
                pass  # next to no time
            case GEGLU():
                if layer.proj.weight.numel() >= LEAST_LINEAR:
                    setattr(network, name, Int8GEGLU(layer))
            case nn.Linear():
                if layer.weight.numel() >= LEAST_LINEAR:
                    setattr(network, name, Int8Linear(layer.weight, layer.bias))
            case nn.Conv2d(kernel_size=(3, 3), padding=(1, 1)):
                if layer.weight.numel() >= LEAST_CONV:
                    setattr(network, name, Int8Conv2d(layer.weight, layer.bias, layer.stride))
            case Upsample():
                if layer.conv.weight.numel() >= LEAST_CONV:
                    setattr(network, name, Int8Upsample(layer))
            case _:
                accelerate(layer)
