"""Group normalization (Wu and He, arXiv 1803.08494) for an NVIDIA GPU, in Triton: fulgurite.kernels.cuda says more.

It takes two passes over the input, in either memory format. Plain torch reads it twice and writes for the norm, reads
and writes again for SiLU, and on CUDA turns channels-last inputs around first, which the next convolution has to undo.

A row's sums are taken in an order that its own sizes alone decide; that of torch's sums on a GPU may go by all rows'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

TILE = 4096  # elements that a program holds at once
SUMMED = 2048  # that a program of the sums does, with two sums for each
PARTS = 64  # into which a channel's pixels are cut for the sums, so that the whole GPU is at work, but
PIXELS = 1024  # are a part's at most
PARTIAL = 1024  # sums of parts that a group's program adds up at once


@triton.jit
def tile(shape_c, shape_p, stride_c, stride_p, pixel, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The channels of this program, and the offsets and the mask of its tile ``[BLOCK_C, BLOCK_P]`` from ``pixel``."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pixel + tl.arange(0, BLOCK_P).to(tl.int64)
    offsets = c.to(tl.int64)[:, None] * stride_c + p[None, :] * stride_p
    return c, offsets, (c < shape_c)[:, None] & (p < shape_p)[None, :]


@triton.jit
def load(pointers, mask):  # type: ignore[no-untyped-def]
    """In float32, as everything is computed."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _from_first(x, bias, vectors, offset, c, mask, in_group, stride_c):  # type: ignore[no-untyped-def]
    """Of channels ``c``: their group's first element as it is in memory, and how much more is added to them than to it.

    What is added is a bias and, of ``vectors``, the one that starts at ``offset``, each there or None. Values are taken
    less that element with what is added to it. So nothing cancels where a group's mean is much larger than its
    deviation, whichever of them made it large: like is taken from like first.
    """
    first = c // in_group * in_group
    more = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        more += load(bias + c, mask) - load(bias + first, mask)
    if vectors is not None:
        more += load(vectors + offset + c, mask) - load(vectors + offset + first, mask)
    return load(x + first.to(tl.int64) * stride_c, mask), more


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    x,
    bias,
    vectors,
    sums,
    channels,
    pixels,
    in_group,
    stride_b,
    stride_c,
    stride_p,
    stride_v,
    PIXELS_A_PROGRAM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel and ``PIXELS_A_PROGRAM`` pixels: the sums of values, less the group's first, and of squares."""
    row, part, parts = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    x += row * stride_b
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift, more = _from_first(x, bias, vectors, row * stride_v, c, c < channels, in_group, stride_c)
    plain = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squared = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, PIXELS_A_PROGRAM, BLOCK_P):
        pixel = part * PIXELS_A_PROGRAM + start
        _, offsets, mask = tile(channels, pixels, stride_c, stride_p, pixel, BLOCK_C, BLOCK_P)
        value = tl.where(mask, load(x + offsets, mask) - shift[:, None] + more[:, None], 0.0)
        plain += value
        squared += value * value
    out = sums + ((row * channels + c) * parts + part) * 2
    tl.store(out, tl.sum(plain, axis=1), mask=c < channels)
    tl.store(out + 1, tl.sum(squared, axis=1), mask=c < channels)


@triton.jit
def _lines_kernel(  # type: ignore[no-untyped-def]
    x,
    bias,
    vectors,
    sums,
    gamma,
    beta,
    lines,
    channels,
    in_group,
    partial,
    count,
    eps,
    stride_b,
    stride_c,
    stride_v,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one group, from its ``partial`` sums of ``count`` values: what normalizes each channel, in ``[B, 3, C]``.

    That is what to take from a value, what to multiply by then, and what to add at last.
    """
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sums += (row * tl.num_programs(0) + group) * partial * 2
    plain = tl.zeros([BLOCK], tl.float32)
    squared = tl.zeros([BLOCK], tl.float32)
    for start in range(0, partial, BLOCK):
        i = start + tl.arange(0, BLOCK)
        plain += load(sums + 2 * i, i < partial)
        squared += load(sums + 2 * i + 1, i < partial)
    mean = tl.sum(plain) / count
    variance = tl.maximum(tl.sum(squared) / count - mean * mean, 0.0)  # below 0 by rounding alone

    c, mask = group * in_group + tl.arange(0, GROUP), tl.arange(0, GROUP) < in_group
    shift, more = _from_first(x + row * stride_b, bias, vectors, row * stride_v, c, mask, in_group, stride_c)
    scale = load(gamma + c, mask) / tl.sqrt(variance + eps)
    added = load(beta + c, mask) + (more - mean) * scale
    line = lines + row * 3 * channels + c
    tl.store(line, shift, mask=mask)
    tl.store(line + channels, scale, mask=mask)
    tl.store(line + 2 * channels, added, mask=mask)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x,
    lines,
    out,
    channels,
    pixels,
    stride_b,
    stride_c,
    stride_p,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the output, by the channels' lines."""
    row, pixel = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_P
    c, offsets, mask = tile(channels, pixels, stride_c, stride_p, pixel, BLOCK_C, BLOCK_P)
    line = lines + row * 3 * channels + c
    shift = load(line, c < channels)[:, None]
    scale = load(line + channels, c < channels)[:, None]
    added = load(line + 2 * channels, c < channels)[:, None]
    value = (load(x + row * stride_b + offsets, mask) - shift) * scale + added
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + row * stride_b + offsets, value.to(out.dtype.element_ty), mask=mask)


def in_order(x: Tensor) -> Tensor:
    """``x``, contiguous or channels-last."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Between rows, channels and pixels of what is in order; where there is but one of a kind, its own may be any."""
    _, channels, height, width = x.shape
    channel, pixel = (height * width, 1) if x.is_contiguous() else (1, channels)
    return channels * height * width, channel, pixel


def blocks(x: Tensor, elements: int) -> tuple[int, int]:
    """Channels and pixels of a tile of at most so many elements, as long as can be along what lies side by side."""
    channels, pixels = triton.next_power_of_2(x.shape[1]), triton.next_power_of_2(x.shape[2] * x.shape[3])
    if x.is_contiguous():
        block_p = min(pixels, elements)
        return min(channels, elements // block_p), block_p
    block_c = min(channels, 64)
    return block_c, min(pixels, elements // block_c)


def group_norm(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool, bias: Tensor | None = None, vectors: Tensor | None = None
) -> Tensor:
    """``norm`` of ``[B, C, h, w]``, contiguous or channels-last, then SiLU if asked; the output is in order as x is.

    First a ``bias`` ``[C]`` and ``vectors`` ``[B, C]`` are added to the channels. Computed in float32 and rounded once,
    where plain torch rounds after each.
    """
    x = in_order(x)
    batch, channels, height, width = x.shape
    groups, pixels, in_group = norm.num_groups, height * width, channels // norm.num_groups
    of_row, of_channel, of_pixel = strides(x)
    of_vector = 0 if vectors is None else vectors.stride(0)
    block_c, block_p = blocks(x, SUMMED)
    # By the sizes of a row: the order of its sums must not depend on how many there are.
    a_program = max(block_p, min(triton.next_power_of_2(pixels) // PARTS, PIXELS))
    parts = triton.cdiv(pixels, a_program)
    sums = torch.empty(batch, channels, parts, 2, device=x.device, dtype=torch.float32)
    lines = torch.empty(batch, 3, channels, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        _sums_kernel[parts, triton.cdiv(channels, block_c), batch](
            x,
            bias,
            vectors,
            sums,
            channels,
            pixels,
            in_group,
            of_row,
            of_channel,
            of_pixel,
            of_vector,
            PIXELS_A_PROGRAM=a_program,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
        _lines_kernel[groups, batch](
            x,
            bias,
            vectors,
            sums,
            norm.weight,
            norm.bias,
            lines,
            channels,
            in_group,
            in_group * parts,
            in_group * pixels,
            norm.eps,
            of_row,
            of_channel,
            of_vector,
            GROUP=triton.next_power_of_2(in_group),
            BLOCK=PARTIAL,
        )
        block_c, block_p = blocks(x, TILE)
        # Of a grid's axes the first alone has room for the tiles of a large picture: the others end at 65,535.
        _norm_kernel[triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c), batch](
            x,
            lines,
            out,
            channels,
            pixels,
            of_row,
            of_channel,
            of_pixel,
            SILU=silu,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
    return out
