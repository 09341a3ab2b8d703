"""Whether an NVIDIA GPU can draw by the Triton kernels."""

from functools import cache
from importlib.util import find_spec

import torch

LEAST = 8, 0  # the compute capability that the kernels are compiled for in the tests: Ampere's


@cache
def why_not_triton(device: str) -> str:
    """Why the kernels cannot run on a device, as a sentence's end; empty where they can.

    The first time one is run, which compiles it: that needs a C compiler and Python's headers.
    """
    if not device.startswith("cuda") or torch.version.cuda is None:
        return f"they need an NVIDIA GPU, and the device is {device!r}"
    if not find_spec("triton"):
        return "they need Triton, which is not installed"
    if torch.cuda.get_device_capability(device) < LEAST:
        return "they need a GPU of Ampere's generation or newer"
    from fulgurite.kernels import cuda  # here: it imports Triton, which not every machine has

    try:
        cuda.geglu(torch.zeros(1, 2, device=device))
    except Exception as error:  # of its compiler, of the linker, of the driver
        return f"one was tried and failed, {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""
