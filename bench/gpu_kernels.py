"""The Triton kernels of fulgurite.kernels.cuda beside the plain torch that they replace.

    python bench/gpu_kernels.py --out results [--times]

Whether they are right on this device and, with --times, how quick they are. It is a program of its own since a kernel
that goes wrong on a GPU may take its process's GPU with it: bench/gpu.py runs it before it uses them. With --smoke a
few small shapes on the CPU, in Triton's interpreter (TRITON_INTERPRET=1).

Times are of many calls in a graph, so that they are not the launches'. Of the smaller shapes the tensors stay in the
GPU's cache from call to call, as they may between a network's layers.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import GroupNorm, LayerNorm

from fulgurite.kernels import float8
from fulgurite.models.layers import DotProductAttention, GroupNormSiLU, Upsample
from report import Report
from timing import Timer

NORM_SHAPES = [(1, 320, 128, 128), (1, 1280, 32, 32), (1, 512, 256, 256), (1, 256, 1024, 1024), (1, 128, 1024, 1024)]
ROUNDED_SHAPES = [(4096, 640), (4096, 2560), (1024, 1280), (1024, 5120)]
LAYER_NORMS = [(1280, 1024), (640, 4096)]  # width, rows
UPSAMPLED_SHAPES = [(1, 1280, 32, 32), (1, 512, 256, 256), (1, 256, 512, 512)]
ATTENTIONS = [(16384, 512)]  # length, width of the one head
CHANNELS_LAST = torch.channels_last
GEGLU_SHAPES = [(1, 4096, 2 * 2560), (1, 1024, 2 * 5120)]
TOLERANCE = {torch.float16: 4e-3, torch.float32: 1e-4}  # relative to 1 + the value


class Kernels:
    """Each kernel beside plain torch."""

    def __init__(self, report: Report, timer: Timer | None, device: str, dtype: torch.dtype) -> None:
        """``timer``: of both ways, where they are to be timed."""
        self.report, self.timer, self.device, self.dtype = report, timer, device, dtype

    def norms(self, shape: tuple[int, ...], form: torch.memory_format) -> None:
        from fulgurite.kernels.cuda import group_norm, total

        size = f"{'x'.join(map(str, shape))}, {str(form).removeprefix('torch.')}"
        x, other = (self.random(*shape).to(memory_format=form) for _ in range(2))
        bias, vectors, pixels = self.random(shape[1]), self.random(*shape[:2]), (..., None, None)
        norm, silu = (kind(32, shape[1], device=self.device, dtype=self.dtype) for kind in (GroupNorm, GroupNormSiLU))
        self.both(f"group norm {size}", lambda: group_norm(x, norm, silu=False), lambda: norm(x))
        self.both(f"group norm + SiLU {size}", lambda: group_norm(x, silu, silu=True), lambda: silu(x))
        self.both(
            f"bias + vectors + group norm + SiLU {size}",
            lambda: group_norm(x, silu, silu=True, bias=bias, vectors=vectors),
            lambda: silu(x.add(bias[pixels]).add_(vectors[pixels])),
        )
        self.both(f"two + bias {size}", lambda: total(x, other, bias), lambda: x.add(bias[pixels]).add_(other))

    def gate(self, shape: tuple[int, ...]) -> None:
        from fulgurite.kernels.cuda import geglu

        both = self.random(*shape)
        value, gate = both.chunk(2, dim=-1)
        self.both(f"GEGLU {'x'.join(map(str, shape))}", lambda: geglu(both), lambda: value * F.gelu(gate))

    def layer_norm(self, width: int, rows: int) -> None:
        from fulgurite.kernels.cuda_rows import layer_norm

        norm = LayerNorm(width, device=self.device, dtype=self.dtype)
        x, more = self.random(1, rows, width), self.random(1, rows, width)
        name = f"layer norm of a sum {rows}x{width}"
        self.both(name, lambda: layer_norm(x, norm, more)[1], lambda: norm(x + more))

    def upsampling(self, shape: tuple[int, ...]) -> None:
        from fulgurite.kernels import cuda

        plain, x = Upsample(shape[1]).to(self.device, self.dtype).to(memory_format=CHANNELS_LAST), self.random(*shape)
        x, fused = x.to(memory_format=CHANNELS_LAST), deepcopy(plain)
        cuda.accelerate(fused)
        self.both(f"upsampling and convolution {'x'.join(map(str, shape))}", lambda: fused(x), lambda: plain(x))

    def attention(self, length: int, width: int) -> None:
        from fulgurite.kernels.cuda import wide_attention

        q, k, v = (self.random(1, length, width) for _ in range(3))
        plain = DotProductAttention(width)
        self.both(f"attention {length}x{width}", lambda: wide_attention(q, k, v), lambda: plain(q, k, v))

    def rounding(self, shape: tuple[int, ...]) -> None:
        from fulgurite.kernels.cuda_rows import rounded

        name, rows = f"8 bits {'x'.join(map(str, shape))}", self.random(*shape).bfloat16()
        (found, scales), (wanted, wanted_scales) = rounded(rows), float8.rounded(rows)
        alike = (found.view(torch.uint8) == wanted.view(torch.uint8)).float().mean().item()
        self.report.row(f"{name}, alike", share=alike, scales=torch.equal(scales, wanted_scales))
        if self.device == "cuda" and alike < 1:  # Triton's interpreter rounds in its own way
            raise AssertionError(f"{name}: {alike:.6f} of the numbers are those of plain torch")
        self.times(name, lambda: rounded(rows)[0], lambda: float8.rounded(rows)[0])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def both(self, name: str, fused: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
        """Raises AssertionError where the two differ by more than their precision; the error is a row either way."""
        found, wanted = fused().float(), plain().float()
        error = ((found - wanted).abs() / (1 + wanted.abs())).max().item()
        self.report.row(f"{name}, error", error=error, finite=bool(found.isfinite().all()))
        if not error <= TOLERANCE[self.dtype]:
            raise AssertionError(f"{name} differs by {error:.2g}, more than {TOLERANCE[self.dtype]:.2g}")
        self.times(name, fused, plain)

    def times(self, name: str, fused: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
        if self.timer:
            self.timer.often(f"{name}, plain", plain)
            self.timer.often(f"{name}, Triton", fused)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="the folder for results.jsonl and log.txt")
    arguments.add_argument("--times", action="store_true")
    arguments.add_argument("--smoke", action="store_true", help="small shapes on the CPU, with TRITON_INTERPRET=1")
    given = arguments.parse_args()
    device, dtype = ("cpu", torch.float32) if given.smoke else ("cuda", torch.float16)
    report = Report(given.out)
    kernels = Kernels(report, Timer(report, device) if given.times else None, device, dtype)
    norms, gates, rounded = (
        ([(1, 64, 8, 8)], [(1, 4, 64)], [(4, 64)]) if given.smoke else (NORM_SHAPES, GEGLU_SHAPES, ROUNDED_SHAPES)
    )
    with torch.inference_mode():
        for shape in norms:
            for form in (torch.contiguous_format, torch.channels_last):
                report.part(f"norms of {shape}, {form}", partial(kernels.norms, shape, form))
        for sizes in [(64, 8)] if given.smoke else LAYER_NORMS:
            report.part(f"layer norm of {sizes}", partial(kernels.layer_norm, *sizes))
        for shape in [(1, 16, 4, 4)] if given.smoke else UPSAMPLED_SHAPES:
            report.part(f"upsampling of {shape}", partial(kernels.upsampling, shape))
        for sizes in [(16, 288)] if given.smoke else ATTENTIONS:
            report.part(f"attention of {sizes}", partial(kernels.attention, *sizes))
        for shape in gates:
            report.part(f"GEGLU of {shape}", partial(kernels.gate, shape))
        for shape in rounded:
            report.part(f"rounding of {shape}", partial(kernels.rounding, shape))
    report.end()


if __name__ == "__main__":
    main()
