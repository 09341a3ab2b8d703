"""Compiles the Triton kernels for GPUs that are not here, as our own functions launch them, and says what came of it.

Run as a program, without TRITON_INTERPRET: python ahead_of_time.py 90 80, for compute capability 9.0 (everything) and
8.0 (in brief). Triton brings the assembler; tensors are on torch's device "meta", which has shapes and no numbers. Each
kernel is a line of JSON: what the GPU's code holds, and by which memory accesses.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fulgurite.kernels import cuda, cuda_norm, cuda_rows

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NORMS = [(2, 320, 128, 128), (1, 1280, 32, 32), (1, 512, 256, 256), (1, 128, 1024, 1024)]  # of a step, and a decode
GEGLUS = [(1, 4096, 2 * 2560), (2, 1024, 2 * 5120)]
WIDTHS = [640, 1280, 2560, 5120, 10240]  # of rows to round
FLOAT8 = 89  # the capability from which a GPU has such numbers


def kernels() -> list[tuple[ModuleType, str]]:
    """Every kernel of the package, by its module and name."""
    modules = cuda, cuda_norm, cuda_rows
    return [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]


class Absent:
    """What Triton asks its driver, answered for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Compiled:
    """In place of a kernel: compiles it as it would be launched, and tells of it."""

    def __init__(self, kernel: Any, said: set[str]) -> None:
        self.kernel, self.said = kernel, said

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **sizes: Any) -> None:
            code = self.kernel.warmup(*arguments, grid=grid, **sizes)
            loads, stores = wide_accesses(code.asm["ptx"])
            line = {
                "kernel": self.kernel.__name__,
                "capability": code.metadata.target.arch,
                "dtype": str(arguments[0].dtype),
                "itemsize": arguments[0].itemsize,
                "tile": sizes["BLOCK"] if "BLOCK" in sizes else sizes["BLOCK_C"] * sizes["BLOCK_P"],
                "threads": 32 * code.metadata.num_warps,
                "sizes": {name: size for name, size in sizes.items() if isinstance(size, int)},
                **resources(code.asm["cubin"]),
                "wide_loads": loads,
                "wide_stores": stores,
            }
            self.said.add(json.dumps(line))

        return launch


@cache
def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and of its memory for what they do not hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told.stdout + told.stderr)
    assert found, told.stdout
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


@cache
def wide_accesses(ptx: str) -> tuple[dict[int, int], int]:
    """How many loads of 16 bytes a thread's code has from each of the kernel's pointers, and how many such stores.

    A load's pointer is found by what its address was computed from.
    """
    lines = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)\s+(.*?);", ptx, re.MULTILINE)
    comes_from: dict[str, set[int]] = {}
    for operation, operands in lines:
        target, *sources = re.findall(r"%r\w+", operands) or [""]
        if operation.startswith("ld.param.b64") and (pointer := re.search(r"_param_(\d+)", operands)):
            comes_from[target] = {int(pointer[1])}
        elif not operation.startswith(("ld.", "st.")):
            comes_from[target] = set().union(*(comes_from.get(source, set()) for source in sources))
    loads = [re.findall(r"%r\w+", operands)[-1] for operation, operands in lines if operation == "ld.global.v4.b32"]
    pointers = Counter(pointer for address in loads for pointer in comes_from[address])
    return dict(pointers), sum(operation == "st.global.v4.b32" for operation, _ in lines)


def compile_all(dtype: torch.dtype, capability: int, norms: Sequence[tuple[int, ...]]) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for shape in norms:
        for form in (torch.contiguous_format, torch.channels_last):
            x, norm = empty(*shape).to(memory_format=form), nn.GroupNorm(32, shape[1], dtype=dtype, device="meta")
            bias, vectors = norm.bias, empty(shape[0], 20000)[:, 320 : 320 + shape[1]]
            cuda.group_norm(x, norm, silu=False)
            cuda.group_norm(x, norm, silu=True)
            cuda.group_norm(x, norm, silu=True, bias=bias)
            cuda.group_norm(x, norm, silu=True, bias=bias, vectors=vectors)
            cuda.total(x, x, bias)
            cuda.total(x, x, bias, bias)
        four = empty(shape[0], 4 * shape[1], shape[2] + 1, shape[3] + 1).to(memory_format=torch.channels_last)
        cuda.interleaved(four, bias)
    for shape in GEGLUS:
        cuda.geglu(empty(*shape))
    for width in WIDTHS[:2]:
        x, norm = empty(4096, width), nn.LayerNorm(width, dtype=dtype, device="meta")
        cuda_rows.layer_norm(x, norm)
        cuda_rows.layer_norm(x, norm, x)
    cuda_rows.softmax(torch.empty(1, 8192, 16384, device="meta"), 0.1, dtype)
    for width in WIDTHS if capability >= FLOAT8 else []:
        cuda_rows.rounded(empty(4096, width))


def main() -> None:
    said: set[str] = set()
    for module, name in kernels():
        setattr(module, name, Compiled(getattr(module, name), said))
    first, *others = map(int, sys.argv[1:])
    driver.set_active(Absent(first))
    for dtype in (torch.float16, torch.bfloat16):
        compile_all(dtype, first, NORMS)
    for capability in others:
        driver.set_active(Absent(capability))
        compile_all(torch.float16, capability, NORMS[:1])
    print("\n".join(sorted(said)))


if __name__ == "__main__":
    main()
