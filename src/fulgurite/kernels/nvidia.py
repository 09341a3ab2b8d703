"""Whether a device is an NVIDIA GPU that can draw by the Triton kernels."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

log = logging.getLogger("fulgurite")
LEAST = 8, 0  # the compute capability that the kernels are compiled for in the tests: Ampere's


def is_nvidia(device: str) -> bool:
    """Whether a device is a GPU of NVIDIA's: torch calls AMD's "cuda" too."""
    return device.startswith("cuda") and torch.version.cuda is not None


@cache
def why_not_triton(device: str) -> str:
    """Why the kernels cannot run on a device, as a sentence's end; empty where they can.

    The first time one is run, which compiles it: that needs a C compiler and Python's headers.
    """
    if not is_nvidia(device):
        return f"they need an NVIDIA GPU, and the device is {device!r}"
    if not find_spec("triton"):
        return "they need Triton, which is not installed"
    if torch.cuda.get_device_capability(device) < LEAST:
        return "they need a GPU of Ampere's generation or newer"
    from fulgurite.kernels import cuda  # here: it imports Triton, which not every machine has

    try:
        cuda.geglu(torch.zeros(1, 2, device=device))
    except Exception as error:  # of its compiler, of the linker, of the driver
        if "out of memory" in str(error):
            raise
        log.warning("no Triton kernel can be compiled here", exc_info=True)
        return f"one was tried and failed with {type(error).__name__}; the log has more"
    return ""
