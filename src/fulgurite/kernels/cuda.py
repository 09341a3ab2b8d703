"""Layers for an NVIDIA GPU: hand-written Triton kernels, each for the plain torch of fulgurite.models that it equals.

They have run in Triton's interpreter, against that torch, and on no GPU yet: whoever wants them says so (the setting
``triton_kernels``), and bench/gpu.py measures them. Triton comes with torch's builds for CUDA.

Group normalization (Wu and He, arXiv 1803.08494) and SiLU take two passes over the input here, in either memory format.
Plain torch reads it twice and writes for the norm, reads and writes again for SiLU, and on CUDA turns channels-last
inputs around first, which the convolution behind has to undo. GEGLU's gate (Shazeer, arXiv 2002.05202) takes one pass;
plain torch writes the gate's GELU to memory and reads it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fulgurite.models.layers import GEGLU, GroupNormSiLU

PIXELS = 4096  # of a channel, for which one program sums; fixed, so that a row's bits do not depend on its batch
TILE = 4096  # elements that a program of the norm holds at once
BLOCK = 1024  # elements that a program of GEGLU makes


@triton.jit
def _tile(shape_c, shape_p, stride_c, stride_p, pixel, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels of this program, and the offsets and the mask of its tile ``[BLOCK_C, BLOCK_P]`` from ``pixel``."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pixel + tl.arange(0, BLOCK_P).to(tl.int64)
    offsets = c.to(tl.int64)[:, None] * stride_c + p[None, :] * stride_p
    return c, offsets, (c < shape_c)[:, None] & (p < shape_p)[None, :]


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    x,
    sums,
    channels,
    pixels,
    stride_b,
    stride_c,
    stride_p,
    CHANNELS_A_GROUP: tl.constexpr,
    PIXELS_A_PROGRAM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel and ``PIXELS_A_PROGRAM`` pixels: the sum and the sum of squares, less the group's first element.

    Less that element the squares do not cancel where a group's mean is much larger than its deviation.
    """
    row, part, parts = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    x += row * stride_b
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (c // CHANNELS_A_GROUP * CHANNELS_A_GROUP).to(tl.int64)
    shift = tl.load(x + first * stride_c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    plain = tl.zeros([BLOCK_C], tl.float32)
    squared = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, PIXELS_A_PROGRAM, BLOCK_P):
        pixel = part * PIXELS_A_PROGRAM + start
        _, offsets, mask = _tile(channels, pixels, stride_c, stride_p, pixel, BLOCK_C, BLOCK_P)
        value = tl.where(mask, tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - shift, 0.0)
        plain += tl.sum(value, axis=1)
        squared += tl.sum(value * value, axis=1)
    out = sums + ((row * channels + c) * parts + part) * 2
    tl.store(out, plain, mask=c < channels)
    tl.store(out + 1, squared, mask=c < channels)


@triton.jit
def _norm_silu_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    group_sums,
    weight,
    bias,
    channels,
    pixels,
    stride_b,
    stride_c,
    stride_p,
    eps,
    CHANNELS_A_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the output, given each group's sums ``[B, G, 2]``."""
    row = tl.program_id(2).to(tl.int64)
    x += row * stride_b
    out += row * stride_b
    pixel = tl.program_id(0) * BLOCK_P
    c, offsets, mask = _tile(channels, pixels, stride_c, stride_p, pixel, BLOCK_C, BLOCK_P)
    group, count = c // CHANNELS_A_GROUP, CHANNELS_A_GROUP * pixels
    sums = group_sums + (row * (channels // CHANNELS_A_GROUP) + group) * 2
    shift = tl.load(x + (group * CHANNELS_A_GROUP).to(tl.int64) * stride_c, mask=c < channels, other=0.0)
    mean = tl.load(sums, mask=c < channels, other=0.0) / count
    variance = tl.load(sums + 1, mask=c < channels, other=0.0) / count - mean * mean
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    added = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32) - (shift.to(tl.float32) + mean) * scale
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * scale[:, None] + added[:, None]
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=mask)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``silu(group_norm(x))`` of ``[B, C, h, w]``, contiguous or channels-last; its output is so too.

    Computed in float32 and rounded once, where plain torch rounds between the two.
    """
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    pixels, strides = height * width, (x.stride(0), x.stride(1), x.stride(3))
    # Tiles are as long as they can be along what lies side by side in memory.
    block_c = min(triton.next_power_of_2(channels), 64) if x.stride(1) == 1 and channels > 1 else 1
    block_p = min(triton.next_power_of_2(pixels), TILE // block_c, PIXELS)
    a_program = min(triton.next_power_of_2(pixels), PIXELS)
    of_channels, parts = triton.cdiv(channels, block_c), triton.cdiv(pixels, a_program)
    in_group = channels // groups

    sums = torch.empty(batch, channels, parts, 2, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        _sums_kernel[parts, of_channels, batch](
            x,
            sums,
            channels,
            pixels,
            *strides,
            CHANNELS_A_GROUP=in_group,
            PIXELS_A_PROGRAM=a_program,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
        group_sums = sums.view(batch, groups, in_group * parts, 2).sum(2)
        # Of a grid's axes the first alone has room for the tiles of a large picture: the others end at 65,535.
        _norm_silu_kernel[triton.cdiv(pixels, block_p), of_channels, batch](
            x,
            out,
            group_sums,
            weight,
            bias,
            channels,
            pixels,
            *strides,
            eps,
            CHANNELS_A_GROUP=in_group,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
    return out


@triton.jit
def _geglu_kernel(both, out, inner, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``BLOCK`` elements of one row: ``both`` holds a row's values and then its gates."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(both + row * 2 * inner + i, mask=i < inner).to(tl.float32)
    gate = tl.load(both + row * 2 * inner + inner + i, mask=i < inner).to(tl.float32)
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


class FusedGroupNormSiLU(GroupNormSiLU):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class FusedGEGLU(GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


FUSED: dict[type[nn.Module], type[nn.Module]] = {GroupNormSiLU: FusedGroupNormSiLU, GEGLU: FusedGEGLU}


def accelerate(network: nn.Module) -> None:
    """Lets a network's layers run on the kernels from now on; its weights stay what and where they are."""
    for layer in network.modules():
        if type(layer) in FUSED:
            layer.__class__ = FUSED[type(layer)]
