"""What is computed of each row by itself, for an NVIDIA GPU, in Triton: fulgurite.kernels.cuda says more.

A layer norm (Ba, Kiros and Hinton, arXiv 1607.06450) takes the sum before it along: plain torch writes the sum to
memory and reads it again. Softmax reads float32 and writes what the next product takes. Rounding to 8 bits takes one
pass over numbers that torch reads and writes five times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fulgurite.kernels.cuda_norm import load
from fulgurite.kernels.float8 import KIND, SMALLEST, UNIT

A_WARP = 512  # elements of a row to round: 16 bytes for each of its threads to write
NORMED = 1024  # elements of a row to norm that a warp has
PASSED = 4096  # scores that a program of softmax has at once
LEAST = -1e30  # below any score, and what may be taken from itself


@triton.jit
def _layer_norm_kernel(x, more, weight, bias, total, out, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row, which its program holds as a whole: its sum with ``more``, where that is there, and the norm of it."""
    start, i = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    mask = i < width
    value = load(x + start + i, mask)
    if more is not None:
        added = (value + load(more + start + i, mask)).to(total.dtype.element_ty)
        tl.store(total + start + i, added, mask=mask)
        value = added.to(tl.float32)
    apart = tl.where(mask, value - tl.sum(value, axis=0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(apart * apart, axis=0) / width + eps)
    normed = apart * scale * load(weight + i, mask) + load(bias + i, mask)
    tl.store(out + start + i, normed.to(out.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, norm: nn.LayerNorm, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of two tensors ``[..., D]``, or the one that there is, and ``norm`` of it.

    The sum is rounded as torch rounds it; the norm is computed of that in float32, and rounded once.
    """
    x, width = x.contiguous(), x.shape[-1]
    more = None if more is None else more.contiguous()
    total, out = x if more is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _layer_norm_kernel[x.numel() // width,](
            x,
            more,
            norm.weight,
            norm.bias,
            total,
            out,
            width,
            norm.eps,
            BLOCK=block,
            num_warps=min(max(block // NORMED, 2), 8),
        )
    return total, out


@triton.jit
def _softmax_kernel(out, scores, width, factor, LEAST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row, read twice: its greatest and its sum are found at once (Milakov and Gimelshein, arXiv 1805.02867)."""
    row = tl.program_id(0).to(tl.int64) * width
    most = tl.full([BLOCK], LEAST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.where(i < width, load(scores + row + i, i < width), LEAST)
        greater = tl.maximum(most, value)
        sums = sums * tl.exp((most - greater) * factor)
        sums += tl.where(i < width, tl.exp((value - greater) * factor), 0.0)
        most = greater
    greatest = tl.max(most, axis=0)
    share = 1.0 / tl.sum(sums * tl.exp((most - greatest) * factor), axis=0)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.exp((load(scores + row + i, i < width) - greatest) * factor) * share
        tl.store(out + row + i, value.to(out.dtype.element_ty), mask=i < width)


def softmax(scores: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Softmax of the last dimension of a positive ``factor`` times what is given in float32, rounded to ``dtype``."""
    scores, width = scores.contiguous(), scores.shape[-1]
    out = torch.empty_like(scores, dtype=dtype)
    block = min(triton.next_power_of_2(width), PASSED)
    with torch.cuda.device_of(scores):
        _softmax_kernel[scores.numel() // width,](out, scores, width, factor, LEAST=LEAST, BLOCK=block, num_warps=16)
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
