"""Layers for a CPU: oneDNN's, their weights packed once instead of at every call, and the package's own kernels.

Each stands for a layer of fulgurite.models and differs from it in rounding alone. Packed weights are no parameters: a
network that has them cannot be saved, moved or trained.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.kernels import compiled
from fulgurite.kernels.tiled import TiledConv2d, TiledLinear
from fulgurite.kernels.winograd import MOST_WEIGHTS, WinogradConv2d, WinogradUpsample
from fulgurite.models.layers import GEGLU, DotProductAttention, GroupNormSiLU, Upsample, VectorLinear

# Large tensors on large pages: else most of the time of a norm of a large picture goes into getting pages of 4 kB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
ops = torch.ops.mkldnn  # how torch's own compiler calls oneDNN

SCORES = 1 << 21  # of attention at a time: in half precision 4 MB, which stay in the cache
HALF = torch.float16  # what weights can be kept in
LARGE = 1 << 20  # weights of a linear layer, above which they stay so; of a convolution where minimal filtering ends
VECTOR = 32  # numbers in half precision, in AVX-512
FEW_SCORES = 1 << 14  # a head, up to which torch's own attention is quicker
NARROW, SMALL = 12, 1024  # channels a group and pixels, below which a norm is quicker of planes
PLANES = torch.contiguous_format


MALLOPT_ARENA_MAX, MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -8, -1, -3  # glibc's malloc.h


def keep_memory() -> None:
    """Has glibc keep what large tensors leave for the next ones; else the system takes it back and clears it each time.

    For a program that draws, before it has a second thread: all threads share one heap, since only the first one's can
    hold large tensors. Training would be slower. Without glibc nothing changes.
    """
    if mallopt := of_glibc("mallopt"):
        mallopt(MALLOPT_ARENA_MAX, 1)
        for threshold in (MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD):
            mallopt(threshold, 2**31 - 1)  # bytes


def give_back_memory() -> None:
    """Gives what is kept and not in use to the system: after loading, whose tensors of passage leave gigabytes."""
    if trim := of_glibc("malloc_trim"):
        trim(0)


def of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor. Torch's builds for Apple's processors may lack it."""
    return torch.backends.mkldnn.is_available() and ops._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A linear layer, with what comes after it: a function such as "gelu"."""

    def __init__(self, weight: Tensor, bias: Tensor | None, after: str = "none") -> None:
        super().__init__()
        self.kept, self.bias, self.after = self.keep(weight.detach()), bias, after

    def keep(self, weight: Tensor) -> Tensor:
        """A weight as it is kept."""
        return ops._reorder_linear_weight(weight)

    def weight(self) -> Tensor:
        """It as a call takes it."""
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        return ops._linear_pointwise(x, self.weight(), self.bias, self.after, [], "none")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The layer's output times a factor of its shape."""
        return ops._linear_pointwise.binary(x, factor, self.weight(), self.bias, "mul")


class HalfLinear(PackedLinear):
    """One in float32 whose weight is kept in half precision: half the memory, for a few hundredths of the time."""

    def keep(self, weight: Tensor) -> Tensor:
        return weight.clone()  # not the file's own pages

    def weight(self) -> Tensor:
        return self.kept.float()


def packed_linear(weight: Tensor, bias: Tensor | None, after: str = "none") -> PackedLinear | TiledLinear:
    """The quickest for this weight."""
    if weight.dtype == HALF:
        return HalfLinear(weight, bias, after)
    return (TiledLinear if TiledLinear.fits(weight) else PackedLinear)(weight, bias, after)


class PackedGEGLU(nn.Module):
    """Two linear layers, so that the function and the product come with them and nothing is split."""

    def __init__(self, plain: GEGLU) -> None:
        super().__init__()
        (value, gate), (value_bias, gate_bias) = plain.proj.weight.chunk(2), plain.proj.bias.chunk(2)
        self.value, self.gate = packed_linear(value, value_bias), packed_linear(gate, gate_bias, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.value.times(x, self.gate(x))


class PointwiseConv2d(nn.Module):
    """A 1x1 convolution, which is a linear layer of channels-last pictures."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.linear = packed_linear(plain.weight[:, :, 0, 0], plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedBySize(nn.Module):
    """A layer of channels-last pictures, its weight packed for each size of them.

    Which layout is quick can depend on the size, most of all for few channels; in another one a layer takes ten or a
    hundred times as long.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.usual, self.bias = self.pack(weight), bias
        self.packed: dict[torch.Size, Tensor] = {}  # by height and width

    def pack(self, weight: Tensor, size: torch.Size | None = None) -> Tensor:
        """A weight in the layout for pictures of this height and width, or for any."""
        raise NotImplementedError

    def weight_for(self, x: Tensor) -> Tensor:
        """The weight as pictures of this size want it: one that is here, if that is its layout."""
        if (size := x.shape[2:]) not in self.packed:
            wanted = self.pack(self.usual.to_dense(), size)
            known, form = (self.usual, *self.packed.values()), layout(wanted)
            same = (weight for weight in known if layout(weight) == form)
            self.packed[size] = next(same, wanted)
        return self.packed[size]


def layout(packed: Tensor) -> bytes:
    """How a weight is packed, as oneDNN writes it down, less four bytes between two fields, which it never sets."""
    description = ops._get_mkldnn_serialized_md(packed).numpy().tobytes()
    return description[:108] + description[112:]


class PackedConv2d(PackedBySize):
    def __init__(self, plain: nn.Conv2d) -> None:
        self.where = plain.padding, plain.stride, plain.dilation, plain.groups
        super().__init__(plain.weight, plain.bias)
        self.tiled = TiledConv2d(plain) if TiledConv2d.fits(plain) else None

    def pack(self, weight: Tensor, size: torch.Size | None = None) -> Tensor:
        pictures = [1, weight.shape[1] * self.where[3], *size] if size else None
        return ops._reorder_convolution_weight(weight, *self.where, pictures)

    def tiled_for(self, size: torch.Size) -> TiledConv2d | None:
        """The layer that pictures of this height and width are small enough for."""
        return self.tiled if self.tiled and self.tiled.takes(size) else None

    def forward(self, x: Tensor) -> Tensor:
        if tiled := self.tiled_for(x.shape[2:]):
            return tiled(x)
        x = x.contiguous(memory_format=torch.channels_last)
        return ops._convolution_pointwise(x, self.weight_for(x), self.bias, *self.where, "none", [], "")


class HalfConv2d(nn.Module):
    """A convolution in float32 whose weight is kept in half precision."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.kept, self.bias = plain.weight.detach().clone(memory_format=torch.channels_last), plain.bias
        self.where = plain.stride, plain.padding, plain.dilation, plain.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kept.float(), self.bias, *self.where)  # type: ignore[arg-type]


class PackedUpsample(PackedBySize):
    """Nearest neighbours and a 3x3 convolution as one transposed convolution, for 4/9 of the arithmetic.

    Of the three rows that the convolution sees of the larger picture two are the same row of the smaller one, so
    their weights can be added beforehand; likewise the columns.
    """

    where = [1, 1], [0, 0], [2, 2], [1, 1], 1  # padding, of the output, stride, dilation, groups

    def __init__(self, plain: Upsample) -> None:
        add = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]])
        weight = torch.einsum("ak,bl,oikl->oiab", add, add, plain.conv.weight.float().flip(2, 3))
        super().__init__(weight.to(plain.conv.weight.dtype), plain.conv.bias)
        self.plain = PackedConv2d(plain.conv)

    def pack(self, weight: Tensor, size: torch.Size | None = None) -> Tensor:
        pictures = [1, weight.shape[1], *size] if size else None
        # oneDNN takes these weights as torch has them, inputs first, and gives them back outputs first.
        return ops._reorder_convolution_transpose_weight(weight.transpose(0, 1), *self.where, pictures)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        twice = torch.Size((2 * x.shape[2], 2 * x.shape[3]))
        if (size or twice) != twice or self.plain.tiled_for(twice):
            return self.plain(F.interpolate(x, size=size or twice, mode="nearest"))
        x = x.contiguous(memory_format=torch.channels_last)
        return ops._convolution_transpose_pointwise(x, self.weight_for(x), self.bias, *self.where, "none", [], "")


class CachedAttention(DotProductAttention):
    """Attention by the package's own kernel; where there is none as matrix products, torch's own for few scores.

    Those are over as many heads, or as many queries of one head, as the cache has room for.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if compiled.fits_attention(q, k, v, self.head_dim):
            return compiled.attend(q, k, v, self.head_dim)
        queries, keys = q.shape[1], k.shape[1]
        if queries * keys <= FEW_SCORES:
            return super().forward(q, k, v)
        attended = torch.empty_like(q)
        # Of a prompt's 77 keys torch's softmax takes three times as long in half precision, for they fill no vectors.
        exactly = torch.float32 if keys % VECTOR else q.dtype
        at_once, heads_at_once = max(1, SCORES // keys), max(1, SCORES // (queries * keys))
        for row in range(len(q)):
            of_row = (y[row].unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for y in (q, k, v, attended))
            for heads in zip(*(y.split(heads_at_once) for y in of_row), strict=True):
                q_heads, k_heads, v_heads, out = heads  # [H, S or L, head_dim]
                for some, some_out in zip(q_heads.split(at_once, 1), out.split(at_once, 1), strict=True):
                    scores = torch.baddbmm(
                        some.new_empty(1), some, k_heads.transpose(1, 2), beta=0, alpha=self.head_dim**-0.5
                    )
                    some_out.copy_(scores.softmax(-1, dtype=exactly).to(q.dtype) @ v_heads)
        return attended


class ProductAttention(DotProductAttention):
    """Attention as plain matrix products, for training: torch's own takes long on the way back."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, H, S or L, head_dim]
        weights = (self.head_dim**-0.5 * q @ k.transpose(2, 3)).softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Reordered(torch.autograd.Function):
    """Pictures in one memory format to the same in another, and on the way back their gradients to the first again.

    Torch lets gradients be in whatever format they come: layers whose two inputs then differ in it take four times
    as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: torch.memory_format, back: torch.memory_format) -> Tensor:
        ctx.back = back
        return x.contiguous(memory_format=there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].contiguous(memory_format=ctx.back), None, None


def quicker_of_planes(x: Tensor, groups: int) -> bool:
    """Whether pictures ``[B, C, h, w]`` with their channels last are normalized sooner as planes.

    Small ones are where groups are narrow: within a pixel those have but a few channels to go through at a time, and
    torch takes ten times as long. Large ones it goes through in another way.
    """
    return x.shape[1] < NARROW * groups and x.shape[2] * x.shape[3] < SMALL


class QuickGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        if quicker_of_planes(x, self.num_groups):
            x = Reordered.apply(x, PLANES, torch.channels_last)
        return super().forward(x)


class QuickGroupNormSiLU(GroupNormSiLU):
    def forward(self, x: Tensor) -> Tensor:
        of_planes = quicker_of_planes(x, self.num_groups)
        if of_planes:
            x = Reordered.apply(x, PLANES, torch.channels_last)
        x = F.silu(nn.GroupNorm.forward(self, x), inplace=True)
        return Reordered.apply(x, torch.channels_last, PLANES) if of_planes else x


class CompiledGroupNorm(nn.Module):
    """A norm by the package's own kernel, with SiLU where the plain layer has it."""

    def __init__(self, plain: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = plain.num_groups, plain.eps, isinstance(plain, GroupNormSiLU)
        self.weight, self.bias = (tensor.detach().float() for tensor in (plain.weight, plain.bias))
        self.dtype = plain.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x = compiled.in_dtype(x, self.dtype)
        return compiled.group_norm(x, self.groups, self.weight, self.bias, self.eps, self.silu)


class CompiledLayerNorm(nn.Module):
    """A norm of tokens by the package's own kernel."""

    def __init__(self, plain: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = compiled.for_norm(plain.weight), compiled.for_norm(plain.bias), plain.eps
        self.dtype = plain.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return compiled.layer_norm(compiled.in_dtype(x, self.dtype), self.weight, self.bias, self.eps)


def accelerate(network: nn.Module) -> None:
    """Puts these layers in place of the network's own, in place, one by one, so that the memory is not needed twice."""
    if torch.backends.mkldnn.is_available():
        widen_small(network)
        replace_layers(network)


def replace_layers(network: nn.Module) -> None:
    """Puts them there, in a network none of whose small layers is in half precision."""
    for name, layer in network.named_children():
        match layer:
            case VectorLinear() if not compiled.fits_tiles(layer.weight):
                pass  # as it is a row's bits are its own
            case VectorLinear():
                setattr(network, name, TiledLinear(layer.weight, layer.bias))
            case nn.Linear():
                setattr(network, name, packed_linear(layer.weight, layer.bias))
            case nn.Conv2d() if layer.weight.dtype == HALF:
                setattr(network, name, HalfConv2d(layer))
            case nn.Conv2d(kernel_size=(1, 1)):
                setattr(network, name, PointwiseConv2d(layer))
            case nn.Conv2d():
                setattr(network, name, (WinogradConv2d if WinogradConv2d.fits(layer) else PackedConv2d)(layer))
            case GEGLU():
                setattr(network, name, PackedGEGLU(layer))
            case Upsample() if isinstance(layer.conv, HalfConv2d):
                pass  # of a network that another checkpoint shares
            case Upsample() if layer.conv.weight.dtype == HALF:
                layer.conv = HalfConv2d(layer.conv)  # type: ignore[assignment]
            case Upsample():
                setattr(network, name, (WinogradUpsample if WinogradConv2d.fits(layer.conv) else PackedUpsample)(layer))
            case DotProductAttention():
                setattr(network, name, CachedAttention(layer.head_dim))
            case nn.GroupNorm() if compiled.where("group_norm", layer.weight.dtype):
                setattr(network, name, CompiledGroupNorm(layer))
            case nn.LayerNorm() if compiled.fits_norm(layer.weight):
                setattr(network, name, CompiledLayerNorm(layer))
            case GroupNormSiLU():
                layer.__class__ = QuickGroupNormSiLU
            case nn.GroupNorm():
                layer.__class__ = QuickGroupNorm
            case _:
                replace_layers(layer)


def widen_small(network: nn.Module) -> None:
    """Of a network in half precision, has all but the weights of large layers in float32."""
    for layer in network.modules():
        most = math.inf
        if isinstance(layer, nn.Linear) and not isinstance(layer, VectorLinear):
            most = LARGE
        elif isinstance(layer, nn.Conv2d):
            most = MOST_WEIGHTS
        for name, own in layer.named_parameters(recurse=False):
            if own.dtype == HALF and (name != "weight" or own.numel() <= most):
                own.data = own.data.float()


def accelerate_training(network: nn.Module) -> None:
    """Gives layers of a network of small pictures, in place, other ways there and back; weights and names stay."""
    for layer in network.modules():
        match layer:
            case DotProductAttention():
                layer.__class__ = ProductAttention
            case GroupNormSiLU():
                layer.__class__ = QuickGroupNormSiLU
            case nn.GroupNorm():
                layer.__class__ = QuickGroupNorm
