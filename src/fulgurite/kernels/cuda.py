"""Layers for an NVIDIA GPU: hand-written Triton kernels, each for the plain torch of fulgurite.models that it equals.

The tests run them in Triton's interpreter, against that torch, and compile them for GPUs; bench/gpu.py runs and
measures them on one. Triton comes with torch's builds for CUDA.

All of them save passes over memory. GEGLU's gate (Shazeer, arXiv 2002.05202) takes one; plain torch writes the gate's
GELU to memory and reads it again. A convolution's bias is a pass of its own in torch, over what cuDNN wrote: here the
group norm behind it adds it, with the timestep's embedding, or else the sum at a block's end. Where a convolution
follows an upsampling, four smaller ones of the smaller picture give the four pixels that each of its own becomes: 4/9
of the products, and the larger picture is neither written nor read. Attention with one wide head, the decoder's, is
products of matrices with a softmax between, since torch's fused kernels are for narrow ones.

Group norms are in fulgurite.kernels.cuda_norm, what is of single rows in cuda_rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from fulgurite.kernels.cuda_norm import TILE, blocks, group_norm, in_order, load, strides, tile
from fulgurite.kernels.cuda_rows import layer_norm, rounded, softmax
from fulgurite.kernels.float8 import Float8Linear
from fulgurite.models import AttentionGuidance, unet, vae
from fulgurite.models.layers import GEGLU, DotProductAttention, GroupNormSiLU, Upsample

BLOCK = 1024  # elements that a program of GEGLU makes
WIDEST = 256  # head dimension that torch's quick attention takes; beyond, it has a slow one
SCORES = 1 << 27  # of attention with wide heads, in memory at once: 512 MB


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
def _interleaved_kernel(  # type: ignore[no-untyped-def]
    four,
    bias,
    out,
    channels,
    height,
    width,
    four_b,
    four_c,
    four_p,
    stride_b,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of ``interleaved``, whose picture is of ``height`` and ``width``."""
    row, start = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_P
    c, offsets, mask = tile(channels, height * width, stride_c, stride_p, start, BLOCK_C, BLOCK_P)
    p = start + tl.arange(0, BLOCK_P)
    y, x = p // width, p % width
    place = (y // 2 + y % 2) * (width // 2 + 1) + x // 2 + x % 2
    of_four = (y % 2 * 2 + x % 2).to(tl.int64) * channels * four_c + place.to(tl.int64) * four_p
    value = load(four + row * four_b + c.to(tl.int64)[:, None] * four_c + of_four[None, :], mask)
    value += load(bias + c, c < channels)[:, None]
    tl.store(out + row * stride_b + offsets, value.to(out.dtype.element_ty), mask=mask)


def interleaved(four: Tensor, bias: Tensor) -> Tensor:
    """Pictures ``[B, C, 2 h, 2 w]`` of four each, side by side in ``[B, 4 C, h + 1, w + 1]``, with a bias ``[C]``.

    Of the four, the first has the pixels in even rows and columns, the second those in even rows and odd columns, and
    so on; an odd row or column's begin at 1 instead of 0. In order as what is given.
    """
    four = in_order(four)
    batch, channels, height, width = len(four), len(bias), 2 * (four.shape[2] - 1), 2 * (four.shape[3] - 1)
    order = torch.contiguous_format if four.is_contiguous() else torch.channels_last
    out = torch.empty(batch, channels, height, width, device=four.device, dtype=four.dtype, memory_format=order)
    block_c, block_p = blocks(out, TILE)
    with torch.cuda.device_of(four):
        _interleaved_kernel[triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch](
            four, bias, out, channels, height, width, *strides(four), *strides(out), BLOCK_C=block_c, BLOCK_P=block_p
        )
    return out


def folded(weight: Tensor) -> Tensor:
    """A 3x3 filter ``[O, I, 3, 3]`` for an upsampled picture as four of 2x2, ``[4 O, I, 2, 2]``, for the smaller one.

    Of three pixels in a row of the larger picture two are copies of one: their weights are added, in float32. For
    ``interleaved``, with a padding of 1.
    """
    first, middle, last = weight.detach().float().unbind(2)
    four = []
    for rows in ((first, middle + last), (first + middle, last)):
        left, centre, right = torch.stack(rows, dim=2).unbind(3)
        four += [torch.stack([left, centre + right], dim=3), torch.stack([left + centre, right], dim=3)]
    return torch.cat(four).to(weight.dtype)


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with one head of any width: ``[B, S, D]``, ``[B, L, D]`` and again to ``[B, S, D]``.

    Scores are in float32, for some queries at a time.
    """
    keys, batch, length = k.transpose(1, 2), len(k), k.shape[1]

    def scores(q: Tensor) -> Tensor:
        if q.is_cuda and q.dtype != torch.float32:
            return torch.bmm(q, keys, out_dtype=torch.float32)
        return torch.bmm(q.float(), keys.float())

    parts = q.split(max(1, SCORES // (batch * length)), dim=1)
    return torch.cat([torch.bmm(softmax(scores(part), q.shape[-1] ** -0.5, q.dtype), v) for part in parts], dim=1)


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


class FusedTransformerBlock(unet.TransformerBlock):
    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, guidance: AttentionGuidance | None, more: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sums are left to the norms behind them: of x and ``more``, and of what is given to the next block."""
        x, h = layer_norm(x, self.norm1, more)
        x, h = layer_norm(x, self.norm2, self.attn1(h, h))
        x, h = layer_norm(x, self.norm3, self.attn2(h, context, guidance))
        return x, self.ff(h)


class FusedSpatialTransformer(unet.SpatialTransformer):
    def forward(self, x: Tensor, context: Tensor, guidance: AttentionGuidance | None) -> Tensor:
        h, more = self.proj_in(self.norm(x).flatten(2).transpose(1, 2)), None
        for block in self.transformer_blocks:
            h, more = block(h, context, guidance, more)
        h = h if more is None else h + more
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, (x.shape[2], -1))


class FusedDotProductAttention(DotProductAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one_head = q.shape[-1] == self.head_dim
        return wide_attention(q, k, v) if one_head and self.head_dim > WIDEST else super().forward(q, k, v)


class FusedUpsample(Upsample):
    four: Tensor

    def fold(self) -> None:
        # In the order for good: graphs know where it is, and Module.to would put another in its place.
        four = folded(self.conv.weight).contiguous(memory_format=torch.channels_last)
        self.register_buffer("four", four, persistent=False)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        if size is not None and size != (2 * x.shape[2], 2 * x.shape[3]):
            return super().forward(x, size)
        assert self.conv.bias is not None
        return interleaved(F.conv2d(x, self.four, padding=1), self.conv.bias)


class FusedFloat8Linear(Float8Linear):
    rounded = staticmethod(rounded)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: FusedGroupNorm,
    GroupNormSiLU: FusedGroupNormSiLU,
    unet.ResnetBlock: FusedUNetBlock,
    vae.ResnetBlock: FusedVAEBlock,
    GEGLU: FusedGEGLU,
    unet.TransformerBlock: FusedTransformerBlock,
    unet.SpatialTransformer: FusedSpatialTransformer,
    DotProductAttention: FusedDotProductAttention,
    Upsample: FusedUpsample,
    Float8Linear: FusedFloat8Linear,
}


def accelerate(network: nn.Module) -> None:
    """Lets a network's layers run on the kernels from now on, channels-last, for which cuDNN's convolutions are made.

    Weights stay what they are; those that follow an upsampling are there a second time, folded.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in network.modules():
        if type(layer) in FUSED:
            layer.__class__ = FUSED[type(layer)]
            if isinstance(layer, FusedUpsample):
                layer.fold()
