"""Kernels in C for a CPU (``*.c``): compiled as the package is installed, none where there is no compiler."""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 1 << 14  # numbers that a thread goes through at a time: they stay in its cache. Sums are of such parts
PAIR = 32  # numbers that a layer's norm and 8-bit kernels take at a time
SIDE, BLOCK = 16, 32  # a tile's outputs; the positions and outputs, or keys, that are gone through at a time
SQUARES, SPREAD = 12, 16  # for winograd.c: squares at a time, at most; numbers between its matrices, as there
MOST_WIDE = 512  # numbers of a head in attention, as in attention.c
POINTER, NUMBER, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
Writer = Callable[[Any, Sequence[Any]], None]
WRITER: ContextVar[Writer | None] = ContextVar("writer", default=None)


NORMS: dict[str, list] = {
    "group_norm": [POINTER] * 5 + [NUMBER] * 5 + [ctypes.c_double, INT, INT],
    "layer_norm": [POINTER] * 4 + [NUMBER] * 2 + [ctypes.c_double, INT],
}
EIGHT_BITS: dict[str, list] = {
    "quantize": [POINTER] * 3 + [NUMBER] * 2 + [INT],
    "dequantize": [POINTER] * 5 + [NUMBER] * 2 + [INT],
    "bounds": [POINTER] * 2 + [NUMBER] * 2 + [INT],
    "quantize_picture": [POINTER] * 2 + [NUMBER] * 3 + [ctypes.c_double, INT, INT],
}
PRODUCTS: dict[str, list] = {
    "linear": [POINTER] * 5 + [NUMBER] * 3 + [INT, INT],
    "convolve": [POINTER] * 5 + [NUMBER] * 7 + [INT],
    "attend": [POINTER] * 5 + [NUMBER] * 7 + [ctypes.c_double, INT],
}
IN_FLOAT32 = NORMS | PRODUCTS | {"convolve_large": [POINTER] * 5 + [NUMBER] * 7 + [INT]}


def opened(name: str, functions: dict[str, list]) -> ctypes.CDLL | None:
    """A compiled file; none where there is none, or where torch's threads are not those that it was compiled for."""
    spec = importlib.util.find_spec(f"fulgurite.kernels.{name}")
    if spec is None or spec.origin is None:
        return None
    try:
        found = ctypes.CDLL(spec.origin)
        for function, types in functions.items():
            getattr(found, function).argtypes, getattr(found, function).restype = types, None
    except (OSError, AttributeError):  # the latter of a file that was compiled from earlier sources
        return None
    return found


@cache
def library() -> ctypes.CDLL | None:
    """Norms in bfloat16 and rounding to 8 bits, for any processor."""
    return opened("_compiled", NORMS | EIGHT_BITS)


@cache
def products() -> ctypes.CDLL | None:
    """Products in bfloat16 for this processor's matrix tiles (AMX), else for its vectors.

    None where it is no x86 processor, or its vectors do not multiply bfloat16 (AVX-512 BF16).
    """
    found = library()
    tiles = opened("_tiles", PRODUCTS) if found and found.has_tiles() else None
    return tiles or (opened("_vectors", PRODUCTS) if found and found.has_vectors() else None)


@cache
def floats() -> ctypes.CDLL | None:
    """Norms and products in float32. None where it is no x86 processor, or an old one (without AVX2 and FMA)."""
    found = library()
    return opened("_floats", IN_FLOAT32) if found and found.has_floats() else None


def where(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """What has this function for such numbers."""
    if dtype == torch.float32:
        return floats() if name in IN_FLOAT32 else None
    if dtype == torch.bfloat16:
        return products() if name in PRODUCTS else library()
    return None


def call(name: str, dtype: torch.dtype, *arguments: float | None) -> None:
    """Calls a function for such numbers, with as many threads as torch has."""
    compiled = where(name, dtype)
    assert compiled
    function, arguments = getattr(compiled, name), (*arguments, torch.get_num_threads())
    function(*arguments)
    if write := WRITER.get():
        write(function, arguments)


@contextmanager
def written_down_by(write: Writer) -> Iterator[None]:
    """Has this thread's calls told of, each after it: the function and all its arguments."""
    before = WRITER.set(write)
    try:
        yield
    finally:
        WRITER.reset(before)


def keep_apart() -> bool:
    """Has the calling thread and the one that computes with it stay on a core each, where there are two of both.

    For a thread that draws, again and again, on Linux. Else, after a pause, both can be given the same core picture
    after picture, and wait for each other at every layer. What the calling thread starts from now on stays on its core.
    """
    found = library()
    return bool(found and found.keep_apart(torch.get_num_threads()))


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in such numbers. It usually is; checking here is cheaper than a no-op ``Tensor.to``."""
    return x if x.dtype == dtype else x.to(dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Group normalization, and SiLU after it where ``silu``: pictures ``[B, C, h, w]``, channels last.

    They are in bfloat16 or float32, ``weight`` and ``bias`` ``[C]`` in float32. Computed in float32, sums of parts in
    float64, and rounded once.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = x.shape
    assert weight.shape == (channels,)
    part = max(1, PART // channels)  # pixels
    parts = -(-height * width // part)
    y, scratch = torch.empty_like(x), torch.empty(rows * (2 * groups * parts + channels), dtype=torch.float64)
    pointers = (tensor.data_ptr() for tensor in (x, y, weight, bias, scratch))
    call("group_norm", x.dtype, *pointers, rows, height * width, channels, groups, part, eps, silu)
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalization of tokens ``[..., D]``; ``weight`` and ``bias``: from ``for_norm``."""
    x, (wide,) = x.contiguous(), weight.shape
    assert x.shape[-1] == wide
    assert wide % PAIR == 0
    y = torch.empty_like(x)
    pointers = (tensor.data_ptr() for tensor in (x, y, weight, bias))
    call("layer_norm", x.dtype, *pointers, x.numel() // wide, wide, eps)
    return y


def fits_norm(weight: Tensor) -> bool:
    """Whether ``layer_norm`` takes a layer of this weight ``[D]``."""
    return where("layer_norm", weight.dtype) is not None and weight.shape[-1] % PAIR == 0


def for_norm(vector: Tensor) -> Tensor:
    """A weight or bias ``[D]`` for tokens in its own numbers: in float32, and aligned, as it may not be in a file."""
    return in_pairs(vector) if vector.dtype == torch.bfloat16 else vector.detach().clone()


def fits_pairs(x: Tensor) -> bool:
    """Whether kernels that take numbers in pairs are there, and suit tokens or a picture's pixels ``[..., D]``."""
    return library() is not None and x.dtype == torch.bfloat16 and x.shape[-1] % PAIR == 0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[..., D]`` in bfloat16 as 8-bit numbers plus 128, and what 1 stands for in each, ``[..., 1]``.

    That is in float32. What is no number or infinite makes it none.
    """
    assert fits_pairs(x)
    x = x.contiguous()
    values, scales = torch.empty_like(x, dtype=torch.uint8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    call("quantize", torch.bfloat16, x.data_ptr(), values.data_ptr(), scales.data_ptr(), scales.numel(), x.shape[-1])
    return values, scales


def bounds(pixels: Tensor) -> tuple[float, float]:
    """The lowest and the highest of pixels ``[..., w, C]`` in bfloat16 and of 0; none where one is no finite number."""
    found, line = torch.empty(2), pixels.shape[-2] * pixels.shape[-1]
    assert fits_pairs(pixels)
    assert pixels.is_contiguous()
    call("bounds", torch.bfloat16, pixels.data_ptr(), found.data_ptr(), pixels.numel() // line, line)
    return float(found[0]), float(found[1])


def quantize_picture(pixels: Tensor, steps: float, zero: int) -> Tensor:
    """Pixels ``[1, h, w, C]`` in bfloat16 as 8-bit numbers, ``steps`` to 1, with a margin: ``[1, h + 2, w + 2, C]``."""
    rows, height, width, channels = pixels.shape
    assert fits_pairs(pixels)
    assert rows == 1
    values = torch.empty(1, height + 2, width + 2, channels, dtype=torch.uint8)
    assert pixels.is_contiguous()
    call("quantize_picture", torch.bfloat16, pixels.data_ptr(), values.data_ptr(), height, width, channels, steps, zero)
    return values


def in_pairs(vector: Tensor) -> Tensor:
    """A vector ``[D]`` for numbers in pairs: in float32, of each 32 the even ones before the odd ones."""
    return torch.cat([part[i::2] for part in vector.detach().float().split(PAIR) for i in range(2)])


def dequantize(
    y: Tensor, scales: Tensor, bias: Tensor, gate: Tensor | None = None, gate_bias: Tensor | None = None
) -> Tensor:
    """Products ``[..., D]`` in bfloat16 times ``scales`` ``[..., 1]``, plus a bias; in place.

    With a ``gate`` of the same shape, times GELU of that scaled and with its own bias. Biases: from ``in_pairs``.
    """
    scales = scales.float().contiguous()
    tokens, wide = scales.numel(), len(bias)
    assert wide % PAIR == 0
    for product in (y,) if gate is None else (y, gate):
        assert product.dtype == torch.bfloat16
        assert product.is_contiguous()
        assert product.numel() == tokens * wide
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (y, gate, scales, bias, gate_bias))
    call("dequantize", torch.bfloat16, *pointers, tokens, wide)
    return y


def depth(dtype: torch.dtype) -> int:
    """The inputs of a tile."""
    return 64 // dtype.itemsize


def fits_tiles(weight: Tensor) -> bool:
    """Whether there are products, and a layer's weight ``[outer, inner, ...]`` comes to whole tiles."""
    outer, inner = weight.shape[:2]
    whole = inner % depth(weight.dtype) == 0 or weight.shape[2:] == (3, 3)  # pictures are copied, with what they lack
    return where("linear", weight.dtype) is not None and outer % SIDE == 0 and whole


def tiled(weight: Tensor) -> Tensor:
    """A linear layer's weight ``[outer, inner]`` or a convolution's ``[outer, inner, 3, 3]`` as products want it.

    ``[outer / 16, taps, inner / 32, 16, 16, 2]``, pairs of inputs innermost; in float32 ``[.., inner / 16, 16, 16,
    1]``. What inner lacks to whole tiles is zeros.
    """
    taps, together = weight.flatten(2).permute(2, 0, 1) if weight.dim() > 2 else weight[None], 4 // weight.itemsize
    taps = F.pad(taps, (0, -taps.shape[2] % depth(weight.dtype)))
    inputs = taps.unflatten(2, (-1, depth(weight.dtype) // together, together))
    return inputs.unflatten(1, (-1, SIDE)).permute(1, 0, 3, 4, 2, 5).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, factor: Tensor | None = None) -> Tensor:
    """A linear layer of tokens ``[..., inner]``, GELU after it where ``gelu``, then times ``factor``.

    ``weight``: from ``tiled``; ``bias``: ``[outer]`` in float32; ``factor``: of the output's shape. A token's bits do
    not depend on the tokens beside it.
    """
    x, (outer,), inner = in_dtype(x, weight.dtype).contiguous(), bias.shape, x.shape[-1]
    y, by = x.new_empty(*x.shape[:-1], outer), None if factor is None else in_dtype(factor, x.dtype).contiguous()
    assert inner == weight.shape[2] * depth(weight.dtype)
    assert by is None or by.shape == y.shape
    pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), by if by is None else by.data_ptr(), y.data_ptr()
    call("linear", x.dtype, *pointers, x.numel() // inner, inner, outer, gelu)
    return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """A 3x3 convolution of pictures ``[B, channels, h, w]``, zeros around them, to channels-last ones.

    ``weight``: from ``tiled``; ``bias``: ``[outer]`` in float32; ``stride``: pixels from one output to the next.
    """
    x = in_dtype(x, weight.dtype).contiguous(memory_format=torch.channels_last)
    (pictures, channels, height, width), (outer,) = x.shape, bias.shape
    inner, outputs = weight.shape[2] * depth(weight.dtype), ((side - 1) // stride + 1 for side in (height, width))
    assert 0 <= inner - channels < depth(weight.dtype)
    y = torch.empty(pictures, outer, *outputs, dtype=x.dtype, memory_format=torch.channels_last)
    padded = x.new_empty(pictures, height + 2, width + 2, inner)
    pointers = (tensor.data_ptr() for tensor in (x, padded, weight, bias, y))
    call("convolve", x.dtype, *pointers, pictures, height, width, channels, inner, outer, stride)
    return y


def fits_filters(weight: Tensor) -> bool:
    """Whether ``convolve_large`` takes a weight ``[outer, inner, 3, 3]``."""
    whole = all(channels % SIDE == 0 for channels in weight.shape[:2])
    return where("convolve_large", weight.dtype) is not None and weight.shape[2:] == (3, 3) and whole


def filters(weight: Tensor) -> Tensor:
    """A weight ``[outer, inner, 3, 3]`` as ``convolve_large`` wants it: four times as many numbers, from ``tiled``."""
    rows = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
    there = torch.tensor(rows, dtype=torch.float64) / 24
    return tiled((there @ weight.double() @ there.T).to(weight.dtype))


def convolve_large(x: Tensor, weight: Tensor, bias: Tensor, size: torch.Size | None = None) -> Tensor:
    """A 3x3 convolution of pictures ``[B, channels, h, w]``, zeros around them, to channels-last ones.

    ``weight``: from ``filters``; ``bias``: ``[outer]``. With a ``size``, a height and width of at most twice the
    pictures', less one at the least, these are first enlarged to it by nearest neighbours.
    """
    x = in_dtype(x, weight.dtype).contiguous(memory_format=torch.channels_last)
    (pictures, inner, *own), (outer,), threads = x.shape, bias.shape, torch.get_num_threads()
    (height, width), larger = size or own, 2 if size else 1
    assert [-(-side // larger) for side in (height, width)] == own
    assert weight.shape[:3] == (outer // SIDE, 36, inner // SIDE)
    y = torch.empty(pictures, outer, height, width, dtype=x.dtype, memory_format=torch.channels_last)
    squares = pictures * -(-height // 4) * -(-width // 4)
    rounds = max(1, -(-squares // (SQUARES * threads)))
    at_once = -(-squares // (rounds * threads))
    scratch = torch.empty(threads, 36, at_once * (inner + outer) + 2 * SPREAD)
    pointers = (tensor.data_ptr() for tensor in (x, weight, bias, y, scratch))
    call("convolve_large", x.dtype, *pointers, pictures, height, width, inner, outer, larger, at_once)
    return y


def fits_attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> bool:
    """Whether ``attend`` takes these queries, keys and values ``[B, S or L, heads * head_dim]``."""
    alike = q.dtype == k.dtype == v.dtype
    return where("attend", q.dtype) is not None and alike and head_dim % BLOCK == 0 and head_dim <= MOST_WIDE


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """Attention of queries ``[B, S, D]``, keys and values ``[B, L, D]``, heads side by side, to ``[B, S, D]``.

    Scores and their softmax are in float32. Slices of the last dimension are taken as they lie.
    """
    (rows, queries, wide), keys = q.shape, k.shape[1]
    q, k, v = (
        y if y.stride(-1) == 1 and y.stride(0) == y.shape[1] * y.stride(1) else y.contiguous() for y in (q, k, v)
    )
    if k.stride(1) != v.stride(1):
        k, v = k.contiguous(), v.contiguous()
    y, scratch = q.new_empty(rows, queries, wide), q.new_empty(2, rows, -(-keys // BLOCK) * BLOCK, wide)
    sizes = q.stride(1), k.stride(1), rows, queries, keys, wide // head_dim, head_dim
    call("attend", q.dtype, *(tensor.data_ptr() for tensor in (q, k, v, y, scratch)), *sizes, head_dim**-0.5)
    return y
