"""Layers for an NVIDIA GPU: hand-written Triton kernels, each for the plain torch of fulgurite.models that it equals.

They have run in Triton's interpreter, against that torch, and have been compiled for such GPUs, and have run on none
yet: whoever wants them says so (the setting ``triton_kernels``), and bench/gpu.py measures them. Triton comes with
torch's builds for CUDA.

All of them save passes over memory. GEGLU's gate (Shazeer, arXiv 2002.05202) takes one; plain torch writes the gate's
GELU to memory and reads it again. A convolution's bias is a pass of its own in torch, over what cuDNN wrote: here the
group norm behind it adds it, with the timestep's embedding, or else the sum at a block's end. Rounding to 8 bits takes
one pass over numbers that torch reads and writes five times. Group norms are in fulgurite.kernels.cuda_norm.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from fulgurite.kernels.cuda_norm import TILE, blocks, group_norm, in_order, load, strides, tile
from fulgurite.kernels.float8 import KIND, SMALLEST, UNIT, Float8Linear
from fulgurite.models import unet, vae
from fulgurite.models.layers import GEGLU, GroupNormSiLU

BLOCK = 1024  # elements that a program of GEGLU makes
A_WARP = 512  # elements of a row to round: 16 bytes for each of its threads to write


@triton.jit
def _geglu_kernel(both, out, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``BLOCK`` elements of one row: ``both`` holds a row's values and then its gates."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = load(both + row * 2 * inner + i, i < inner)
    gate = load(both + row * 2 * inner + inner + i, i < inner)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * inner + i, (value * gelu).to(out.dtype.element_ty), mask=i < inner)


def geglu(both: Tensor) -> Tensor:
    """Values and gates ``[..., 2 * D]`` to ``[..., D]``, with the exact GELU. Computed in float32 and rounded once."""
    both = both.contiguous()
    *rows, width = both.shape
    out = torch.empty(*rows, width // 2, device=both.device, dtype=both.dtype)
    if out.numel():
        grid = out.numel() // out.shape[-1], triton.cdiv(out.shape[-1], BLOCK)
        with torch.cuda.device_of(both):
            _geglu_kernel[grid](both, out, out.shape[-1], BLOCK=BLOCK)
    return out


@triton.jit
def _total_kernel(  # type: ignore[no-untyped-def]
    one,
    other,
    bias,
    more,
    out,
    channels,
    pixels,
    stride_b,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the sum of two tensors and of up to two biases."""
    row = tl.program_id(2).to(tl.int64) * stride_b
    c, offsets, mask = tile(channels, pixels, stride_c, stride_p, tl.program_id(0) * BLOCK_P, BLOCK_C, BLOCK_P)
    value = load(one + row + offsets, mask) + load(other + row + offsets, mask)
    if bias is not None:
        value += load(bias + c, c < channels)[:, None]
    if more is not None:
        value += load(more + c, c < channels)[:, None]
    tl.store(out + row + offsets, value.to(out.dtype.element_ty), mask=mask)


def total(one: Tensor, other: Tensor, bias: Tensor | None, more: Tensor | None = None) -> Tensor:
    """The sum of two tensors ``[B, C, h, w]`` and of up to two biases ``[C]``, in order as ``one`` is.

    Computed in float32 and rounded once.
    """
    one = in_order(one)
    order = torch.contiguous_format if one.is_contiguous() else torch.channels_last
    other, out = other.contiguous(memory_format=order), torch.empty_like(one)
    batch, channels, height, width = one.shape
    block_c, block_p = blocks(one, TILE)
    with torch.cuda.device_of(one):
        _total_kernel[triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch](
            one, other, bias, more, out, channels, height * width, *strides(one), BLOCK_C=block_c, BLOCK_P=block_p
        )
    return out


@triton.jit
def _rounded_kernel(  # type: ignore[no-untyped-def]
    rows, out, scales, width, SMALLEST: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row, which its program holds as a whole."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = load(rows + row * width + i, i < width)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), SMALLEST) * UNIT
    # Divided as torch divides, not by what is nearly 1 / scale: all numbers are to come out the same.
    value = tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + scale)
    tl.store(out + row * width + i, value.to(out.dtype.element_ty), mask=i < width)
    tl.store(scales + row, scale)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``fulgurite.kernels.float8.rounded``: rows ``[N, D]`` in 8 bits, and what 1 stands for in each, ``[N, 1]``.

    To the bit, but for the scale of a row that holds what is no number: here the others' own.
    """
    rows = rows.contiguous()
    count, width = rows.shape
    out, scales = torch.empty_like(rows, dtype=KIND), torch.empty(count, 1, device=rows.device, dtype=torch.float32)
    if rows.numel():
        block = triton.next_power_of_2(width)
        with torch.cuda.device_of(rows):
            _rounded_kernel[count,](
                rows,
                out,
                scales,
                width,
                SMALLEST=SMALLEST,
                UNIT=UNIT,
                BLOCK=block,
                num_warps=min(max(block // A_WARP, 1), 8),
            )
    return out, scales


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def end(block: unet.ResnetBlock | vae.ResnetBlock, x: Tensor, h: Tensor) -> Tensor:
    """What a block comes to, given its input and that of its last convolution."""
    h = without_bias(block.conv2, h)
    if block.changes_channels:
        return total(h, without_bias(block.conv_shortcut, x), block.conv2.bias, block.conv_shortcut.bias)
    return total(h, x, block.conv2.bias)


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self, silu=False)


class FusedGroupNormSiLU(GroupNormSiLU):
    def forward(self, x: Tensor, bias: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Of x and what is added to its channels: ``[C]``, ``[B, C]``."""
        return group_norm(x, self, silu=True, bias=bias, vectors=vectors)


class FusedUNetBlock(unet.ResnetBlock):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = without_bias(self.conv1, self.norm1(x))
        return end(self, x, self.norm2(h, self.conv1.bias, self.time_emb_proj(embedding)))


class FusedVAEBlock(vae.ResnetBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = without_bias(self.conv1, self.norm1(x))
        return end(self, x, self.norm2(h, self.conv1.bias))


class FusedGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FusedFloat8Linear(Float8Linear):
    rounded = staticmethod(rounded)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: FusedGroupNorm,
    GroupNormSiLU: FusedGroupNormSiLU,
    unet.ResnetBlock: FusedUNetBlock,
    vae.ResnetBlock: FusedVAEBlock,
    GEGLU: FusedGEGLU,
    Float8Linear: FusedFloat8Linear,
}


def accelerate(network: nn.Module) -> None:
    """Lets a network's layers run on the kernels from now on; its weights stay what and where they are."""
    for layer in network.modules():
        if type(layer) in FUSED:
            layer.__class__ = FUSED[type(layer)]
