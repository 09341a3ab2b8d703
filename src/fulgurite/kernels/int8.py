"""Linear layers in 8 bits for a CPU: products at twice the speed of bfloat16's, less what rounding activations takes.

Weights have a scale for each output channel, activations one for each token, found as they come (dynamic symmetric
quantization). Sums of products of integers are exact and tokens share nothing, so that a row's bits are the same in any
batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.models.layers import GEGLU
from fulgurite.models.unet import SpatialTransformer, UNet

ops = torch.ops.onednn

MOST = 127  # of an 8-bit number, either way
ZERO = 128  # of activations: oneDNN is quick with unsigned ones alone
LEAST = 1 << 20  # weights of a layer, below which bfloat16 is as quick
SMALLEST = 1e-12  # scale: a row of zeros has one too


class Quantized:
    """Activations ``[..., D]`` as 8-bit numbers, and what 1 stands for in each token, ``[..., 1]``."""

    def __init__(self, x: Tensor) -> None:
        # One less than the most, since bfloat16 may round the scale down and the largest quotients up.
        self.scale = (x.abs().amax(-1, keepdim=True) / (MOST - 1)).clamp_min(SMALLEST)
        # Signed numbers first, since torch gets them out of floating point seven times quicker than unsigned ones.
        signed = (x / self.scale).round_().to(torch.int8)
        self.values = signed.view(torch.uint8).bitwise_xor_(ZERO)


class Int8Linear(nn.Module):
    """A linear layer; weights ``[O, D]`` and the bias ``[O]`` are rounded once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight, self.bias = weight.float(), bias
        self.scale = weight.abs().amax(1).clamp_min(SMALLEST) / MOST
        self.weight = ops.qlinear_prepack((weight / self.scale[:, None]).round().to(torch.int8), None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(Quantized(x))

    def of(self, x: Quantized) -> Tensor:
        """The layer's output ``[..., O]``, in the precision that ``x`` was quantized from."""
        y = ops.qlinear_pointwise(
            x.values, 1.0, ZERO, self.weight, self.scale, self.zeros, None, 1.0, 0, x.scale.dtype, "none", [], ""
        )
        y *= x.scale
        return y if self.bias is None else y.add_(self.bias)


class Int8GEGLU(nn.Module):
    """Two layers of the same quantized activations."""

    def __init__(self, plain: GEGLU) -> None:
        super().__init__()
        (value, gate), (value_bias, gate_bias) = plain.proj.weight.chunk(2), plain.proj.bias.chunk(2)
        self.value, self.gate = Int8Linear(value, value_bias), Int8Linear(gate, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        quantized = Quantized(x)
        return self.value.of(quantized).mul_(F.gelu(self.gate.of(quantized)))


def accelerate(unet: UNet) -> None:
    """Puts these layers in place of the transformers' own, in place; small ones stay, being as quick in bfloat16.

    So do those that take the prompt's states, whose few tokens are about a hundredth of a step.
    """

    def replace(network: nn.Module) -> None:
        for name, layer in network.named_children():
            match layer:
                case GEGLU():
                    if layer.proj.weight.numel() >= LEAST:
                        setattr(network, name, Int8GEGLU(layer))
                case nn.Linear():
                    if layer.weight.numel() >= LEAST and layer.in_features != unet.config.cross_attention_dim:
                        setattr(network, name, Int8Linear(layer.weight, layer.bias))
                case _:
                    replace(layer)

    for transformer in [part for part in unet.modules() if isinstance(part, SpatialTransformer)]:
        replace(transformer)
