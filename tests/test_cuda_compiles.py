"""The Triton kernels compile for GPUs, at SDXL's sizes: to code that spills nothing and moves 16 bytes at a time."""

import json
import os
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="it is only made for Linux")

from ahead_of_time import BIN, kernels

HERE = Path(__file__).parent
CAPABILITIES = 90, 80, 89, 100  # Hopper, Ampere, Ada, Blackwell
# Of each kernel: how many tiles a program loads through each of its pointers, by their places, and may store.
TILES = {
    "_sums_kernel": ({0: 1}, (0,)),
    "_lines_kernel": ({}, (0,)),  # a few numbers of each group
    "_norm_kernel": ({0: 1}, (1,)),
    "_total_kernel": ({0: 1, 1: 1}, (1,)),
    "_geglu_kernel": ({0: 2}, (1,)),
    "_interleaved_kernel": ({0: 1}, (1,)),
    "_layer_norm_kernel": ({0: 1}, (1, 2)),
    "_softmax_kernel": ({1: 2}, (1,)),
    "_rounded_kernel": ({0: 1}, (1,)),
}

pytestmark = pytest.mark.xdist_group("ahead of time")  # they share what takes long


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    if not (BIN / "ptxas").exists():
        pytest.skip("this Triton brings no assembler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, HERE / "ahead_of_time.py", *map(str, CAPABILITIES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_every_kernel_is_compiled_for_every_gpu(compiled):
    assert TILES.keys() == {name for _, name in kernels()}
    wanted = {(name, capability) for name in TILES for capability in CAPABILITIES}
    wanted.remove(("_rounded_kernel", 80))  # it has no such numbers
    assert {(code["kernel"], code["capability"]) for code in compiled} == wanted
    hoppers = {(code["kernel"], code["dtype"]) for code in compiled if code["capability"] == 90}
    assert hoppers == {(name, dtype) for name in TILES for dtype in ("torch.float16", "torch.bfloat16")}


def test_nothing_is_spilled(compiled):
    assert not [code for code in compiled if code["stack"] or code["local"]]


def test_tiles_are_moved_16_bytes_at_a_time(compiled):
    for code in compiled:
        loaded, stored = TILES[code["kernel"]]
        elements = code["tile"] / code["threads"]  # a thread's of a tile
        for pointer, tiles in loaded.items():
            wide = code["wide_loads"].get(str(pointer), 0)
            assert wide >= tiles * elements * code["itemsize"] / 16, code
        itemsize = 1 if code["kernel"] == "_rounded_kernel" else code["itemsize"]
        assert code["wide_stores"] in {ceil(tiles * elements * itemsize / 16) for tiles in stored}, code
