"""Kernels in C for a CPU (``group_norm.c``): compiled as the package is installed, none where there is no compiler."""

import ctypes
import importlib.util
from functools import cache

import torch
from torch import Tensor

PART = 1 << 14  # numbers that a thread goes through at a time: they stay in its cache. Sums are of such parts


@cache
def library() -> ctypes.CDLL | None:
    """The compiled file; none where there is none, or where torch's threads are not those that it was compiled for."""
    spec = importlib.util.find_spec("fulgurite.kernels._compiled")
    if spec is None or spec.origin is None:
        return None
    try:
        found = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.group_norm.argtypes = [pointer] * 5 + [number] * 5 + [ctypes.c_double, ctypes.c_int, ctypes.c_int]
    found.group_norm.restype = None
    return found


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Group normalization, and SiLU after it where ``silu``: pictures ``[B, C, h, w]`` in bfloat16, channels last.

    ``weight`` and ``bias`` ``[C]`` are in float32. Computed in float32, sums in float64, and rounded once.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = x.shape
    part = max(1, PART // channels)  # pixels
    parts = -(-height * width // part)
    y, scratch = torch.empty_like(x), torch.empty(rows * (2 * groups * parts + channels), dtype=torch.float64)
    pointers = (tensor.data_ptr() for tensor in (x, y, weight, bias, scratch))
    sizes = rows, height * width, channels, groups, part
    compiled = library()
    assert compiled
    compiled.group_norm(*pointers, *sizes, eps, silu, torch.get_num_threads())
    return y
