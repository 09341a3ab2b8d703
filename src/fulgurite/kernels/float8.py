"""Linear layers in 8-bit floating point (e4m3, arXiv 2209.05433), for a GPU that multiplies such numbers twice as fast.

Weights have a scale for each output, activations one for each token, found as it comes: rows share no scale, so that
what a picture's numbers are rounded to does not depend on its batch. Products are by torch's ``_scaled_mm``, which a
CPU has too: there the tests compare them. Rounding moves more bytes in plain torch than the products save; on the
Triton kernels (fulgurite.kernels.cuda) it is one pass. At SDXL's sizes an H200 is no quicker so than in bfloat16.
"""

import torch
from torch import Tensor, nn

from fulgurite.models.layers import VectorLinear

KIND = torch.float8_e4m3fn
MOST = torch.finfo(KIND).max
UNIT = 1 / MOST  # a factor: told to divide by a number, torch does that on a CPU and multiplies on a GPU
LEAST = 1 << 20  # weights of a layer, below which rounding its activations takes what its product would gain
WHOLE = 16  # of inputs and outputs: torch has products of whole sixteens alone
SMALLEST = 1e-12  # scale: a row of zeros has one too


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[N, D]`` in 8 bits, and what 1 stands for in each, ``[N, 1]``, in float32."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp_min(SMALLEST) * UNIT
    # In rows, whatever order they came in: a GPU multiplies no others.
    return (rows.float() / scale).to(KIND, memory_format=torch.contiguous_format), scale


class Float8Linear(nn.Module):
    """A linear layer; its weight ``[O, D]`` is rounded once. Activations and the bias are in bfloat16."""

    rounded = staticmethod(rounded)  # of activations; fulgurite.kernels.cuda has it in one pass over them

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, scale = rounded(weight)
        self.weight, self.scale, self.bias = values.t(), scale.t(), bias

    def forward(self, x: Tensor) -> Tensor:
        values, scale = self.rounded(x.flatten(0, -2))
        product = torch._scaled_mm(
            values, self.weight, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype
        )
        return product.unflatten(0, x.shape[:-1])


def fits(weight: Tensor) -> bool:
    """Whether a linear layer's weight is large enough, and of whole sixteens."""
    return weight.numel() >= LEAST and not any(size % WHOLE for size in weight.shape)


def accelerate(network: nn.Module) -> None:
    """Puts these layers in place of the network's own, in place; others stay."""
    for name, layer in network.named_children():
        match layer:
            case VectorLinear():
                pass  # next to no time
            case nn.Linear():
                if fits(layer.weight):
                    setattr(network, name, Float8Linear(layer.weight, layer.bias))
            case _:
                accelerate(layer)
